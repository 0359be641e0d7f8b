"""PythonicParser: ``[f(city="Paris", n=3), g()]`` in place of an answer, as Llama 4 has it.

Rules: the list stands at the beginning of the content, maybe between ``<|python_start|>`` and
``<|python_end|>``; a call is what names a tool of the request and has keyword arguments that are
Python literals (JSON's true, false and null too). Each goes out when it is complete, with its
arguments in JSON: before that nobody knows whether it is one. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Container
from typing import Any

from minisgl_fast.parsers.call_parser import CallParser
from minisgl_fast.parsers.events import (
    PLAIN,
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    Steady,
)
from minisgl_fast.parsers.scan import MAX_HEAD, Tags, split_white

START = "<|python_start|>"
END = "<|python_end|>"
_OPENING = Tags("[", START)
_END = Tags(END)

_CONSTANTS = {"true": True, "false": False, "null": None}
_HEAD = re.compile(r"\s*([A-Za-z_][\w.]*)\s*\(")
_HEAD_SO_FAR = re.compile(r"\s*(?:[A-Za-z_][\w.]*\s*)?")
_MARKS = re.compile(r"[\"'()\[\]{}]")
_IN_STRING = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in ('"', "'")}


class PythonicParser(CallParser):
    """Calls in one answer's content."""

    openers = (START,)

    def __init__(self, names: Container[str]) -> None:
        """``names``: the tools of the request."""
        super().__init__()
        self._names = names
        self._step = self._read_opening
        self._name = ""
        self._at = 0  # how far the call in the rest was scanned
        self._depth = 0
        self._quote = ""

    @property
    def steady(self) -> Steady | None:
        is_text = self._step == self._read_text and not self._rest and self._gate.is_open
        return PLAIN if is_text else None

    def finish(self) -> list[Event]:
        events = self._gate.text(self._head + self._rest)
        self._rest = self._head = ""
        return events + self._gate.finish()

    # States: use up some of the rest; False if it has to wait for more

    def _read_opening(self, events: list[Event]) -> bool:
        white, self._rest = split_white(self._rest)
        self._head += white
        tag = _OPENING.begin(self._rest)
        if tag == "":
            return False
        if tag is None:
            return self._give_up(events)
        self._head += tag
        self._rest = self._rest[len(tag) :]
        if tag == "[":
            self._step = self._read_head
        return True

    def _read_head(self, events: list[Event]) -> bool:
        """A name and a parenthesis."""
        match = _HEAD.match(self._rest, 0, MAX_HEAD)
        if match is None:
            so_far = _HEAD_SO_FAR.match(self._rest)
            if so_far is not None and so_far.end() == len(self._rest) < MAX_HEAD:
                return False
            return self._give_up(events)
        if match.group(1) not in self._names:
            return self._give_up(events)
        self._name = match.group(1)
        self._at = match.end()
        self._depth = 1
        self._quote = ""
        self._step = self._read_call
        return True

    def _read_call(self, events: list[Event]) -> bool:
        """Up to the parenthesis that ends the call."""
        while self._depth:
            pattern = _IN_STRING[self._quote] if self._quote else _MARKS
            match = pattern.search(self._rest, self._at)
            if match is None:
                # A backslash at the end escapes what comes next.
                cut = bool(self._quote) and self._rest.endswith("\\")
                self._at = max(self._at, len(self._rest) - cut)
                return False
            self._at = match.end()
            mark = match.group()
            if self._quote:
                self._quote = "" if mark == self._quote else self._quote
            elif mark in "\"'":
                self._quote = mark
            else:
                self._depth += 1 if mark in "([{" else -1
        arguments = _arguments(self._rest[: self._at])
        if arguments is None:
            return self._give_up(events)
        self._gate.call()
        index = self._num_calls
        self._num_calls += 1
        events += [CallStart(index, self._name), CallArguments(index, arguments), CallEnd(index)]
        self._head = ""
        self._rest = self._rest[self._at :]
        self._step = self._read_separator
        return True

    def _read_separator(self, events: list[Event]) -> bool:
        self._take_white(events)
        if not self._rest:
            return False
        if self._rest[0] == ",":
            self._head = ","
            self._rest = self._rest[1:]
            self._step = self._read_head
        else:
            if self._rest[0] == "]":
                self._gate.call()
                self._rest = self._rest[1:]
            self._step = self._read_end
        return True

    def _read_end(self, events: list[Event]) -> bool:
        if not self._take_end(_END, events):
            return False
        self._step = self._read_text
        return True

    def _read_text(self, events: list[Event]) -> bool:
        events += self._gate.text(self._rest)
        self._rest = ""
        return False

    def _give_up(self, events: list[Event]) -> bool:
        """What looked like calls is text, and so is all that follows."""
        self._rest = self._head + self._rest
        self._head = ""
        self._step = self._read_text
        return True


def _arguments(source: str) -> str | None:
    """The keyword arguments of a call as a JSON object; None if it is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes that Python does not know
            call = ast.parse(source.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        if None in values or len(values) < len(call.keywords):
            return None
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """The value of a literal; ValueError if it is none that JSON has."""
    if isinstance(node, ast.Constant) and isinstance(
        node.value, (str, bool, int, float, type(None))
    ):
        return node.value
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            _key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)
        }
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("no key of a JSON object")
