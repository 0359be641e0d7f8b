"""What the parsers share: tags in text, white space around calls, the extent of JSON values.

Rules: pieces may be cut anywhere, so everything here either decides or says how much of the end
must wait. What was looked at is not looked at again but for a bounded end, so time is linear in
the text.
"""

from __future__ import annotations

import re
from functools import lru_cache

from minisgl_fast.parsers.events import Content, Event

WHITE_SPACE = " \t\r\n"
MAX_HEAD = 512  # characters that name a call; beyond them it is none

_IN_STRING = re.compile(r'["\\]')
_IN_CONTAINER = re.compile(r'["{}\[\]<]')
_BEHIND_SCALAR = re.compile(r'[\s,:{}\[\]"<]')


class Tags:
    """Some tags that are looked for together."""

    def __init__(self, *tags: str) -> None:
        longest_first = sorted(tags, key=len, reverse=True)
        beginnings = {tag[:length] for tag in tags for length in range(1, len(tag))}
        self._tags = longest_first
        self._whole = re.compile("|".join(map(re.escape, longest_first)))
        self._cut = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(beginnings)))})\Z")
        self._longest = len(longest_first[0])
        self.first = "".join({tag[0]: None for tag in longest_first})  # characters of the tags

    def find(self, text: str) -> tuple[int, str] | None:
        """The first tag in the text and its position, the longest of those at one position."""
        match = self._whole.search(text)
        return None if match is None else (match.start(), match.group())

    def split_held(self, text: str) -> tuple[str, str]:
        """A text without a tag in front of and from where a tag may have begun at its end."""
        match = self._cut.search(text, max(len(text) - self._longest + 1, 0))
        return (text, "") if match is None else (text[: match.start()], match.group())

    def begin(self, text: str) -> str | None:
        """The tag that the text begins with: "" if more text must decide, None if there is none."""
        for tag in self._tags:
            if text.startswith(tag):
                return tag
        return "" if any(tag.startswith(text) for tag in self._tags) else None


@lru_cache(maxsize=64)
def tags(*names: str) -> Tags:
    """Tags, made once."""
    return Tags(*names)


def split_white(text: str) -> tuple[str, str]:
    """White space at the beginning, and what follows it."""
    rest = text.lstrip(WHITE_SPACE)
    return text[: len(text) - len(rest)], rest


class ContentGate:
    """Lets content through, but holds white space that may only stand around calls.

    White space before the first text, and behind a call, goes out with the text that follows; it
    is dropped if a call follows, or nothing at all behind a call.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_holding = True
        self._after_call = False

    @property
    def is_open(self) -> bool:
        """Whether all text goes through."""
        return not self._is_holding

    def text(self, text: str) -> list[Event]:
        """Content, or nothing yet."""
        if not self._is_holding:
            return [Content(text)] if text else []
        if not text.strip(WHITE_SPACE):
            self._held += text
            return []
        text = self._held + text
        self._held = ""
        self._is_holding = False
        return [Content(text)]

    def call(self) -> None:
        """A call begins or ends here."""
        self._held = ""
        self._is_holding = self._after_call = True

    def finish(self) -> list[Event]:
        """What is held, if it belongs to no call."""
        held, self._held = self._held, ""
        return [Content(held)] if held and not self._after_call else []


class ValueScanner:
    """Finds the end of one JSON value in pieces of text, by its quotes and brackets alone.

    ``complete``: the end was found. ``broken``: a ``<`` outside a string, which no JSON has. Both
    stop the scan; the text from there on is not used.
    """

    __slots__ = ("_depth", "_escaped", "_in_string", "_is_scalar", "broken", "complete")

    def __init__(self, first: str) -> None:
        """``first``: the value's first character, which is also the first to be scanned."""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._is_scalar = first not in '"{['
        self.complete = False
        self.broken = False

    def scan(self, text: str, start: int = 0) -> int:
        """Go on from ``start``; returns the position behind what belongs to the value."""
        if self._is_scalar:
            match = _BEHIND_SCALAR.search(text, start)
            self.complete = match is not None
            return match.start() if match else len(text)
        at = start
        while at < len(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                    at += 1
                    continue
                match = _IN_STRING.search(text, at)
                if match is None:
                    return len(text)
                at = match.end()
                if match.group() == "\\":
                    self._escaped = True
                    continue
                self._in_string = False
            else:
                match = _IN_CONTAINER.search(text, at)
                if match is None:
                    return len(text)
                if match.group() == "<":
                    self.broken = True
                    return match.start()
                at = match.end()
                if match.group() == '"':
                    self._in_string = True
                    continue
                self._depth += 1 if match.group() in "{[" else -1
            if self._depth == 0:
                self.complete = True
                return at
        return at
