"""GptOssParser: the channels of the harmony format, reasoning and tool calls in one.

    <|channel|>analysis<|message|>...<|end|>                                        reasoning
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>                      content

Rules: the header between ``<|start|>`` or ``<|channel|>`` and ``<|message|>`` says what a message
is; its body goes out as it comes. A message to ``functions.NAME`` is a call, one on the channel
``analysis`` reasoning, anything else content. The last end mark stops the model, so it may be
missing. Text outside of messages, and a header that never ends, is content. All marks are special
tokens, so the text must be decoded with those.
"""

from __future__ import annotations

import re

from minisgl_fast.parsers.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    Steady,
)
from minisgl_fast.parsers.scan import WHITE_SPACE, Tags, ValueScanner

START = "<|start|>"
CHANNEL = "<|channel|>"
CONSTRAIN = "<|constrain|>"
MESSAGE = "<|message|>"
END = "<|end|>"
STARTS = (START, CHANNEL)
ENDS = (END, "<|call|>", "<|return|>")
_MARKS = Tags(*STARTS, *ENDS)
MAX_HEADER = 1024  # characters

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"\bto=functions\.([^\s<]+)")


class GptOssParser:
    """One answer."""

    def __init__(self, *, reasoning: bool = True, stream: bool = True, tools: bool = True) -> None:
        """``reasoning``: False gives it as content. ``stream``: False gives the reasoning of a
        message in one event. ``tools``: False gives calls as content."""
        self._has_reasoning = reasoning
        self._stream = stream
        self._has_tools = tools
        self._rest = ""  # not used yet
        self._step = self._read_outside
        self._kind = "content"
        self._unsent: list[str] = []  # reasoning that waits for its end
        self._scanner: ValueScanner | None = None  # of a call's arguments
        self._num_calls = 0

    @property
    def steady(self) -> Steady | None:
        if self._step != self._read_body or self._rest or self._kind == "call":
            return None
        if self._kind == "content":
            return Steady(Content, _MARKS.first)
        return Steady(Reasoning, _MARKS.first) if self._stream else None

    def feed(self, text: str) -> list[Event]:
        self._rest += text
        events: list[Event] = []
        while self._rest and self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        rest, self._rest = self._rest, ""
        if self._step == self._read_body:
            events: list[Event] = []
            self._take(rest, events)
            self._end_body(events)
            return events
        return [Content(rest)] if rest else []

    # States: use up some of the rest; False if it has to wait for more

    def _read_outside(self, events: list[Event]) -> bool:
        text, found = self._next()
        if text:
            events.append(Content(text))
        if found is None:
            return False
        if found in STARTS:
            self._step = self._read_header
        else:
            self._rest = self._rest[len(found) :]
        return True

    def _read_header(self, events: list[Event]) -> bool:
        at = self._rest.find(MESSAGE, 0, MAX_HEADER)
        if at < 0 and len(self._rest) < MAX_HEADER:
            return False
        if at < 0:
            events.append(Content(self._rest[:1]))
            self._rest = self._rest[1:]
            self._step = self._read_outside
            return True
        header = self._rest[:at]
        self._rest = self._rest[at + len(MESSAGE) :]
        channel = _CHANNEL.search(header)
        function = _FUNCTION.search(header)
        if function and self._has_tools:
            self._kind = "call"
            self._scanner = None
            events.append(CallStart(self._num_calls, function.group(1)))
            self._num_calls += 1
        elif channel and channel.group(1) == "analysis" and self._has_reasoning:
            self._kind = "reasoning"
        else:
            self._kind = "content"
        self._step = self._read_body
        return True

    def _read_body(self, events: list[Event]) -> bool:
        text, found = self._next()
        self._take(text, events)
        if found is None:
            return False
        self._end_body(events)
        if found in ENDS:
            self._rest = self._rest[len(found) :]
        self._step = self._read_outside
        return True

    # Parts of them

    def _next(self) -> tuple[str, str | None]:
        """The text up to the next mark, and that mark, which stays in the rest; None if it has not
        come yet."""
        found = _MARKS.find(self._rest)
        if found is None:
            text, self._rest = _MARKS.split_held(self._rest)
            return text, None
        text, self._rest = self._rest[: found[0]], self._rest[found[0] :]
        return text, found[1]

    def _take(self, text: str, events: list[Event]) -> None:
        """The next piece of a body."""
        if not text:
            return
        if self._kind == "content":
            events.append(Content(text))
        elif self._kind == "reasoning":
            if self._stream:
                events.append(Reasoning(text))
            else:
                self._unsent.append(text)
        else:
            events.append(CallArguments(self._num_calls - 1, text))
            if self._scanner is None:
                text = text.lstrip(WHITE_SPACE)
                self._scanner = ValueScanner(text[0]) if text else None
            if self._scanner is not None and not self._scanner.complete:
                self._scanner.scan(text)

    def _end_body(self, events: list[Event]) -> None:
        if self._unsent:
            events.append(Reasoning("".join(self._unsent)))
            self._unsent = []
        if self._kind == "call":
            if self._scanner is None:
                events.append(CallArguments(self._num_calls - 1, "{}"))
            if self._scanner is None or self._scanner.complete:
                events.append(CallEnd(self._num_calls - 1))
        self._kind = "content"
