"""OpenAI's form of a parsed chat answer: deltas of a stream, or the message.

Rules: ``content`` is null only beside calls; ``reasoning_content`` is there where the request and
the model have reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import orjson

from minisgl_fast.parsers.events import Content, Reasoning

if TYPE_CHECKING:
    from minisgl_fast.api.chat_output import Call, ChatOutput

_NAMES = {Content: b"content", Reasoning: b"reasoning_content"}


class ChatDeltas:
    """The writer (chat_output.py) of one choice. ``delta`` makes an event of a delta's fields;
    ``echo`` is text before the content of a message."""

    call_id_prefix = "call_"

    def __init__(self, delta: Callable[[bytes], bytes], echo: str = "") -> None:
        self._delta = delta
        self._echo = echo

    def lane(self, kind: type[Content] | type[Reasoning]) -> tuple[bytes, bytes]:
        before, after = self._delta(b'"%b":"\0"' % _NAMES[kind]).split(b"\0")
        return before, after

    def text(self, kind: type[Content] | type[Reasoning], text: str) -> bytes:
        return self._delta(b'"%b":%b' % (_NAMES[kind], quoted(text)))

    def call_start(self, index: int, call: Call) -> bytes:
        return self._delta(
            b'"tool_calls":[{"index":%d,"id":"%b","type":"function",'
            b'"function":{"name":%b,"arguments":""}}]'
            % (index, call.id.encode(), quoted(call.name))
        )

    def call_arguments(self, index: int, text: str) -> bytes:
        return self._delta(
            b'"tool_calls":[{"index":%d,"function":{"arguments":%b}}]' % (index, quoted(text))
        )

    def call_end(self, index: int, call: Call) -> bytes:
        return b""

    def message(self, output: ChatOutput) -> bytes:
        content = self._echo + output.content
        message = b'{"role":"assistant","content":%b,"refusal":null' % (
            quoted(content) if content or not output.calls else b"null"
        )
        if output.wants_reasoning:
            reasoning = output.reasoning
            message += b',"reasoning_content":%b' % (quoted(reasoning) if reasoning else b"null")
        if output.calls:
            message += b',"tool_calls":[%b]' % b",".join(
                b'{"id":"%b","type":"function","function":{"name":%b,"arguments":%b}}'
                % (call.id.encode(), quoted(call.name), quoted(call.arguments))
                for call in output.calls
            )
        return message + b"}"


def quoted(text: str) -> bytes:
    """The text as a JSON string; half of a surrogate pair, which has no UTF-8, is escaped."""
    try:
        return orjson.dumps(text)
    except orjson.JSONEncodeError:
        return json.dumps(text).encode()
