"""The parser of an answer that is all content, for routes that want every answer as events."""

from __future__ import annotations

from minisgl_fast.parsers.events import PLAIN, Content, Event, Steady


class PlainParser:
    """Content, as it comes."""

    steady: Steady | None = PLAIN

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []
