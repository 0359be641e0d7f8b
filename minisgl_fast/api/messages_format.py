"""Answers of Anthropic's ``/v1/messages``: one message, whole or as events.

    message_start, ping, (content_block_start, content_block_delta*, content_block_stop)*,
    message_delta, message_stop

Rules: a block ends before the next begins, and there is at least one. The signature of a thinking
block is the message's id: nothing checks it when it comes back. A call that was cut off keeps its
raw text in a stream and is an empty object in a whole message, with stop_reason max_tokens. Cached
tokens are not input tokens.
"""

from __future__ import annotations

import orjson

from minisgl_fast.api.chat_deltas import quoted
from minisgl_fast.api.chat_output import Call, ChatOutput, ChatWriter, MessageFormat, Text
from minisgl_fast.api.response_format import Answer, Usage
from minisgl_fast.errors import MinisglError
from minisgl_fast.parsers.events import Content, Reasoning
from minisgl_fast.server.error_shapes import messages_error

_NEW_BLOCKS = {
    Content: b'{"type":"text","text":""}',
    Reasoning: b'{"type":"thinking","thinking":"","signature":""}',
}
_DELTAS = {
    Content: b'{"type":"text_delta","text":%b}',
    Reasoning: b'{"type":"thinking_delta","thinking":%b}',
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesFormat(MessageFormat):
    """The format and the writer (chat_output.py) of one answer."""

    call_id_prefix = "toolu_"

    def __init__(self, request_id: str, model: str, max_tokens: int) -> None:
        """``max_tokens``: what the client asked for, maybe more than the context has room for."""
        self._id = b"msg_" + request_id.encode()
        self._model = orjson.dumps(model)
        self._max_tokens = max_tokens
        self._num_blocks = 0
        self._open: type[Content | Reasoning | Call] | None = None  # what the open block holds
        self._stop = b""

    def writer(self, index: int) -> ChatWriter:
        return self

    # The events of a stream

    def opening(self, index: int, usage: Usage) -> bytes:
        # An answer that comes all at once is counted before its stream is opened.
        start = Usage(usage.prompt_tokens, 0, usage.cached_tokens)
        message = (
            b'{"id":"%b","type":"message","role":"assistant","model":%b,"content":[],'
            b'"stop_reason":null,"stop_sequence":null,"usage":%b}'
            % (self._id, self._model, _usage(start))
        )
        return _event(b"message_start", b'"message":%b' % message) + _event(b"ping")

    def text(self, kind: type[Content] | type[Reasoning], text: str) -> bytes:
        start = b"" if self._open is kind else self._start(kind, _NEW_BLOCKS[kind])
        return start + self._delta(_DELTAS[kind] % quoted(text))

    def lane(self, kind: type[Content] | type[Reasoning]) -> tuple[bytes, bytes]:
        if self._open is not kind:
            return b"", b""
        before, after = self._delta(_DELTAS[kind] % b'"\0"').split(b"\0")
        return before, after

    def call_start(self, index: int, call: Call) -> bytes:
        block = b'{"type":"tool_use","id":%b,"name":%b,"input":{}}'
        return self._start(Call, block % (quoted(call.id), quoted(call.name)))

    def call_arguments(self, index: int, text: str) -> bytes:
        return self._delta(b'{"type":"input_json_delta","partial_json":%b}' % quoted(text))

    def call_end(self, index: int, call: Call) -> bytes:
        return self._end()

    def closing(self, answer: Answer) -> bytes:
        self._stop = _stop(answer)
        first = b"" if self._num_blocks else self._start(Content, _NEW_BLOCKS[Content])
        return first + self._end()

    def ending(self, usage: Usage) -> bytes:
        fields = b'"delta":{%b},"usage":%b' % (self._stop_of(usage), _usage(usage))
        return _event(b"message_delta", fields) + _event(b"message_stop")

    def failure(self, error: MinisglError, request_id: str) -> bytes:
        return b"event: error\ndata: %b\n\n" % messages_error(error, request_id)

    # A whole answer

    def message(self, output: ChatOutput) -> bytes:
        return b",".join(map(self._block, output.parts)) or _NEW_BLOCKS[Content]

    def _block(self, part: Text | Call) -> bytes:
        if isinstance(part, Call):
            return b'{"type":"tool_use","id":%b,"name":%b,"input":%b}' % (
                quoted(part.id),
                quoted(part.name),
                part.json_object(),
            )
        if part.kind is Content:
            return b'{"type":"text","text":%b}' % quoted(part.text)
        return b'{"type":"thinking","thinking":%b,"signature":"%b"}' % (
            quoted(part.text),
            self._id,
        )

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        self._stop = _stop(answers[0])
        return (
            b'{"id":"%b","type":"message","role":"assistant","model":%b,"content":[%b],%b,'
            b'"usage":%b}'
            % (self._id, self._model, answers[0].message, self._stop_of(usage), _usage(usage))
        )

    # Private

    def _start(self, kind: type[Content | Reasoning | Call], block: bytes) -> bytes:
        end = self._end()
        self._open = kind
        self._num_blocks += 1
        fields = b'"index":%d,"content_block":%b' % (self._num_blocks - 1, block)
        return end + _event(b"content_block_start", fields)

    def _delta(self, delta: bytes) -> bytes:
        fields = b'"index":%d,"delta":%b' % (self._num_blocks - 1, delta)
        return _event(b"content_block_delta", fields)

    def _end(self) -> bytes:
        """The end of the open block, if there is one."""
        if self._open is None:
            return b""
        end = b""
        if self._open is Reasoning:
            end = self._delta(b'{"type":"signature_delta","signature":"%b"}' % self._id)
        self._open = None
        return end + _event(b"content_block_stop", b'"index":%d' % (self._num_blocks - 1))

    def _stop_of(self, usage: Usage) -> bytes:
        """The fields that say why it stopped; a full context is told from ``max_tokens``."""
        if b'"max_tokens"' in self._stop and usage.completion_tokens < self._max_tokens:
            return self._stop.replace(b'"max_tokens"', b'"model_context_window_exceeded"')
        return self._stop


def _event(name: bytes, fields: bytes = b"") -> bytes:
    comma = b"," if fields else b""
    return b'event: %b\ndata: {"type":"%b"%b%b}\n\n' % (name, name, comma, fields)


def _usage(usage: Usage) -> bytes:
    return (
        b'{"input_tokens":%d,"output_tokens":%d,"cache_read_input_tokens":%d,'
        b'"cache_creation_input_tokens":0}'
        % (
            usage.prompt_tokens - usage.cached_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
        )
    )


def _stop(answer: Answer) -> bytes:
    reason = _STOP_REASONS.get(answer.finish_reason, "end_turn")
    sequence = None
    if answer.finish_reason == "stop" and isinstance(answer.matched, str):
        reason, sequence = "stop_sequence", answer.matched
    return b'"stop_reason":"%b","stop_sequence":%b' % (reason.encode(), orjson.dumps(sequence))
