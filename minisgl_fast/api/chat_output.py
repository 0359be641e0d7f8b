"""A chat choice's text, through a parser, into the events of a stream or into a message.

``ChatOutputs`` says whether the answers to a request must be taken apart; ``ChatOutput`` does it,
and the route's ``ChatWriter`` turns what it finds into bytes.

Rules: both forms come from the same events, so a stream joined is the message. A call has an id
from its first event on; its arguments are text as the model wrote it. Reasoning that the client
does not want is dropped, and so are calls beyond ``max_calls``.
"""

from __future__ import annotations

import secrets
import string
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol, TypeAlias

import orjson

from minisgl_fast.api.openai_request import ChatRequest
from minisgl_fast.api.response_format import ResponseFormat
from minisgl_fast.errors import RequestError
from minisgl_fast.parsers.events import (
    PLAIN,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Parser,
    Reasoning,
    join,
)
from minisgl_fast.parsers.plain import PlainParser
from minisgl_fast.parsers.select import Formats
from minisgl_fast.text.tokenizer import Tokenizer

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class OutputRules:
    """What a request and its model make of an answer.

    reasoning    answers have a ``reasoning_content``
    max_calls    how many calls an answer may have, None for any number
    short_ids    ids of calls have nine characters, as Mistral's templates demand
    end_tokens   ids of the tokens that end a reasoning, empty if the tag is not one token
    """

    reasoning: bool
    max_calls: int | None = None
    short_ids: bool = False
    end_tokens: tuple[int, ...] = ()


