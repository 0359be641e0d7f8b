"""Log-probabilities in OpenAI's two forms: chat's list of tokens, completions' parallel lists.

Rules: -inf, which JSON does not have, is -9999.0. A token's ``bytes`` are its own, whole or not as
characters; its text is those bytes as UTF-8, with U+FFFD where they are not. In completions the
token itself is always among the largest listed, and of several tokens with the same text the
likeliest is. Tokens that were asked for by id are listed behind the largest; in a chat behind the
token itself, where no largest are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from minisgl_fast.api.logprobs import TokenLogprobs
from minisgl_fast.text.tokenizer import Tokenizer

LOWEST = -9999.0
NULL = b"null"


class _Names:
    """How tokens are called: by their text, or with ``as_ids`` as vLLM's ``token_id:5``."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_top: int,
        *,
        as_ids: bool = False,
        ids: Sequence[int] = (),
    ) -> None:
        """``num_top``: how many of the largest are listed. ``ids``: those asked for by id, whose
        values are a token's ``of_ids``."""
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_ids = as_ids
        self._ids = ids

    def _text(self, token: int) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")


class ChatLogprobs(_Names):
    """``choices[].logprobs`` of chat objects and chunks."""

    def to_json(self, tokens: Sequence[TokenLogprobs]) -> bytes:
        return orjson.dumps({"content": self.entries(tokens), "refusal": None})

    def entries(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """An entry for each token, as other APIs have it, too."""
        return [
            {
                **self._entry(token.token, token.logprob),
                "top_logprobs": [self._entry(*pair) for pair in self._listed(token)],
            }
            for token in tokens
        ]

    def _listed(self, token: TokenLogprobs) -> Iterable[tuple[int, float | None]]:
        top = token.top[: self._num_top]
        if not self._ids:
            return top
        listed: dict[int, float | None] = {} if top else {token.token: token.logprob}
        listed.update(top)
        for one, value in zip(self._ids, token.of_ids, strict=True):
            listed.setdefault(one, value)
        return listed.items()

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._text(token),
            "logprob": finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


class CompletionLogprobs(_Names):
    """``choices[].logprobs`` of completion objects and chunks."""

    def to_json(self, tokens: Sequence[TokenLogprobs], offset: int = 0) -> bytes:
        """``offset``: characters that stand before the tokens' text."""
        return orjson.dumps(
            {
                "tokens": [self._text(token.token) for token in tokens],
                "token_logprobs": [finite(token.logprob) for token in tokens],
                "top_logprobs": [self._top(token) for token in tokens],
                "text_offset": [offset + token.offset for token in tokens],
            }
        )

    def _top(self, token: TokenLogprobs) -> dict[str, float | None] | None:
        if token.logprob is None:
            return None
        top: dict[str, float | None] = {}
        by_id = zip(self._ids, token.of_ids, strict=True) if self._ids else ()
        for one, value in (*token.top[: self._num_top], (token.token, token.logprob)):
            top.setdefault(self._text(one), finite(value))
        for one, value in sorted(by_id, key=lambda pair: -pair[1]):
            top.setdefault(self._text(one), finite(value))
        return top


class PromptLogprobs(_Names):
    """vLLM's ``prompt_logprobs``: for each token of a prompt but the first, by id, its own and the
    largest. ``rank`` counts from 1, and is null where it is beyond those that are listed."""

    def to_json(self, found: Sequence[TokenLogprobs]) -> bytes:
        """``found``: the tokens of a prompt behind its first."""
        return orjson.dumps([None, *map(self._position, found)])

    def _position(self, token: TokenLogprobs) -> dict[str, Any]:
        listed = token.top[: self._num_top]
        ranks = {one: rank for rank, (one, _) in enumerate(token.top, 1)}
        return {
            str(one): {
                "logprob": finite(value),
                "rank": ranks.get(one),
                "decoded_token": self._text(one),
            }
            for one, value in (*listed, (token.token, token.logprob))
        }


def finite(value: float | None) -> float | None:
    return LOWEST if value == float("-inf") else value
