"""Answers of OpenAI's ``/v1/responses``: one response object, or the events that build it.

    response.created, response.in_progress,
    per item: output_item.added, its parts and deltas, output_item.done
    response.completed | response.incomplete | response.failed

Rules: events are numbered from 0 without gaps, so every text is written here and none by prefix
and suffix; the last event holds the response whose ``output`` is the items of the
``output_item.done`` events, the same as where nothing is streamed. An item ends before the next
begins, and there is at least one. What was cut off is ``incomplete``, a call with its raw text.
Log-probabilities are those of the tokens that made a message's text; where they come to stand there
are bytes that no JSON has, until ``with_logprobs`` knows them.
"""

from __future__ import annotations

import re
import time

import orjson

from minisgl_fast.api.body import Body
from minisgl_fast.api.chat_deltas import quoted
from minisgl_fast.api.chat_output import Call, ChatOutput, ChatWriter, MessageFormat
from minisgl_fast.api.openai_logprobs import ChatLogprobs
from minisgl_fast.api.response_format import Answer, NewTokens, Usage
from minisgl_fast.errors import MinisglError
from minisgl_fast.parsers.events import Content, Reasoning
from minisgl_fast.server.error_shapes import responses_error

# Where log-probabilities come to stand: those of a message that begins, which has none yet, those
# of the tokens that are new, and those of the message so far.
_BEGIN, _NEW, _ALL = b"\0", b"\1", b"\2"
_PLACES = re.compile(rb"([\x00-\x02])")
# Per kind: the prefix of an item's id, its fields but for content, the fields of its part but for
# the text, and how its text events are called.
_TEXTS = {
    Content: (
        b"msg",
        b'"type":"message","role":"assistant"',
        b'"type":"output_text","annotations":[],"logprobs":%b',
        b"response.output_text",
        b',"logprobs":%b',
    ),
    Reasoning: (
        b"rs",
        b'"type":"reasoning","summary":[],"encrypted_content":null',
        b'"type":"reasoning_text"',
        b"response.reasoning_text",
        b"",
    ),
}


