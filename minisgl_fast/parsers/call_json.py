"""CallReader: one ``{"name": ..., "arguments": {...}}`` as it comes.

    {"name": "f", "arguments": {"city": "Paris"}, ...}
                               |<-- deltas, raw -->|

Rules: the call has started once its name and the first character of its arguments are known, so
whatever is wrong before that makes it no call. From there on the arguments go out as the model
wrote them, valid or not; they end where quotes and brackets say so. ``parameters`` is the other
name of ``arguments``; other keys are skipped. Arguments that are missing or null are ``{}``, and
JSON in a string is taken out of it.
"""

from __future__ import annotations

import json
from collections.abc import Container

from minisgl_fast.parsers.events import CallArguments, CallEnd, CallStart, Event
from minisgl_fast.parsers.scan import WHITE_SPACE, ValueScanner

_ARGUMENTS = ("arguments", "parameters")
_NO_VALUE = ",:]}<"  # characters that begin none


class CallReader:
    """Reads one call.

    started   CallStart was given: this is a call
    ended     what follows in the text does not belong to it
    raw       all text used before it started, for one that never does
    """

    def __init__(
        self, index: int, names: Container[str] | None = None, *, needs_arguments: bool = False
    ) -> None:
        """``names``: what may be called, None for anything. Both bounds are for formats in which
        any JSON object might be a call."""
        self.index = index
        self.started = False
        self.ended = False
        self.raw = ""
        self._names = names
        self._needs_arguments = needs_arguments
        self._expects = "{"  # then "key", ":", "value", "next", "key", ...
        self._scanner: ValueScanner | None = None  # within a key or a value
        self._pieces: list[str] = []  # of that key or value
        self._key: str | None = None
        self._name: str | None = None
        self._arguments: list[str] | None = None  # pieces not yet given; None: no arguments yet
        self._is_streaming = False  # the value under way is the arguments
        self._is_complete = False  # the arguments are

    @property
    def failed(self) -> bool:
        """Whether this is no call; ``raw`` has its text."""
        return self.ended and not self.started

    def feed(self, text: str) -> tuple[int, list[Event]]:
        """How many characters of the text belong to the call, and the events they make."""
        at = 0
        while at < len(text) and not self.ended:
            if self._scanner is not None:
                at = self._scan(self._scanner, text, at)
            elif text[at] in WHITE_SPACE:
                at += 1
            else:
                at += self._structure(text[at])
        events: list[Event] = []
        if self._name is not None and self._arguments is not None:
            if not self.started:
                self.started = True
                events.append(CallStart(self.index, self._name))
            if self._arguments:
                events.append(CallArguments(self.index, "".join(self._arguments)))
                self._arguments = []
            if self._is_complete:
                self._is_complete = False
                events.append(CallEnd(self.index))
        elif not self.started:
            self.raw += text[:at]
        return at, events

    def _scan(self, scanner: ValueScanner, text: str, start: int) -> int:
        end = scanner.scan(text, start)
        if self._is_streaming and self._arguments is not None:
            self._arguments.append(text[start:end])
        else:
            self._pieces.append(text[start:end])
        if scanner.complete:
            self._scanner = None
            self._end_value()
        elif scanner.broken:
            self.ended = True
        return end

    def _structure(self, char: str) -> int:
        """A character that begins or separates values; returns 1 if it is used up, else 0."""
        is_value = self._expects == "value" and char not in _NO_VALUE
        if is_value or (self._expects == "key" and char == '"'):
            self._scanner = ValueScanner(char)
            self._pieces = []
            if is_value and self._is_new_argument() and char in "{[":
                self._arguments = []
                self._is_streaming = True
            return 0
        if self._expects in ("{", ":") and char == self._expects:
            self._expects = "key" if char == "{" else "value"
            return 1
        if self._expects == "next" and char == ",":
            self._expects = "key"
            return 1
        # The end, or what does not belong here. Behind the arguments no more is needed.
        self.ended = True
        if char != "}" or self._expects not in ("key", "next"):
            return 0
        if self._arguments is None and not self._needs_arguments:
            self._arguments = ["{}"]
            self._is_complete = True
        return 1

    def _is_new_argument(self) -> bool:
        return self._key in _ARGUMENTS and self._arguments is None

    def _end_value(self) -> None:
        raw = "".join(self._pieces)
        if self._expects == "key":
            self._key = _string(raw)
            self._expects = ":"
            return
        self._expects = "next"
        if self._is_streaming:
            self._is_streaming = False
            self._is_complete = True
        elif self._is_new_argument():
            if raw != "null" and not raw.startswith('"'):
                self._fail()
                return
            inner = (_string(raw) or "").strip() or "{}"
            self._arguments = [inner if inner.startswith("{") else raw]
            self._is_complete = True
        elif self._key == "name" and self._name is None:
            self._name = _string(raw) or None
            if self._name is None or (self._names is not None and self._name not in self._names):
                self._fail()

    def _fail(self) -> None:
        self._name = None
        self.ended = True


def _string(raw: str) -> str | None:
    """The text of a JSON string; None if it is none."""
    try:
        value = json.loads(raw, strict=False) if raw.startswith('"') else None
    except ValueError:
        return None
    return value if isinstance(value, str) else None
