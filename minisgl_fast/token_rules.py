"""Which tokens a request may draw at all: vLLM's ``allowed_token_ids`` and ``bad_words``.

    {"allowed": base64 of the bits of the ids that may come, "words": [[id, ...], ...]}\n

in front of the text of a grammar, which may be empty: ``TokenRules.before`` writes it, ``split``
reads it, engine/ruled_grammar.py obeys it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

_START = b'{"allowed": '


@dataclass(frozen=True, slots=True)
class TokenRules:
    """``allowed``: bit id % 8 of byte id / 8, None for all; ``words``: tokens, two or more each."""

    allowed: bytes | None
    words: tuple[tuple[int, ...], ...]

    def before(self, grammar: bytes) -> bytes:
        """The rules as the engine reads them, and behind them the grammar."""
        allowed = None if self.allowed is None else base64.b64encode(self.allowed).decode()
        return json.dumps({"allowed": allowed, "words": self.words}).encode() + b"\n" + grammar


def split(text: bytes) -> tuple[TokenRules | None, bytes]:
    """The rules before a grammar, None where there are none, and the grammar."""
    if not text.startswith(_START):
        return None, text
    head, _, grammar = text.partition(b"\n")
    fields = json.loads(head)
    allowed = None if fields["allowed"] is None else base64.b64decode(fields["allowed"])
    return TokenRules(allowed, tuple(map(tuple, fields["words"]))), grammar


def bits_of(ids: Sequence[int], num_ids: int) -> bytes:
    """A bit for each of ``num_ids`` ids, set for these."""
    bits = bytearray(-(-num_ids // 8))
    for token in ids:
        bits[token >> 3] |= 1 << (token & 7)
    return bytes(bits)
