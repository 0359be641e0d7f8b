"""Which tokens a request may draw: ``allowed_token_ids``, ``bad_words``, ``thinking_token_budget``.

    {"allowed": base64 of the bits of the ids that may come, "words": [[id, ...], ...],
     "thinking": [budget, start, is_open, [end, ...]]}\n

in front of the text of a grammar, which may be empty: ``TokenRules.before`` writes it, ``split``
reads it, engine/ruled_grammar.py obeys it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_START = b'{"allowed": '


class ThinkingBudget(NamedTuple):
    """A reasoning of at most ``budget`` tokens, its first and last mark not counted.

    start    token that begins it, -1 for none; ``is_open``: it has begun before the first token
    ends     tokens that end it; the first is the one to end it with
    """

    budget: int
    start: int
    is_open: bool
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenRules:
    """``allowed``: bit id % 8 of byte id / 8, None for all; ``words``: tokens, two or more each."""

    allowed: bytes | None
    words: tuple[tuple[int, ...], ...]
    thinking: ThinkingBudget | None = None

    def before(self, grammar: bytes) -> bytes:
        """The rules as the engine reads them, and behind them the grammar."""
        allowed = None if self.allowed is None else base64.b64encode(self.allowed).decode()
        head = {"allowed": allowed, "words": self.words, "thinking": self.thinking}
        return json.dumps(head).encode() + b"\n" + grammar


def split(text: bytes) -> tuple[TokenRules | None, bytes]:
    """The rules before a grammar, None where there are none, and the grammar."""
    if not text.startswith(_START):
        return None, text
    head, _, grammar = text.partition(b"\n")
    fields = json.loads(head)
    allowed = None if fields["allowed"] is None else base64.b64decode(fields["allowed"])
    thinking = None
    if fields["thinking"] is not None:
        budget, start, is_open, ends = fields["thinking"]
        thinking = ThinkingBudget(budget, start, is_open, tuple(ends))
    return TokenRules(allowed, tuple(map(tuple, fields["words"])), thinking), grammar


def bits_of(ids: Sequence[int], num_ids: int) -> bytes:
    """A bit for each of ``num_ids`` ids, set for these."""
    bits = bytearray(-(-num_ids // 8))
    for token in ids:
        bits[token >> 3] |= 1 << (token & 7)
    return bytes(bits)