@dataclass(slots=True)
class Call:
    """A tool call of an answer, as far as it came."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)
    is_complete: bool = False

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    def json_object(self) -> bytes:
        """The arguments on one line; {} where they are no JSON object, as when it was cut off."""
        try:
            value = orjson.loads(self.arguments)
        except orjson.JSONDecodeError:
            value = None
        return orjson.dumps(value if isinstance(value, dict) else {})


@dataclass(slots=True)
class Text:
    """A run of content or of reasoning."""

    kind: type[Content] | type[Reasoning]
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class ChatWriter(Protocol):
    """How a route writes one choice: the events of a stream, or the message of a whole answer.

    Every event is given to it, in order, also where nothing is streamed.
    """

    @property
    def call_id_prefix(self) -> str: ...

    def lane(self, kind: type[Content] | type[Reasoning]) -> tuple[bytes, bytes]:
        """What stands before and behind more JSON-escaped text of this kind, which was the last
        one to come. Both empty where each text has to be given."""

    def text(self, kind: type[Content] | type[Reasoning], text: str) -> bytes: ...
    def call_start(self, index: int, call: Call) -> bytes: ...
    def call_arguments(self, index: int, text: str) -> bytes: ...
    def call_end(self, index: int, call: Call) -> bytes: ...

    def message(self, output: ChatOutput) -> bytes:
        """What a whole answer gets as ``Answer.message``."""


class MessageFormat(ResponseFormat):
    """A ResponseFormat of chat answers.

    has_plain: text of a choice that is all content is written by prefix and suffix. If not, all
    of it comes to the writer, or lies in its lane.
    """

    has_plain = False

    @abstractmethod
    def writer(self, index: int) -> ChatWriter:
        """What writes this choice."""


class ChatOutput:
    """One choice of a chat answer.

    is_plain: all text from here on is content, and the caller may write it by itself.
    wants_reasoning: the answer has a place for reasoning.
    num_content: characters of content so far.
    """

    def __init__(
        self, writer: ChatWriter, parser: Parser, rules: OutputRules, has_plain: bool
    ) -> None:
        self._writer = writer
        self._parser = parser
        self._rules = rules
        self._has_plain = has_plain
        self._parts: list[Text | Call] = []
        self.calls: list[Call] = []
        self.num_content = 0
        self._last: type[Event] | None = None  # kind of the last event

    @property
    def is_plain(self) -> bool:
        return self._has_plain and self._parser.steady == PLAIN

    @property
    def parts(self) -> list[Text | Call]:
        """All that the client gets, in order; runs of one kind do not follow each other."""
        wanted = (Content, Reasoning) if self.wants_reasoning else (Content,)
        return [part for part in self._parts if isinstance(part, Call) or part.kind in wanted]

    @property
    def content(self) -> str:
        return self._joined(Content)

    @property
    def reasoning(self) -> str:
        return self._joined(Reasoning)

    @property
    def wants_reasoning(self) -> bool:
        return self._rules.reasoning

    @property
    def end_tokens(self) -> tuple[int, int]:
        """The tokens that end a reasoning, -1 for none."""
        first, second, *_ = (*self._rules.end_tokens, -1, -1)
        return first, second

    def lane(self) -> tuple[bytes, bytes, bytes]:
        """Text that follows and has none of the bytes in the third may be written between the
        first two, in JSON, and not be fed. The third is empty where all must be fed.
        """
        steady = self._parser.steady
        # Only a kind that has come: the count of tokens has to know which have. Without an end
        # token it even needs the text.
        if steady is None or steady.kind is not self._last:
            return b"", b"", b""
        if steady.kind is Reasoning and not (self._rules.reasoning and self._rules.end_tokens):
            return b"", b"", b""
        before, after = self._writer.lane(steady.kind)
        return before, after, _first_bytes(steady.characters) if before else b""

    def feed(self, text: bytes) -> bytes:
        """The stream events of the next text (UTF-8)."""
        return self._events(self._parser.feed(text.decode()))

    def finish(self, text: bytes) -> bytes:
        """The stream events of the last text."""
        return self._events(self._parser.feed(text.decode()) + self._parser.finish())

    def message(self) -> bytes:
        """The message of a whole answer, once it is finished."""
        return self._writer.message(self)

    def finish_reason(self, reason: str) -> str:
        """``tool_calls`` where the model stopped by itself and completed all its calls."""
        if reason == "stop" and self.calls and all(call.is_complete for call in self.calls):
            return "tool_calls"
        return reason

    def num_reasoning_tokens(
        self, num_tokens: int, num_at_end: int, encode: Callable[[str], list[int]]
    ) -> int:
        """How many of the choice's tokens are reasoning, up to and with the one that ended it.

        ``num_at_end``: that number if one of ``end_tokens`` came, else 0.
        """
        reasoning = self.reasoning
        if not reasoning:
            return 0
        if self._rules.end_tokens:
            return num_at_end or num_tokens
        return min(len(encode(reasoning)), num_tokens)

    def _events(self, events: list[Event]) -> bytes:
        """Take what the parser found; the same as stream events."""
        if len(events) > 1:
            events = join(events)
        return b"".join(map(self._event, events))

    def _event(self, event: Event) -> bytes:
        self._last = type(event)
        if isinstance(event, Content):
            self._add(Content, event.text)
            self.num_content += len(event.text)
            return self._writer.text(Content, event.text)
        if isinstance(event, Reasoning):
            self._add(Reasoning, event.text)
            return self._writer.text(Reasoning, event.text) if self._rules.reasoning else b""
        index = event.index
        if self._rules.max_calls is not None and index >= self._rules.max_calls:
            return b""
        if isinstance(event, CallStart):
            self.calls.append(Call(self._new_id(), event.name))
            self._parts.append(self.calls[index])
            return self._writer.call_start(index, self.calls[index])
        if isinstance(event, CallArguments):
            self.calls[index].pieces.append(event.text)
            return self._writer.call_arguments(index, event.text)
        assert isinstance(event, CallEnd)
        self.calls[index].is_complete = True
        return self._writer.call_end(index, self.calls[index])

    def _add(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, Text) or last.kind is not kind:
            last = Text(kind)
            self._parts.append(last)
        last.pieces.append(text)

    def _joined(self, kind: type[Content] | type[Reasoning]) -> str:
        return "".join(
            part.text for part in self._parts if isinstance(part, Text) and part.kind is kind
        )

    def _new_id(self) -> str:
        if self._rules.short_ids:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return self._writer.call_id_prefix + secrets.token_hex(12)


@cache
def _first_bytes(characters: str) -> bytes:
    """The bytes that begin these characters in UTF-8; for none of them one that UTF-8 has not."""
    return bytes({character.encode()[0] for character in characters}) or b"\xff"


OutputMaker: TypeAlias = Callable[[int], ChatOutput]


class ChatOutputs:
    """The formats of the served model.

    keeps_special: some markup is a special token, which the text must be decoded with.
    """

    def __init__(self, formats: Formats, tokenizer: Tokenizer) -> None:
        def token_of(text: str | None) -> int:
            ids = tokenizer.encode(text) if text else []
            return ids[0] if len(ids) == 1 else -1

        self._formats = formats
        # A call ends a reasoning too; the first of these that comes counts.
        ends = [token_of(text) for text in formats.reasoning_ends]
        self._end_tokens = tuple(ends) if ends and ends[0] >= 0 else ()
        self.keeps_special = any(tokenizer.is_special(token_of(mark)) for mark in formats.marks)

    def check(self, body: ChatRequest) -> None:
        """RequestError if the request offers tools to a model whose calls nobody could read."""
        if body.offered_tools and self._formats.tools is None:
            raise RequestError(
                "The model's chat template shows no form of tool calls that this server knows. "
                "Start it with --tool-call-parser to choose one.",
                param="tools",
            )

    def choose(self, body: ChatRequest, prompt: str, form: MessageFormat) -> OutputMaker | None:
        """Makes the outputs of the request's choices; None if the format needs none, because all
        of their text is content."""
        separate = body.separate_reasoning is not False

        def parser() -> Parser | None:
            return self._formats.parser(
                prompt,
                body.offered_tools,
                separate_reasoning=separate,
                stream_reasoning=body.stream_reasoning is not False,
            )

        first = parser()
        if form.has_plain and first is None:
            return None
        unused = [first or PlainParser()]

        def make(index: int) -> ChatOutput:
            made = unused.pop() if unused else parser() or PlainParser()
            return ChatOutput(form.writer(index), made, rules, form.has_plain)

        rules = OutputRules(
            reasoning=separate
            and self._formats.reasoning is not None
            and body.include_reasoning is not False,
            max_calls=1 if body.parallel_tool_calls is False else None,
            short_ids=self._formats.tools == "mistral",
            end_tokens=self._end_tokens if body.offered_tools else self._end_tokens[:1],
        )
        return make

    def only_one(self, body: ChatRequest, prompt: str, form: MessageFormat) -> ChatOutput:
        """The output of a request's one choice, where ``choose`` makes one."""
        make = self.choose(body, prompt, form)
        assert make is not None
        return make(0)
