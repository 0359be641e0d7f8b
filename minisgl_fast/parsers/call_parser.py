"""CallParser: what parsers of calls have in common, whatever the calls look like.

Text comes in, and a state uses up what it can decide on; the rest waits for more. White space
around calls is no content (ContentGate).
"""

from __future__ import annotations

from collections.abc import Callable

from minisgl_fast.parsers.call_json import CallReader
from minisgl_fast.parsers.events import Event
from minisgl_fast.parsers.scan import ContentGate, Tags, split_white


class CallParser:
    """Calls in one answer's content.

    _step   the state: uses up some of the rest; False if it has to wait for more
    _rest   text that is not used yet
    _head   markup before a call that has not started
    """

    _step: Callable[[list[Event]], bool]

    def __init__(self) -> None:
        self._gate = ContentGate()
        self._rest = ""
        self._head = ""
        self._num_calls = 0

    def feed(self, text: str) -> list[Event]:
        self._rest += text
        events: list[Event] = []
        while self._rest and self._step(events):
            pass
        return events

    # Parts of states

    def _take_text(self, tags: Tags, events: list[Event]) -> str | None:
        """Text up to a tag, with which the rest begins then; None if there is none (yet)."""
        found = tags.find(self._rest)
        if found is None:
            text, self._rest = tags.split_held(self._rest)
            events += self._gate.text(text)
            return None
        at, tag = found
        events += self._gate.text(self._rest[:at])
        self._rest = self._rest[at:]
        return tag

    def _take_white(self, events: list[Event]) -> None:
        """White space that stands behind a call, if no text follows."""
        white, self._rest = split_white(self._rest)
        events += self._gate.text(white)

    def _take_end(self, end: Tags, events: list[Event]) -> bool:
        """White space and the tag behind a call, if it is there; False: more text must decide."""
        self._take_white(events)
        tag = end.begin(self._rest)
        if tag:
            self._gate.call()
            self._rest = self._rest[len(tag) :]
        return tag != ""

    def _take_json(self, reader: CallReader, events: list[Event]) -> bool:
        """More of a call in JSON; whether it has ended, or failed."""
        was_started = reader.started
        used, found = reader.feed(self._rest)
        self._rest = self._rest[used:]
        if reader.started and not was_started:
            self._start_call()
        events += found
        return reader.ended

    def _start_call(self) -> None:
        """What looked like a call is one."""
        self._gate.call()
        self._head = ""
        self._num_calls += 1
