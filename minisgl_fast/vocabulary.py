"""Vocabulary: the bytes of every token, for who has to know them without a tokenizer.

The frontend takes it from its tokenizer and sends it to the engine in CONFIG, as text.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``tokens[id]`` is what the token adds to a text, empty for an id without a text.

    ``special_ids``: tokens that stand for no text, such as the end of a turn.
    """

    tokens: Sequence[bytes]
    special_ids: frozenset[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def to_text(self) -> str:
        """ASCII without quotes or line ends; ``from_text`` is the way back."""
        parts = (
            array("I", map(len, self.tokens)).tobytes(),
            b"".join(self.tokens),
            array("I", sorted(self.special_ids)).tobytes(),
        )
        return ",".join(base64.b64encode(part).decode() for part in parts)

    @classmethod
    def from_text(cls, text: str) -> Vocabulary:
        lengths, data, special_ids = map(base64.b64decode, text.split(","))
        tokens = []
        at = 0
        for length in array("I", lengths):
            tokens.append(data[at : at + length])
            at += length
        return cls(tokens, frozenset(array("I", special_ids)))

    def truncated(self, size: int) -> Vocabulary:
        """Of the ids below ``size`` alone."""
        return Vocabulary(self.tokens[:size], frozenset(_below(self.special_ids, size)))


def _below(ids: Iterable[int], size: int) -> list[int]:
    return [token for token in ids if token < size]
