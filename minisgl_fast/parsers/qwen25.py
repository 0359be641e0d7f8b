"""Qwen25Parser: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, as Qwen 2.5, Qwen3 and
Hermes models write calls.

Rules: a call is what has the tag and a readable head; white space may stand anywhere between tag
and JSON. A missing end tag, or a missing last brace, ends nothing but the call. Text before,
between and behind calls is content.
"""

from __future__ import annotations

from minisgl_fast.parsers.call_json import CallReader
from minisgl_fast.parsers.events import Content, Event, Steady
from minisgl_fast.parsers.scan import ContentGate, Tags, split_white

START = "<tool_call>"
END = "</tool_call>"
_START = Tags(START)
_END = Tags(END)


class Qwen25Parser:
    """Calls in one answer's content."""

    openers = (START,)

    def __init__(self) -> None:
        self._gate = ContentGate()
        self._rest = ""  # not used yet
        self._reader: CallReader | None = None
        self._num_calls = 0
        self._is_behind_call = False  # an end tag may come

    @property
    def steady(self) -> Steady | None:
        if self._reader is not None or self._is_behind_call or self._rest or not self._gate.is_open:
            return None
        return Steady(Content, _START.first)

    def feed(self, text: str) -> list[Event]:
        self._rest += text
        events: list[Event] = []
        while self._rest and self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._reader is not None and not self._reader.started:
            events += self._gate.text(START + self._reader.raw)
        events += self._gate.text(self._rest)
        self._rest = ""
        return events + self._gate.finish()

    def _step(self, events: list[Event]) -> bool:
        """Use up some of the rest; False if it has to wait for more."""
        if self._reader is not None:
            return self._read_call(self._reader, events)
        if self._is_behind_call:
            white, self._rest = split_white(self._rest)
            events += self._gate.text(white)
            tag = _END.begin(self._rest)
            if tag == "":
                return False
            self._is_behind_call = False
            if tag:
                self._gate.call()
                self._rest = self._rest[len(tag) :]
            return True
        found = _START.find(self._rest)
        if found is None:
            text, self._rest = _START.split_held(self._rest)
            events += self._gate.text(text)
            return False
        events += self._gate.text(self._rest[: found[0]])
        self._rest = self._rest[found[0] + len(START) :]
        self._reader = CallReader(self._num_calls)
        return True

    def _read_call(self, reader: CallReader, events: list[Event]) -> bool:
        was_started = reader.started
        used, found = reader.feed(self._rest)
        self._rest = self._rest[used:]
        if reader.started and not was_started:
            self._gate.call()
            self._num_calls += 1
        events += found
        if reader.ended:
            self._reader = None
            if reader.failed:
                events += self._gate.text(START)
                self._rest = reader.raw + self._rest
            else:
                self._is_behind_call = True
        return reader.ended
