"""Incremental decoding for tokenizers whose decoder does more than join bytes.

Metaspace strips the blank in front of the text, ByteFallback turns a whole run of ``<0xE4>`` tokens
into U+FFFDs if the run is no valid UTF-8, WordPiece joins pieces. All of them look a few tokens
around, so the text of new tokens is the difference of two decodings of a short window.

Rules: nothing is shown that a later token could change: an open run of byte tokens and a text that
ends in U+FFFD wait. All pieces joined equal ``tokenizer.decode`` of all tokens.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# A character has four bytes, so a text that still ends in U+FFFD after many tokens is meant so.
_MAX_WAITING = 64


class WindowDecoder:
    """The text of one generation, token by token. Special tokens to skip must not be fed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown_ids: list[int] = []  # the tokens of the last piece that was not empty
        self._shown = ""  # what they decode to alone
        self._waiting: list[int] = []  # tokens whose text was not given out yet

    def fresh(self) -> WindowDecoder:
        """One that has decoded nothing."""
        return WindowDecoder(self._tokenizer)

    def step(self, token: int, /) -> str:
        """The text that this token makes certain; often empty for byte tokens."""
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return ""
        self._waiting.append(token)
        if _BYTE_TOKEN.fullmatch(text):
            return ""
        piece = self._piece()
        if not piece or (piece.endswith("\ufffd") and len(self._waiting) < _MAX_WAITING):
            return ""
        self._shown_ids, self._waiting = self._waiting, []
        self._shown = self._decode(self._shown_ids)
        return piece

    def finish(self) -> str:
        """The text of the tokens that still wait."""
        return self._piece() if self._waiting else ""

    def _piece(self) -> str:
        return self._decode(self._shown_ids + self._waiting)[len(self._shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
