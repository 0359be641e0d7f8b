"""MistralParser: what follows ``[TOOL_CALLS]``, in the forms of Mistral's tokenizers.

    [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]      up to v7
    [TOOL_CALLS]f[CALL_ID]123456789[ARGS]{...}                 v11, each call with a tag of its own
    [TOOL_CALLS]f[ARGS]{...}   [TOOL_CALLS]f{...}              v13 and variants

Rules: a call starts with its name and the first character of its arguments; before that anything
wrong makes it text. The tag is a special token, so the text must be decoded with those.
"""

from __future__ import annotations

import re

from minisgl_fast.parsers.call_json import CallReader
from minisgl_fast.parsers.call_parser import CallParser
from minisgl_fast.parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Steady
from minisgl_fast.parsers.scan import MAX_HEAD, Tags, ValueScanner, split_white

TAG = "[TOOL_CALLS]"
_TAG = Tags(TAG)

_NAME = re.compile(r"([\w.\-/:]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\])?\s*(?=\{)")
# A head of a call that may still become one.
_HEAD = re.compile(r"[\w.\-/:\[\]\s]*")


class MistralParser(CallParser):
    """Calls in one answer's content."""

    openers = (TAG,)

    def __init__(self) -> None:
        super().__init__()
        self._step = self._read_text
        self._reader = CallReader(0)
        self._scanner: ValueScanner | None = None
        self._is_in_array = False

    @property
    def steady(self) -> Steady | None:
        if self._step != self._read_text or self._rest or not self._gate.is_open:
            return None
        return Steady(Content, _TAG.first)

    def finish(self) -> list[Event]:
        raw = ""
        if self._step == self._read_object and not self._reader.started:
            raw = self._reader.raw
        events = self._gate.text(self._head + raw + self._rest)
        self._rest = self._head = ""
        return events + self._gate.finish()

    # States: use up some of the rest; False if it has to wait for more

    def _read_text(self, events: list[Event]) -> bool:
        if self._take_text(_TAG, events) is None:
            return False
        self._rest = self._rest[len(TAG) :]
        self._head = TAG
        self._step = self._read_opening
        return True

    def _read_opening(self, events: list[Event]) -> bool:
        """Behind the tag: an array, an object, or a name."""
        white, self._rest = split_white(self._rest)
        self._head += white
        if not self._rest:
            return False
        if self._rest[0] in "[{":
            self._is_in_array = self._rest[0] == "["
            if self._is_in_array:
                self._head += "["
                self._rest = self._rest[1:]
            self._begin_object()
            return True
        match = _NAME.match(self._rest, 0, MAX_HEAD)
        if match is None:
            head = _HEAD.match(self._rest)
            if head is not None and head.end() == len(self._rest) < MAX_HEAD:
                return False
            return self._give_up(events)
        self._rest = self._rest[match.end() :]
        self._start_call()
        events.append(CallStart(self._num_calls - 1, match.group(1)))
        self._scanner = ValueScanner("{")
        self._step = self._read_arguments
        return True

    def _read_arguments(self, events: list[Event]) -> bool:
        """The bare arguments behind a name."""
        assert self._scanner is not None
        end = self._scanner.scan(self._rest)
        index = self._num_calls - 1
        if end:
            events.append(CallArguments(index, self._rest[:end]))
        self._rest = self._rest[end:]
        if self._scanner.complete:
            events.append(CallEnd(index))
        if self._scanner.complete or self._scanner.broken:
            self._step = self._read_text
            return True
        return False

    def _read_object(self, events: list[Event]) -> bool:
        """A call in JSON."""
        reader = self._reader
        if not self._take_json(reader, events):
            return False
        if reader.failed:
            self._rest = reader.raw + self._rest
            return self._give_up(events)
        self._step = self._read_separator if self._is_in_array else self._read_text
        return True

    def _read_separator(self, events: list[Event]) -> bool:
        """Between the calls of an array."""
        self._take_white(events)
        if not self._rest:
            return False
        if self._rest[0] == ",":
            self._head = ","
            self._rest = self._rest[1:]
            self._begin_object()
        else:
            if self._rest[0] == "]":
                self._gate.call()
                self._rest = self._rest[1:]
            self._step = self._read_text
        return True

    # Parts of them

    def _begin_object(self) -> None:
        self._reader = CallReader(self._num_calls)
        self._step = self._read_object

    def _give_up(self, events: list[Event]) -> bool:
        """What looked like a call is text."""
        events += self._gate.text(self._head)
        self._head = ""
        self._step = self._read_text
        return True
