"""Answers of Ollama's ``/api/chat`` and ``/api/generate``: JSON lines, or one object.

Rules: the last line has ``done`` true, the reason and the figures; durations are nanoseconds, of
the prompt up to the first token, of the answer from there on. A call is sent when it is complete,
because its arguments are an object here; one that was cut off cannot be said, and is left out.
``created_at`` is when the request came, on all lines.
"""

from __future__ import annotations

from datetime import datetime, timezone
from time import perf_counter

import orjson

from minisgl_fast.api.chat_deltas import quoted
from minisgl_fast.api.chat_output import Call, ChatOutput, ChatWriter, MessageFormat
from minisgl_fast.api.logprobs import TokenLogprobs
from minisgl_fast.api.openai_logprobs import ChatLogprobs
from minisgl_fast.api.response_format import Answer, NewTokens, Usage
from minisgl_fast.errors import MinisglError
from minisgl_fast.parsers.events import Content, Reasoning
from minisgl_fast.server.error_shapes import ollama_error


class OllamaFormat(MessageFormat):
    """The format and the writer (chat_output.py) of one chat answer."""

    content_type = b"application/x-ndjson"
    has_plain = True
    call_id_prefix = "call_"

    def __init__(self, model: str, received: float, logprobs: ChatLogprobs | None = None) -> None:
        """``received``: when the request came, by time.perf_counter()."""
        self._logprobs = logprobs
        self._waiting: list[TokenLogprobs] = []  # of tokens that no line has told yet
        self._received = received
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self._head = b'{"model":%b,"created_at":"%b",' % (orjson.dumps(model), now.encode())
        self._answer = Answer(0, b"", "stop", None)

    def writer(self, index: int) -> ChatWriter:
        return self

    def prefix(self, index: int) -> bytes:
        return self.lane(Content)[0]

    def suffix(self, index: int) -> bytes:
        return self.lane(Content)[1]

    def lane(self, kind: type[Content] | type[Reasoning]) -> tuple[bytes, bytes]:
        before, after = self._line(self._text(kind, b'"\0"')).split(b"\0")
        return before, after

    def text(self, kind: type[Content] | type[Reasoning], text: str) -> bytes:
        return self._line(self._text(kind, quoted(text)))

    def call_start(self, index: int, call: Call) -> bytes:
        return b""

    def call_arguments(self, index: int, text: str) -> bytes:
        return b""

    def call_end(self, index: int, call: Call) -> bytes:
        return self._line(_message(b'"content":"","tool_calls":[%b]' % _call(index, call)))

    def closing(self, answer: Answer) -> bytes:
        self._answer = answer
        if not answer.text:
            return b""
        return self.prefix(answer.index) + answer.text + self.suffix(answer.index)

    def with_logprobs(self, events: bytes, new: NewTokens) -> bytes:
        """The first line tells of the tokens."""
        self._waiting += new.tokens
        first, end, rest = events.partition(b"\n")
        if not end:
            return events
        fields = first.removesuffix(b',"done":false}')
        return b'%b%b,"done":false}\n%b' % (fields, self._tokens(), rest)

    def ending(self, usage: Usage) -> bytes:
        return self._last(self._text(Content, b'""'), usage) + b"\n"

    def failure(self, error: MinisglError, request_id: str) -> bytes:
        return ollama_error(error) + b"\n"

    def message(self, output: ChatOutput) -> bytes:
        fields = b'"content":%b' % quoted(output.content)
        if output.reasoning and output.wants_reasoning:
            fields += b',"thinking":%b' % quoted(output.reasoning)
        calls = [_call(i, call) for i, call in enumerate(output.calls) if call.is_complete]
        if calls:
            fields += b',"tool_calls":[%b]' % b",".join(calls)
        return _message(fields)

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        self._answer = answers[0]
        self._waiting = answers[0].logprobs
        plain = self._text(Content, b'"%b"' % answers[0].text)
        return self._last(answers[0].message or plain, usage)

    def loaded(self) -> bytes:
        """The answer to a request without a prompt, which asks for the model to be loaded."""
        fields = self._text(Content, b'""')
        return b'%b%b,"done":true,"done_reason":"load"}' % (self._head, fields)

    def _text(self, kind: type[Content] | type[Reasoning], text: bytes) -> bytes:
        """The fields of a line with this text, which is in JSON."""
        return _message(
            b'"content":%b' % text if kind is Content else b'"content":"","thinking":%b' % text
        )

    def _tokens(self) -> bytes:
        """The key of the tokens that wait, behind a comma."""
        if self._logprobs is None or not self._waiting:
            return b""
        waiting, self._waiting = self._waiting, []
        return b',"logprobs":' + orjson.dumps(self._logprobs.entries(waiting))

    def _line(self, fields: bytes) -> bytes:
        return b'%b%b,"done":false}\n' % (self._head, fields)

    def _last(self, fields: bytes, usage: Usage) -> bytes:
        """The object that ends the answer."""
        answer = self._answer
        first = answer.first_time or self._received
        return (
            b'%b%b%b,"done":true,"done_reason":"%b","total_duration":%d,"load_duration":0,'
            b'"prompt_eval_count":%d,"prompt_eval_duration":%d,"eval_count":%d,"eval_duration":%d}'
            % (
                self._head,
                fields,
                self._tokens(),
                b"length" if answer.finish_reason == "length" else b"stop",
                _ns(perf_counter() - self._received),
                usage.prompt_tokens,
                _ns(first - self._received),
                usage.completion_tokens,
                _ns(max(answer.last_time - first, 0.0)),
            )
        )


class OllamaGenerateFormat(OllamaFormat):
    """The same for ``/api/generate``, which has no messages and no calls."""

    def _text(self, kind: type[Content] | type[Reasoning], text: bytes) -> bytes:
        if kind is Content:
            return b'"response":%b' % text
        return b'"response":"","thinking":%b' % text

    def message(self, output: ChatOutput) -> bytes:
        fields = self._text(Content, quoted(output.content))
        if output.reasoning and output.wants_reasoning:
            fields += b',"thinking":%b' % quoted(output.reasoning)
        return fields


def _message(fields: bytes) -> bytes:
    return b'"message":{"role":"assistant",%b}' % fields


def _call(index: int, call: Call) -> bytes:
    return b'{"id":%b,"function":{"index":%d,"name":%b,"arguments":%b}}' % (
        quoted(call.id),
        index,
        quoted(call.name),
        call.json_object(),
    )


def _ns(duration_s: float) -> int:
    return int(duration_s * 1e9)
