"""A chat choice's text, through a parser, into deltas of a stream or into a message.

``ChatOutputs`` says whether the answers to a request must be taken apart; ``ChatOutput`` does it.

Rules: both forms come from the same events, so a stream joined is the message. A call has an id
from its first delta on; its arguments are text as the model wrote it. ``content`` is null only
beside calls. Reasoning that the client does not want is dropped, and so are calls beyond
``max_calls``.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import orjson

from minisgl_fast.api.openai_request import ChatRequest
from minisgl_fast.api.openai_response import ChatFormat
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
    Steady,
    join,
)
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
class _Call:
    id: str
    name: str
    arguments: list[str]
    is_complete: bool = False


class ChatOutput:
    """One choice of a chat answer.

    is_plain: all text from here on is content, and the caller may write it by itself.
    """

    def __init__(self, form: ChatFormat, index: int, parser: Parser, rules: OutputRules) -> None:
        self._form = form
        self._index = index
        self._parser = parser
        self._rules = rules
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._last: type[Event] | None = None  # kind of the last event
        self._lanes: dict[Steady, tuple[bytes, bytes, bytes]] = {}

    @property
    def is_plain(self) -> bool:
        return self._parser.steady == PLAIN

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
        if steady not in self._lanes:
            name = b"content" if steady.kind is Content else b"reasoning_content"
            before, after = self._delta(b'"%b":"\0"' % name).split(b"\0")
            first_bytes = {character.encode()[0] for character in steady.characters}
            self._lanes[steady] = before, after, bytes(first_bytes)
        return self._lanes[steady]

    def feed(self, text: bytes) -> bytes:
        """The stream events of the next text (UTF-8)."""
        return self._events(self._parser.feed(text.decode()))

    def finish(self, text: bytes) -> bytes:
        """The stream events of the last text."""
        return self._events(self._parser.feed(text.decode()) + self._parser.finish())

    def message(self) -> bytes:
        """The message of a whole answer, once it is finished."""
        content = "".join(self._content)
        message = b'{"role":"assistant","content":%b,"refusal":null' % (
            _quoted(content) if content or not self._calls else b"null"
        )
        if self._rules.reasoning:
            reasoning = "".join(self._reasoning)
            message += b',"reasoning_content":%b' % (_quoted(reasoning) if reasoning else b"null")
        if self._calls:
            message += b',"tool_calls":[%b]' % b",".join(
                b'{"id":"%b","type":"function","function":{"name":%b,"arguments":%b}}'
                % (call.id.encode(), _quoted(call.name), _quoted("".join(call.arguments)))
                for call in self._calls
            )
        return message + b"}"

    def finish_reason(self, reason: str) -> str:
        """``tool_calls`` where the model stopped by itself and completed all its calls."""
        if reason == "stop" and self._calls and all(call.is_complete for call in self._calls):
            return "tool_calls"
        return reason

    def num_reasoning_tokens(
        self, num_tokens: int, num_at_end: int, encode: Callable[[str], list[int]]
    ) -> int:
        """How many of the choice's tokens are reasoning, up to and with the one that ended it.

        ``num_at_end``: that number if one of ``end_tokens`` came, else 0.
        """
        if not self._reasoning:
            return 0
        if self._rules.end_tokens:
            return num_at_end or num_tokens
        return min(len(encode("".join(self._reasoning))), num_tokens)

    def _events(self, events: list[Event]) -> bytes:
        """Take what the parser found; the same as stream events."""
        if len(events) > 1:
            events = join(events)
        return b"".join(map(self._event, events))

    def _event(self, event: Event) -> bytes:
        self._last = type(event)
        if isinstance(event, Content):
            self._content.append(event.text)
            return self._delta(b'"content":%b' % _quoted(event.text))
        if isinstance(event, Reasoning):
            self._reasoning.append(event.text)
            if not self._rules.reasoning:
                return b""
            return self._delta(b'"reasoning_content":%b' % _quoted(event.text))
        index = event.index
        if self._rules.max_calls is not None and index >= self._rules.max_calls:
            return b""
        if isinstance(event, CallStart):
            call = _Call(self._new_id(), event.name, [])
            self._calls.append(call)
            return self._delta(
                b'"tool_calls":[{"index":%d,"id":"%b","type":"function",'
                b'"function":{"name":%b,"arguments":""}}]'
                % (index, call.id.encode(), _quoted(call.name))
            )
        if isinstance(event, CallArguments):
            self._calls[index].arguments.append(event.text)
            return self._delta(
                b'"tool_calls":[{"index":%d,"function":{"arguments":%b}}]'
                % (index, _quoted(event.text))
            )
        assert isinstance(event, CallEnd)
        self._calls[index].is_complete = True
        return b""

    def _delta(self, fields: bytes) -> bytes:
        return self._form.delta(self._index, fields)

    def _new_id(self) -> str:
        if self._rules.short_ids:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return "call_" + secrets.token_hex(12)


OutputMaker: TypeAlias = Callable[[ChatFormat, int], ChatOutput]


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

    def choose(self, body: ChatRequest, prompt: str) -> OutputMaker | None:
        """Makes the outputs of the request's choices; None if all of their text is content."""
        separate = body.separate_reasoning is not False

        def parser() -> Parser | None:
            return self._formats.parser(
                prompt,
                body.offered_tools,
                separate_reasoning=separate,
                stream_reasoning=body.stream_reasoning is not False,
            )

        def make(form: ChatFormat, index: int) -> ChatOutput:
            made = parser()
            assert made is not None
            return ChatOutput(form, index, made, rules)

        rules = OutputRules(
            reasoning=separate
            and self._formats.reasoning is not None
            and body.include_reasoning is not False,
            max_calls=1 if body.parallel_tool_calls is False else None,
            short_ids=self._formats.tools == "mistral",
            end_tokens=self._end_tokens if body.offered_tools else self._end_tokens[:1],
        )
        return None if parser() is None else make


def _quoted(text: str) -> bytes:
    """The text as a JSON string; half of a surrogate pair, which has no UTF-8, is escaped."""
    try:
        return orjson.dumps(text)
    except orjson.JSONEncodeError:
        return json.dumps(text).encode()
