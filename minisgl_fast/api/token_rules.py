"""vLLM's ``bad_words``, ``allowed_token_ids`` and ``thinking_token_budget``: from words, ids and a
number to what the engine is asked.

A word is banned as it stands and with a blank before it, as vLLM has it: the second only where the
tokenizer joins blank and word, so that both have as many tokens.

Rules: a word of one token is a bias; longer ones, and a list of what is allowed, are masks, which
every step of the request then takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.errors import RequestError
from minisgl_fast.params import MAX_BANNED_TOKEN_IDS, MAX_INT32, MAX_STOP_CHARACTERS
from minisgl_fast.parsers.select import Formats
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.token_rules import ThinkingBudget, TokenRules, bits_of

Word = tuple[int, ...]


def banned_words(words: Sequence[str], tokenizer: Tokenizer) -> list[Word]:
    """The tokens of ``bad_words``, each word in up to two forms. RequestError."""
    if len(words) > MAX_BANNED_TOKEN_IDS // 2:
        raise RequestError(
            f"bad_words must hold at most {MAX_BANNED_TOKEN_IDS // 2} words, got {len(words)}.",
            param="bad_words",
        )
    banned: dict[Word, None] = {}
    for index, word in enumerate(words):
        where = f"bad_words[{index}]"
        if not 0 < len(word) <= MAX_STOP_CHARACTERS or not word.strip():
            raise RequestError(
                f"{where} must have 1 to {MAX_STOP_CHARACTERS} characters, not blanks alone.",
                param=where,
            )
        bare, blank = (tuple(tokenizer.encode(text + word.lstrip())) for text in ("", " "))
        banned[bare] = None
        if blank[0] != bare[0] and len(blank) == len(bare):
            banned[blank] = None
    return list(banned)


class ThinkingForm:
    """What bounds the reasoning of a model, or ``why_not``."""

    def __init__(self, formats: Formats, tokenizer: Tokenizer) -> None:
        def token_of(text: str) -> int:
            ids = tokenizer.encode(text)
            return ids[0] if len(ids) == 1 else -1

        self._formats = formats
        self._token_of = token_of
        self._ends = tuple(map(token_of, formats.reasoning_ends))
        self.why_not = ""
        if formats.reasoning is None:
            self.why_not = "the server was not told of a reasoning of this model"
        elif not self._ends or self._ends[0] < 0:
            self.why_not = "no single token ends this model's reasoning"

    def budget(
        self, budget: int | None, prompt: str, *, has_tools: bool, param: str
    ) -> ThinkingBudget | None:
        """The rule for an answer to ``prompt``; None without a budget or a reasoning."""
        if budget is None or budget == -1:
            return None
        if not 0 <= budget <= MAX_INT32:
            raise RequestError(
                f"{param} must be in [0, {MAX_INT32}], or -1 for no limit, got {budget}.",
                param=param,
            )
        if self.why_not:
            raise RequestError(f"{param} cannot be kept: {self.why_not}.", param=param)
        form = self._formats.reasoning_format(prompt)
        if form is None:
            return None
        ends = self._ends if has_tools else self._ends[:1]  # a call ends a reasoning, too
        ends = tuple(token for token in ends if token >= 0)
        return ThinkingBudget(budget, self._token_of(form.start), form.is_open, ends)


def token_rules(
    body: SamplingFields,
    tokenizer: Tokenizer,
    vocab_size: int,
    thinking: ThinkingBudget | None = None,
) -> tuple[TokenRules, str] | None:
    """What must be a mask, and the field that asks for it; None if nothing must."""
    ids = body.allowed_token_ids
    if ids is None and not body.bad_words and thinking is None:
        return None
    banned = banned_words(body.bad_words or (), tokenizer)
    words = [word for word in banned if len(word) > 1]
    if ids is None and not words and thinking is None:
        return None
    if thinking is not None and thinking.ends[:1] in banned:
        name = "bad_words"
        raise RequestError(f"{name} has the end of the reasoning that is bounded.", param=name)
    name = "bad_words" if words else "thinking_token_budget"
    name = name if ids is None else "allowed_token_ids"
    if ids is not None and not ids:
        raise RequestError("allowed_token_ids must not be empty.", param=name)
    if ids is not None and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(f"{name} must hold token ids in [0, {vocab_size - 1}].", param=name)
    allowed = None if ids is None else bits_of(ids, vocab_size)
    return TokenRules(allowed, tuple(words), thinking), name
