"""Qwen25Parser: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, as Qwen 2.5, Qwen3 and
Hermes models write calls.

Rules: a call is what has the tag and a readable head; white space may stand anywhere between tag
and JSON. A missing end tag, or a missing last brace, ends nothing but the call. Text before,
between and behind calls is content.
"""

from __future__ import annotations

from minisgl_fast.parsers.call_json import CallReader
from minisgl_fast.parsers.call_parser import CallParser
from minisgl_fast.parsers.events import Content, Event, Steady
from minisgl_fast.parsers.scan import Tags

START = "<tool_call>"
END = "</tool_call>"
_START = Tags(START)
_END = Tags(END)


class Qwen25Parser(CallParser):
    """Calls in one answer's content."""

    openers = (START,)

    def __init__(self) -> None:
        super().__init__()
        self._reader: CallReader | None = None
        self._is_behind_call = False  # an end tag may come

    @property
    def steady(self) -> Steady | None:
        if self._reader is not None or self._is_behind_call or self._rest or not self._gate.is_open:
            return None
        return Steady(Content, _START.first)

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
            self._is_behind_call = not self._take_end(_END, events)
            return not self._is_behind_call
        if self._take_text(_START, events) is None:
            return False
        self._rest = self._rest[len(START) :]
        self._reader = CallReader(self._num_calls)
        return True

    def _read_call(self, reader: CallReader, events: list[Event]) -> bool:
        if not self._take_json(reader, events):
            return False
        self._reader = None
        if reader.failed:
            events += self._gate.text(START)
            self._rest = reader.raw + self._rest
        else:
            self._is_behind_call = True
        return True
