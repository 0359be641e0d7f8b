"""Log-probabilities in ``meta_info``, in SGLang's form: lists of ``[logprob, token id, text]``.

Rules: there is one entry for each token of the prompt from ``logprob_start_len`` on, and one for
each generated token; the first entry of a prompt is null, as SGLang has it; -inf is -9999.0; the
text is null unless it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minisgl_fast.api.logprobs import (
    MAX_LOGPROB_IDS,
    MAX_TOP_LOGPROBS,
    NO_LOGPROBS,
    LogprobOptions,
    TokenLogprobs,
)
from minisgl_fast.api.openai_logprobs import finite
from minisgl_fast.errors import RequestError
from minisgl_fast.params import MAX_INT32
from minisgl_fast.text.tokenizer import Tokenizer

# Only a prompt's computation is asked for, no value of it.
PROMPT_ALONE = LogprobOptions(prompt_from=MAX_INT32)


@dataclass(frozen=True, slots=True)
class NativeLogprobs:
    """What one prompt's ``meta_info`` is to hold.

    start       ``logprob_start_len``; -1: nothing of the prompt
    num_top     ``top_logprobs_num``
    ids         ``token_ids_logprob``
    with_text   ``return_text_in_logprobs``
    """

    is_wanted: bool = False
    start: int = -1
    num_top: int = 0
    ids: tuple[int, ...] = ()
    with_text: bool = False

    @property
    def options(self) -> LogprobOptions:
        """What the engine is asked for."""
        if not self.is_wanted:
            return NO_LOGPROBS
        # That of the first entry is not shown, so it need not be computed.
        first = -1 if self.start < 0 else self.start + 1
        return LogprobOptions(self.num_top, first, self.ids, keeps_cut=True)

    def check(self, vocab_size: int) -> None:
        """RequestError for what is out of range."""
        if not -1 <= self.start < MAX_INT32:
            raise _out_of_range("logprob_start_len", self.start, "at least -1")
        if not 0 <= self.num_top <= MAX_TOP_LOGPROBS:
            raise _out_of_range("top_logprobs_num", self.num_top, f"in [0, {MAX_TOP_LOGPROBS}]")
        name = "token_ids_logprob"
        if len(self.ids) > MAX_LOGPROB_IDS:
            raise _out_of_range(name, len(self.ids), f"at most {MAX_LOGPROB_IDS} token ids")
        if self.ids and not (min(self.ids) >= 0 and max(self.ids) < vocab_size):
            raise RequestError(f"{name} must hold token ids in [0, {vocab_size - 1}].", param=name)

    def check_start(self, num_prompt: int) -> None:
        """RequestError if the prompt ends before the start."""
        if self.is_wanted and self.start > num_prompt:
            raise _out_of_range(
                "logprob_start_len", self.start, f"at most the prompt's length, {num_prompt}"
            )

    def input_keys(
        self, prompt: Sequence[int], found: Sequence[TokenLogprobs], tokenizer: Tokenizer
    ) -> dict[str, Any]:
        """The keys about the prompt; ``found``: its tokens behind the first that is shown."""
        entries: list[TokenLogprobs | None] = []
        tokens: list[list[Any]] = []
        if 0 <= self.start < len(prompt):
            entries = [None, *found]
            first = prompt[self.start]
            tokens = [[None, first, self._text(first, tokenizer)]]
            tokens += self._tokens(found, tokenizer)
        return self._keys("input", tokens, entries, tokenizer)

    def output_keys(self, found: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
        """The keys about generated tokens."""
        return self._keys("output", self._tokens(found, tokenizer), found, tokenizer)

    def _keys(
        self,
        side: str,
        tokens: list[list[Any]],
        entries: Iterable[TokenLogprobs | None],
        tokenizer: Tokenizer,
    ) -> dict[str, Any]:
        keys: dict[str, Any] = {f"{side}_token_logprobs": tokens}
        if self.num_top:
            keys[f"{side}_top_logprobs"] = [
                None
                if entry is None
                else [[finite(value), token, self._text(token, tokenizer)]
                      for token, value in entry.top[: self.num_top]]
                for entry in entries
            ]  # fmt: skip
        if self.ids:
            keys[f"{side}_token_ids_logprobs"] = [
                None
                if entry is None
                else [[finite(value), token, self._text(token, tokenizer)]
                      for token, value in zip(self.ids, entry.of_ids, strict=True)]
                for entry in entries
            ]  # fmt: skip
        return keys

    def _tokens(self, found: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> list[list[Any]]:
        return [[finite(one.logprob), one.token, self._text(one.token, tokenizer)] for one in found]

    def _text(self, token: int, tokenizer: Tokenizer) -> str | None:
        if not self.with_text:
            return None
        return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _out_of_range(name: str, value: int, expected: str) -> RequestError:
    return RequestError(f"{name} must be {expected}, got {value}.", param=name)