class ResponsesFormat(MessageFormat):
    """The format and the writer (chat_output.py) of one answer."""

    call_id_prefix = "call_"

    def __init__(
        self, request_id: str, model: str, echo: Body, logprobs: ChatLogprobs | None = None
    ) -> None:
        """``echo``: fields of the request that the response repeats."""
        self.places_tokens = logprobs is not None
        self._logprobs = logprobs
        self._listed: list[list[Body]] = []  # the entries of each message's tokens
        self._request_id = request_id.encode()
        self._head = b'"id":"resp_%b","object":"response","created_at":%d,"model":%b,%b' % (
            self._request_id,
            time.time(),
            orjson.dumps(model),
            orjson.dumps(echo)[1:-1],
        )
        self._number = 0
        self._items: list[bytes] = []  # finished ones
        self._open: type[Content | Reasoning] | Call | None = None  # what the open item holds
        self._pieces: list[str] = []  # of the open text
        self._reason = "stop"
        self._first = self._opening()

    def writer(self, index: int) -> ChatWriter:
        return self

    # The events of a stream

    def opening(self, index: int, usage: Usage) -> bytes:
        return self._first

    def lane(self, kind: type[Content] | type[Reasoning]) -> tuple[bytes, bytes]:
        return b"", b""

    def text(self, kind: type[Content] | type[Reasoning], text: str) -> bytes:
        events = b"" if self._open is kind else self._start_text(kind)
        self._pieces.append(text)
        name, more = _TEXTS[kind][3:]
        delta = b'%b,"content_index":0,"delta":%b%b' % (
            self._place,
            quoted(text),
            self._placed(more, _NEW),
        )
        return events + self._event(name + b".delta", delta)

    def call_start(self, index: int, call: Call) -> bytes:
        events = self._end()
        self._open = call
        return events + self._item_event(b"added", self._call(call, b"", "in_progress"))

    def call_arguments(self, index: int, text: str) -> bytes:
        delta = b'%b,"delta":%b' % (self._place, quoted(text))
        return self._event(b"response.function_call_arguments.delta", delta)

    def call_end(self, index: int, call: Call) -> bytes:
        return self._end()

    def closing(self, answer: Answer) -> bytes:
        self._reason = answer.finish_reason
        events = b""
        if not self._items and self._open is None:
            events = self._start_text(Content)
        status = "completed" if answer.finish_reason in ("stop", "tool_calls") else "incomplete"
        return events + self._end(status)

    def with_logprobs(self, events: bytes, new: NewTokens) -> bytes:
        if self._logprobs is None:
            return events
        tokens = self._logprobs.entries(new.tokens)
        pieces = _PLACES.split(events)
        for i in range(1, len(pieces), 2):
            if pieces[i] == _BEGIN:
                self._listed.append([])
                pieces[i] = b"[]"
            elif pieces[i] == _NEW:
                self._listed[-1] += tokens
                pieces[i] = orjson.dumps(tokens)
                tokens = []
            else:
                pieces[i] = orjson.dumps(self._listed[-1])
        return b"".join(pieces)

    def ending(self, usage: Usage) -> bytes:
        status = self._status
        response = b'"response":%b' % self._response(status, usage)
        return self._event(b"response." + status.encode(), response)

    def failure(self, error: MinisglError, request_id: str) -> bytes:
        failed = responses_error(error)
        detail = {"code": failed.code or "server_error", "message": failed.message}
        response = self._response("failed", error=orjson.dumps(detail))
        return self._event(b"response.failed", b'"response":%b' % response)

    # A whole answer

    def message(self, output: ChatOutput) -> bytes:
        return b""

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        if not self.places_tokens:  # else it is closed, as its tokens wanted
            self.closing(answers[0])
        return self._response(self._status, usage)

    # Private

    def _opening(self) -> bytes:
        """The first events, made first: an answer that comes all at once is written before its
        stream is opened."""
        response = b'"response":%b' % self._response("in_progress")
        first = self._event(b"response.created", response)
        return first + self._event(b"response.in_progress", response)

    @property
    def _status(self) -> str:
        return "completed" if self._reason in ("stop", "tool_calls") else "incomplete"

    @property
    def _place(self) -> bytes:
        """The fields that say which item an event belongs to."""
        return b'"item_id":%b,"output_index":%d' % (self._item_id, len(self._items))

    @property
    def _item_id(self) -> bytes:
        prefix = b"fc" if isinstance(self._open, Call) else _TEXTS[self._open or Content][0]
        return b'"%b_%b_%d"' % (prefix, self._request_id, len(self._items))

    def _start_text(self, kind: type[Content] | type[Reasoning]) -> bytes:
        events = self._end()
        self._open = kind
        self._pieces = []
        events += self._item_event(b"added", self._text_item(kind, b"", "in_progress"))
        part = b'{%b,"text":""}' % self._placed(_TEXTS[kind][2], _BEGIN)
        return events + self._part_event(b"added", part)

    def _end(self, status: str = "completed") -> bytes:
        """The end of the open item, if there is one."""
        kind = self._open
        if kind is None:
            return b""
        if isinstance(kind, Call):
            arguments = quoted(kind.arguments)
            if not kind.is_complete:
                status = "incomplete"
            item = self._call(kind, arguments[1:-1], status)
            done = b'%b,"name":%b,"arguments":%b' % (self._place, quoted(kind.name), arguments)
            events = self._event(b"response.function_call_arguments.done", done)
        else:
            text = quoted("".join(self._pieces))
            _, _, fields, name, more = _TEXTS[kind]
            more = self._placed(more, _ALL)
            part = b'{%b,"text":%b}' % (self._placed(fields, _ALL), text)
            item = self._text_item(kind, part, status)
            done = b'%b,"content_index":0,"text":%b%b' % (self._place, text, more)
            events = self._event(name + b".done", done) + self._part_event(b"done", part)
        events += self._item_event(b"done", item)
        self._items.append(item)
        self._open = None
        return events

    def _placed(self, fields: bytes, place: bytes) -> bytes:
        """The fields with a place for log-probabilities, or an empty list of them."""
        if b"%b" not in fields:
            return fields
        return fields % (b"[]" if self._logprobs is None else place)

    def _text_item(self, kind: type[Content] | type[Reasoning], part: bytes, status: str) -> bytes:
        fields = _TEXTS[kind][1]
        return b'{"id":%b,%b,"status":"%b","content":[%b]}' % (
            self._item_id,
            fields,
            status.encode(),
            part,
        )

    def _call(self, call: Call, arguments: bytes, status: str) -> bytes:
        """``arguments``: the inside of a JSON string."""
        return (
            b'{"id":%b,"type":"function_call","call_id":%b,"name":%b,"arguments":"%b",'
            b'"status":"%b"}'
            % (self._item_id, quoted(call.id), quoted(call.name), arguments, status.encode())
        )

    def _item_event(self, what: bytes, item: bytes) -> bytes:
        fields = b'"output_index":%d,"item":%b' % (len(self._items), item)
        return self._event(b"response.output_item." + what, fields)

    def _part_event(self, what: bytes, part: bytes) -> bytes:
        fields = b'%b,"content_index":0,"part":%b' % (self._place, part)
        return self._event(b"response.content_part." + what, fields)

    def _event(self, name: bytes, fields: bytes) -> bytes:
        number = self._number
        self._number += 1
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (
            name,
            name,
            number,
            fields,
        )

    def _response(self, status: str, usage: Usage | None = None, error: bytes = b"null") -> bytes:
        items = b",".join(self._items)
        for entries in self._listed:
            items = items.replace(_ALL, orjson.dumps(entries), 1)
        details = b"null"
        if status == "incomplete" and self._reason == "length":
            details = b'{"reason":"max_output_tokens"}'
        return b'{%b,"status":"%b","error":%b,"incomplete_details":%b,"output":[%b],"usage":%b}' % (
            self._head,
            status.encode(),
            error,
            details,
            items,
            b"null" if usage is None else _usage(usage),
        )


def _usage(usage: Usage) -> bytes:
    return (
        b'{"input_tokens":%d,"input_tokens_details":{"cached_tokens":%d,"cache_write_tokens":0},'
        b'"output_tokens":%d,"output_tokens_details":{"reasoning_tokens":%d},"total_tokens":%d}'
        % (
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.reasoning_tokens or 0,
            usage.prompt_tokens + usage.completion_tokens,
        )
    )
