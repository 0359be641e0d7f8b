"""What parsers make of a model's text, and how they are called.

A parser gets the text of one answer in any pieces and gives events. Rules for every parser:

- Cut-invariant: the deltas of one kind that follow each other, joined, are the same whatever way
  the text was cut. Where the whole text is fed at once, the same code runs.
- Nothing is lost: text that begins like markup and turns out to be none comes out as it was.
  Only markup itself, and white space between calls, is dropped.
- A call is numbered by its order in the answer. ``CallEnd`` says that its arguments are complete;
  a call that was cut off has none, and its arguments are the raw text as far as it came.
- What is held back is no more than what decides whether it is markup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself, before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call's arguments are complete."""

    index: int


Event: TypeAlias = Content | Reasoning | CallStart | CallArguments | CallEnd


class Steady(NamedTuple):
    """What a parser would make of more text: one delta of this kind, the text itself, as long as
    none of these characters is in it. No characters: for good."""

    kind: type[Content] | type[Reasoning]
    characters: str


PLAIN = Steady(Content, "")


class Parser(Protocol):
    """One answer's parser."""

    @property
    def steady(self) -> Steady | None:
        """Which text need not be fed for now, because feeding it would change nothing."""

    def feed(self, text: str) -> list[Event]:
        """The events that this piece completes."""

    def finish(self) -> list[Event]:
        """No text follows: what was held back."""


class ToolParser(Parser, Protocol):
    """A parser of content with tool calls in it."""

    @property
    def openers(self) -> tuple[str, ...]:
        """Markup that begins a call wherever it stands, and so ends a reasoning."""


def join(events: list[Event]) -> list[Event]:
    """The same events with neighbouring deltas of one kind (and call) joined, empty ones left out.

    What is equal for all cuts of a text.
    """
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, (Content, Reasoning, CallArguments)) and not event.text:
            continue
        if (isinstance(event, Content) and isinstance(last, Content)) or (
            isinstance(event, Reasoning) and isinstance(last, Reasoning)
        ):
            joined[-1] = type(event)(last.text + event.text)
        elif (
            isinstance(event, CallArguments)
            and isinstance(last, CallArguments)
            and last.index == event.index
        ):
            joined[-1] = CallArguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined
