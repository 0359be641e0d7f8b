"""RuledGrammar: token rules (token_rules.py) on top of a grammar, or of none.

Rules: the last token of a word may not come where those before it were the last to come; only
generated tokens count, as in vLLM. A token that the rules ban never comes, an end of text included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minisgl_fast.token_rules import TokenRules, bits_of

if TYPE_CHECKING:
    from minisgl_fast.engine.grammar import Grammar, MaskRow


class RuledGrammar:
    """``Grammar`` (grammar.py) that the rules cut down; ``grammar`` None allows everything."""

    def __init__(self, rules: TokenRules, grammar: Grammar | None, num_ids: int) -> None:
        """``num_ids``: of the vocabulary, whose mask has 32 bits to the word."""
        num_bytes = -(-num_ids // 32) * 4
        allowed = bits_of(range(num_ids), num_ids) if rules.allowed is None else rules.allowed
        self.is_accepting = False
        self.has_ended = False
        self._grammar = grammar
        self._allowed = allowed[:num_bytes].ljust(num_bytes, b"\0")
        self._words = [(list(word[:-1]), word[-1]) for word in rules.words]
        self._num_last = max((len(before) for before, _ in self._words), default=0)
        self._last: list[int] = []

    def advance(self, token: int) -> bool:
        if self._num_last:
            self._last = [*self._last, token][-self._num_last :]
        return self._grammar is None or self._grammar.advance(token)

    def fill_mask(self, row: MaskRow, avoided: Sequence[int]) -> None:
        data = row.data[: len(self._allowed)]
        if self._grammar is None:
            data[:] = self._allowed
        else:
            self._grammar.fill_mask(row, ())
            if self._grammar.has_ended:
                self.has_ended, self.is_accepting = True, self._grammar.is_accepting
                return
            both = int.from_bytes(data, "little") & int.from_bytes(self._allowed, "little")
            data[:] = both.to_bytes(len(data), "little")
        for before, last in self._words:
            if self._last[-len(before) :] == before:
                clear(data, last)
        avoid(data, avoided)
        self.has_ended = not any(data)


def avoid(mask: memoryview, avoided: Sequence[int]) -> None:
    """Leave out the ``avoided`` ids, unless nothing else may come."""
    if not avoided:
        return
    before = mask.tobytes()
    for token in avoided:
        clear(mask, token)
    if not any(mask):
        mask[:] = before


def clear(mask: memoryview, token: int) -> None:
    if token >> 3 < len(mask):
        mask[token >> 3] &= ~(1 << (token & 7)) & 0xFF
