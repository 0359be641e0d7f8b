"""Log-probabilities in OpenAI's two forms: chat's list of tokens, completions' parallel lists.

Rules: -inf, which JSON does not have, is -9999.0. A token's ``bytes`` are its own, whole or not as
characters; its text is those bytes as UTF-8, with U+FFFD where they are not. In completions the
token itself is always among the largest listed, and of several tokens with the same text the
likeliest is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from minisgl_fast.api.logprobs import TokenLogprobs
from minisgl_fast.text.tokenizer import Tokenizer

LOWEST = -9999.0
NULL = b"null"


class ChatLogprobs:
    """``choices[].logprobs`` of chat objects and chunks."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top

    def to_json(self, tokens: Sequence[TokenLogprobs]) -> bytes:
        content = [
            {
                **self._entry(token.token, token.logprob),
                "top_logprobs": [self._entry(*pair) for pair in token.top[: self._num_top]],
            }
            for token in tokens
        ]
        return orjson.dumps({"content": content, "refusal": None})

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": finite(logprob),
            "bytes": list(data),
        }


class CompletionLogprobs:
    """``choices[].logprobs`` of completion objects and chunks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

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
        for one, value in (*token.top, (token.token, token.logprob)):
            top.setdefault(self._text(one), finite(value))
        return top

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")


def finite(value: float | None) -> float | None:
    return LOWEST if value == float("-inf") else value
