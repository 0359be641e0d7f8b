"""RuledGrammar: token rules (token_rules.py) on top of a grammar, or of none.

Rules: the last token of a word may not come where those before it were the last to come; only
generated tokens count, as in vLLM. A token that the rules ban never comes, an end of text included.
A reasoning whose budget is spent goes on with its end alone, as soon as all else allows that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minisgl_fast.token_rules import ThinkingBudget, TokenRules, bits_of

if TYPE_CHECKING:
    from minisgl_fast.engine.grammar import Grammar, MaskRow


class RuledGrammar:
    """``Grammar`` (grammar.py) that the rules cut down; ``grammar`` None allows everything."""

    def __init__(
        self,
        rules: TokenRules,
        grammar: Grammar | None,
        num_ids: int,
        is_blank: Callable[[int], bool] = lambda token: False,
    ) -> None:
        """``num_ids``: of the vocabulary, whose mask has 32 bits to the word. ``is_blank``: whether
        a token is white space."""
        num_bytes = -(-num_ids // 32) * 4
        allowed = bits_of(range(num_ids), num_ids) if rules.allowed is None else rules.allowed
        self.is_accepting = False
        self.has_ended = False
        self._grammar = grammar
        self._allowed = allowed[:num_bytes].ljust(num_bytes, b"\0")
        self._words = [(list(word[:-1]), word[-1]) for word in rules.words]
        self._num_last = max((len(before) for before, _ in self._words), default=0)
        self._last: list[int] = []
        self._thinking = None if rules.thinking is None else Thinking(rules.thinking, is_blank)

    def advance(self, token: int) -> bool:
        if self._num_last:
            self._last = [*self._last, token][-self._num_last :]
        if self._thinking is not None:
            self._thinking.advance(token)
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
        if self._thinking is not None and self._thinking.is_spent:
            leave_only(data, self._thinking.end)
        avoid(data, avoided)
        self.has_ended = not any(data)


class Thinking:
    """How much of a ThinkingBudget is spent.

    As for the parser (parsers/reasoning.py), only white space may stand before a reasoning, and
    there is one at most.
    """

    def __init__(self, rule: ThinkingBudget, is_blank: Callable[[int], bool]) -> None:
        self.end = rule.ends[0]
        self._rule = rule
        self._is_blank = is_blank
        self._state = "open" if rule.is_open else "before"
        self._num_tokens = 0
        self._is_first = True

    @property
    def is_spent(self) -> bool:
        """Whether its end has to come now."""
        return self._state == "open" and self._num_tokens >= self._rule.budget

    def advance(self, token: int) -> None:
        is_start = token == self._rule.start
        if self._state == "before":
            if is_start:
                self._state = "open"
            elif not self._is_blank(token):
                self._state = "over"
        elif token in self._rule.ends:
            self._state = "over"
        elif not (is_start and self._is_first):  # a start that comes all the same is a mark
            self._num_tokens += 1
        self._is_first = False


def leave_only(mask: memoryview, token: int) -> None:
    """Leave out all but one id, unless that may not come."""
    if token >> 3 < len(mask) and mask[token >> 3] >> (token & 7) & 1:
        mask[:] = bytes(len(mask))
        mask[token >> 3] = 1 << (token & 7)


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
