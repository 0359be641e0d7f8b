"""Llama3Parser: ``{"name": ..., "parameters": {...}}`` in place of an answer, as Llama 3 has it.

Rules: a call stands at the beginning of the content or behind ``<|python_tag|>``; several follow
each other, with ``;`` or white space between. Any JSON object may be an answer, so a call is only
what names a tool of the request and has arguments.
"""

from __future__ import annotations

from collections.abc import Container

from minisgl_fast.parsers.call_json import CallReader
from minisgl_fast.parsers.call_parser import CallParser
from minisgl_fast.parsers.events import Content, Event, Steady
from minisgl_fast.parsers.scan import WHITE_SPACE, Tags, split_white

TAG = "<|python_tag|>"
_TAG = Tags(TAG)
_TAG_OR_SEMICOLON = Tags(TAG, ";")


class Llama3Parser(CallParser):
    """Calls in one answer's content."""

    openers = (TAG,)

    def __init__(self, names: Container[str]) -> None:
        """``names``: the tools of the request."""
        super().__init__()
        self._names = names
        self._may_begin = True  # here a call may begin
        self._reader: CallReader | None = None

    @property
    def steady(self) -> Steady | None:
        if self._reader is not None or self._may_begin or self._rest or not self._gate.is_open:
            return None
        return Steady(Content, _TAG.first)

    def finish(self) -> list[Event]:
        events: list[Event] = []
        raw = "" if self._reader is None or self._reader.started else self._reader.raw
        events += self._gate.text(self._head + raw + self._rest)
        self._rest = self._head = ""
        return events + self._gate.finish()

    def _step(self, events: list[Event]) -> bool:
        """Use up some of the rest; False if it has to wait for more."""
        if self._reader is not None:
            return self._read_call(self._reader, events)
        if self._may_begin:
            return self._read_opening(events)
        self._may_begin = self._take_text(_TAG, events) is not None
        return self._may_begin

    def _read_opening(self, events: list[Event]) -> bool:
        """White space, a semicolon behind a call, the tag; then the object or something else."""
        white, self._rest = split_white(self._rest)
        self._head += white
        marks = _TAG
        if self._num_calls and not self._head.strip(WHITE_SPACE):
            marks = _TAG_OR_SEMICOLON
        tag = marks.begin(self._rest)
        if tag == "":
            return False
        if tag:
            self._head += tag
            self._rest = self._rest[len(tag) :]
        elif self._rest[0] == "{":
            self._may_begin = False
            self._reader = CallReader(self._num_calls, self._names, needs_arguments=True)
        else:
            self._pass(events)
        return True

    def _pass(self, events: list[Event]) -> None:
        """What looked like a call is text, up to a tag behind its first character."""
        events += self._gate.text(self._head + self._rest[:1])
        self._head = ""
        self._rest = self._rest[1:]
        self._may_begin = False

    def _read_call(self, reader: CallReader, events: list[Event]) -> bool:
        if not self._take_json(reader, events):
            return False
        self._reader = None
        if reader.failed:
            self._rest = reader.raw + self._rest
            self._pass(events)
        else:
            self._may_begin = True
        return True
