"""Stop patterns: from the text of a regular expression to the program that stop_regex.pyx runs.

The language is what a non-backtracking matcher can do in one pass: literals, ``.``, classes,
groups, ``|``, greedy and lazy repetition (the same here), ``\\d \\w \\s`` and the usual escapes, in
the syntax of Python's ``re``, with the flags (?i) and (?s) at the start. Anchors, look-around and
back-references are refused by name.

The program is Thompson's automaton (CACM 11, 1968) as instructions (op, x, y), one list for all
patterns of a request. Rules: its size is bounded while it is made, so neither a nested repetition
nor a long class costs more than the bound; a pattern that matches the empty text is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import NamedTuple, TypeAlias

from minisgl_fast.errors import RequestError

MAX_PATTERNS = 32
MAX_PATTERN_BYTES = 256
MAX_INSTRUCTIONS = 1024
MAX_REPEAT = 1000
MAX_DEPTH = 32

CHAR, SPLIT, MATCH = range(3)  # CHAR: x is a class; SPLIT: go on at x and at y; MATCH: x a pattern
WORD, DIGIT, SPACE = 1, 2, 4

_LAST = 0x10FFFF
_ASCII = (1 << 128) - 1
_CATEGORIES = {
    "w": (WORD, sum(1 << c for c in range(128) if chr(c).isalnum() or c == 0x5F)),
    "d": (DIGIT, sum(1 << c for c in range(0x30, 0x3A))),
    "s": (SPACE, sum(1 << c for c in range(128) if chr(c).isspace())),
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_UPPER = sum(1 << c for c in range(0x41, 0x5B))
_LOWER = _UPPER << 32


class CharClass(NamedTuple):
    """``ascii``: bit c says whether character c belongs. Beyond ASCII a character belongs if it is
    in a range, or in one of ``categories``, or not in one of ``without``; ``negated`` turns it
    round; with ``folds`` its lower and upper case count as well."""

    ascii: int
    ranges: tuple[tuple[int, int], ...] = ()
    categories: int = 0
    without: tuple[int, ...] = ()
    negated: bool = False
    folds: bool = False


class Repeat(NamedTuple):
    node: Node
    low: int
    high: int | None


class Series(NamedTuple):
    nodes: list[Node]


class Choice(NamedTuple):
    nodes: list[Node]


Node: TypeAlias = "CharClass | Repeat | Series | Choice"


@dataclass(slots=True)
class Program:
    """``code``: instructions, from 0 on; ``classes``: what CHAR refers to."""

    code: list[tuple[int, int, int]] = field(default_factory=list)
    classes: list[CharClass] = field(default_factory=list)


def compile_patterns(patterns: Sequence[str]) -> Program:
    """One program that finds any of the patterns. RequestError(param="stop_regex") if it cannot."""
    if len(patterns) > MAX_PATTERNS:
        raise _error(f"must hold at most {MAX_PATTERNS} patterns, got {len(patterns)}.")
    builder = _Builder()
    for index, pattern in enumerate(patterns):
        if not 0 < len(pattern.encode("utf-8", "surrogatepass")) <= MAX_PATTERN_BYTES:
            raise _error(f"must have patterns of 1 to {MAX_PATTERN_BYTES} bytes.")
        builder.add(_Parser(pattern).parse(), index, is_last=index == len(patterns) - 1)
    return builder.program


def _error(what: str) -> RequestError:
    return RequestError(f"stop_regex {what}", param="stop_regex")


class _Builder:
    """Emits the instructions of syntax trees."""

    def __init__(self) -> None:
        self.program = Program()
        self._class_index: dict[CharClass, int] = {}

    def add(self, tree: Node, index: int, *, is_last: bool) -> None:
        code = self.program.code
        fork = -1 if is_last else self._emit(SPLIT, len(code) + 1)
        start = len(code)
        self._node(tree)
        self._emit(MATCH, index)
        if _is_nullable(code, start):
            raise _error("must not match the empty text.")
        if fork >= 0:
            code[fork] = (SPLIT, fork + 1, len(code))

    def _emit(self, op: int, x: int, y: int = 0) -> int:
        code = self.program.code
        if len(code) >= MAX_INSTRUCTIONS:
            raise _error(f"is too complex: more than {MAX_INSTRUCTIONS} states in all.")
        code.append((op, x, y))
        return len(code) - 1

    def _node(self, node: Node) -> None:
        code = self.program.code
        if isinstance(node, CharClass):
            if node not in self._class_index:
                self._class_index[node] = len(self.program.classes)
                self.program.classes.append(node)
            self._emit(CHAR, self._class_index[node])
        elif isinstance(node, Series):
            for child in node.nodes:
                self._node(child)
        elif isinstance(node, Choice):
            jumps = []
            for child in node.nodes[:-1]:
                fork = self._emit(SPLIT, len(code) + 1)
                self._node(child)
                jumps.append(self._emit(SPLIT, 0))
                code[fork] = (SPLIT, fork + 1, len(code))
            self._node(node.nodes[-1])
            for jump in jumps:
                code[jump] = (SPLIT, len(code), len(code))
        else:
            self._repeat(node)

    def _repeat(self, node: Repeat) -> None:
        code = self.program.code
        start = len(code)
        for _ in range(node.low):
            self._node(node.node)
            if len(code) == start:  # the empty text, however often
                return
        if node.high is None:
            fork = self._emit(SPLIT, len(code) + 1)
            self._node(node.node)
            self._emit(SPLIT, fork, fork)
            code[fork] = (SPLIT, fork + 1, len(code))
            return
        forks = []
        for _ in range(node.high - node.low):
            forks.append(self._emit(SPLIT, len(code) + 1))
            self._node(node.node)
        for fork in forks:
            code[fork] = (SPLIT, fork + 1, len(code))


def _is_nullable(code: list[tuple[int, int, int]], start: int) -> bool:
    """Whether the end is reached from ``start`` without a character."""
    seen: set[int] = set()
    todo = [start]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        op, x, y = code[at]
        if op == MATCH:
            return True
        if op == SPLIT:
            todo += (x, y)
    return False


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0
        self._folds = self._dot_is_all = False

    def parse(self) -> Node:
        if self._text.startswith("(?"):
            end = 2
            while self._text[end : end + 1].isalpha():
                end += 1
            flags = self._text[2:end]
            if flags and self._text[end : end + 1] == ")":
                if set(flags) - set("isu"):
                    raise self._refused(f"flag {flags!r}; only i and s are known")
                self._folds = "i" in flags
                self._dot_is_all = "s" in flags
                self._at = end + 1
        tree = self._choice()
        if self._at < len(self._text):
            raise self._malformed("unbalanced )")
        return tree

    def _choice(self) -> Node:
        nodes = [self._sequence()]
        while self._take("|"):
            nodes.append(self._sequence())
        return nodes[0] if len(nodes) == 1 else Choice(nodes)

    def _sequence(self) -> Node:
        nodes: list[Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            nodes.append(self._repetition())
        return nodes[0] if len(nodes) == 1 else Series(nodes)

    def _repetition(self) -> Node:
        node = self._atom()
        bounds = self._bounds()
        if bounds is None:
            return node
        if self._take("+"):
            raise self._refused("possessive repetition")
        self._take("?")
        if self._bounds() is not None:
            raise self._malformed("multiple repeat")
        return Repeat(node, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if self._peek() != "{":
            return None
        inner, brace, _ = self._text[self._at + 1 :].partition("}")
        low, comma, high = inner.partition(",")
        digits = (low + high).isascii() and all(part.isdigit() or not part for part in (low, high))
        if not brace or not digits or not (low or (comma and high)):
            return None  # a plain brace, as in re
        self._at += len(inner) + 2
        first = int(low or "0")
        last = (int(high) if high else None) if comma else first
        if first > MAX_REPEAT or (last or 0) > MAX_REPEAT:
            raise self._refused(f"more than {MAX_REPEAT} repetitions")
        if last is not None and last < first:
            raise self._malformed("min repeat greater than max repeat")
        return first, last

    def _atom(self) -> Node:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._set()
        if character == ".":
            newline = 0 if self._dot_is_all else 1 << 10
            return CharClass(_ASCII & ~newline, ((0x80, _LAST),))
        if character == "\\":
            return self._escape(in_set=False)
        if character in "^$":
            raise self._refused(f"the anchor {character}")
        if character in "*+?":
            raise self._malformed("nothing to repeat")
        return self._literal(character)

    def _group(self) -> Node:
        if self._take("?"):
            if self._take("P<"):
                name, end, _ = self._text[self._at :].partition(">")
                if not end or not name.isidentifier():
                    raise self._malformed("bad group name")
                self._at += len(name) + 1
            elif not self._take(":"):
                raise self._refused("(?" + self._text[self._at : self._at + 2])
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refused(f"groups deeper than {MAX_DEPTH}")
        node = self._choice()
        self._depth -= 1
        if not self._take(")"):
            raise self._malformed("missing )")
        return node

    def _set(self) -> CharClass:
        negated = self._take("^")
        parts: list[CharClass] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._set_item()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._set_item()
                if isinstance(low, CharClass) or isinstance(high, CharClass) or low > high:
                    raise self._malformed("bad character range")
                parts.append(self._range(ord(low), ord(high)))
            else:
                parts.append(low if isinstance(low, CharClass) else self._literal(low))
        self._at += 1
        bits = 0
        for part in parts:
            bits |= part.ascii
        return CharClass(
            _ASCII & ~bits if negated else bits,
            tuple(pair for part in parts for pair in part.ranges),
            reduce(or_, (part.categories for part in parts)),
            tuple(kind for part in parts for kind in part.without),
            negated,
            self._folds,
        )

    def _set_item(self) -> str | CharClass:
        character = self._next()
        if character != "\\":
            return character
        escaped = self._escape(in_set=True)
        pair = escaped.ranges[0] if len(escaped.ranges) == 1 else None
        is_one = pair is not None and pair[0] == pair[1] and not escaped.without
        return chr(pair[0]) if is_one and pair is not None else escaped

    def _escape(self, *, in_set: bool) -> CharClass:
        letter = self._next()
        if letter.lower() in _CATEGORIES:
            kind, bits = _CATEGORIES[letter.lower()]
            if letter.islower():
                return CharClass(bits, (), kind)
            return CharClass(_ASCII & ~bits, (), 0, (kind,))
        if letter in _HEX_DIGITS:
            digits = self._text[self._at : self._at + _HEX_DIGITS[letter]]
            try:
                code = int(digits, 16) if digits.isalnum() else -1
            except ValueError:
                code = -1
            if len(digits) != _HEX_DIGITS[letter] or not 0 <= code <= _LAST:
                raise self._malformed(f"bad escape \\{letter}")
            self._at += len(digits)
            return self._literal(chr(code))
        if letter in _ESCAPES:
            return self._literal(_ESCAPES[letter])
        if letter == "b" and in_set:
            return self._literal("\b")
        if letter == "0":
            return self._literal("\0")
        if letter.isascii() and letter.isalnum():
            raise self._refused(f"\\{letter}")
        return self._literal(letter)

    def _literal(self, character: str) -> CharClass:
        return self._range(ord(character), ord(character))

    def _range(self, low: int, high: int) -> CharClass:
        """Ranges keep their ASCII part too: what is folded is looked up in them."""
        bits = ((1 << (min(high, 127) + 1)) - (1 << low)) if low < 128 else 0
        if self._folds:
            bits |= (bits & _UPPER) << 32 | (bits & _LOWER) >> 32
        return CharClass(bits, ((low, high),), folds=self._folds)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise self._malformed("unexpected end")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        if found:
            self._at += len(text)
        return found

    def _malformed(self, why: str) -> RequestError:
        return _error(f"{self._text[:80]!r} is not a regular expression: {why}.")

    def _refused(self, what: str) -> RequestError:
        return _error(f"{self._text[:80]!r}: {what} is not supported here.")
