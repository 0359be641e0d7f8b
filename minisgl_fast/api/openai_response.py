"""OpenAI's chat and completion objects, whole and as stream events.

Rules: the keys that the OpenAI schema requires are always there, null where we have nothing; every
choice ends with exactly one finish_reason; ``usage`` is null on all chunks but its own when the
client asked for it, and absent when not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import orjson

from minisgl_fast.api.chat_deltas import ChatDeltas, quoted
from minisgl_fast.api.chat_output import MessageFormat
from minisgl_fast.api.extras import Extras
from minisgl_fast.api.logprobs import TokenLogprobs, prompt_tokens
from minisgl_fast.api.openai_logprobs import NULL, ChatLogprobs, CompletionLogprobs, PromptLogprobs
from minisgl_fast.api.response_format import (
    DONE,
    Answer,
    NewTokens,
    ResponseFormat,
    Usage,
    fill_in,
    json_escaped,
)


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt before a completion: its text, its ids, and where each begins in the text."""

    text: str
    ids: Sequence[int] = ()
    offsets: Sequence[int] = ()

    def tokens(self, found: Sequence[TokenLogprobs]) -> list[TokenLogprobs]:
        """All tokens; the first ones, of which nothing was found, without log-probabilities."""
        return [
            token._replace(offset=offset)
            for token, offset in zip(prompt_tokens(self.ids, found), self.offsets, strict=True)
        ]


class Head(NamedTuple):
    """What stands at the top of an OpenAI object. ``rid``: the client's own id, as it is.
    ``created``: seconds since 1970 in digits, those of the moment if empty."""

    request_id: str
    model: str
    include_usage: bool = False
    rid: str | None = None
    has_tier: bool = False  # the request has a service_tier
    streams: bool = True  # a whole answer has no use for events
    created: bytes = b""


def _no_event(fields: bytes) -> bytes:
    return b""


class _OpenAIFormat(ResponseFormat):
    """What chat and completion objects share."""

    prompt_in_choice = False  # the prompt's ids stand in every choice
    id_prefix = ""
    chunk_object = b""
    whole_object = b""

    def __init__(self, head: Head, extras: Extras | None = None) -> None:
        self._answer_head = head
        self._include_usage = head.include_usage
        self._extras = extras
        self._plain_tail = b'],"usage":null}\n\n' if head.include_usage else b"]}\n\n"

    @cached_property
    def _head(self) -> bytes:
        """What every event of a stream begins with."""
        return b"data: " + self._top(self.chunk_object)

    def _top(self, kind: bytes) -> bytes:
        """The beginning of an object, up to its choices."""
        head = self._answer_head
        tier = b',"service_tier":"default"' if head.has_tier else b""
        return b'{"id":%b%b,"object":"%b","created":%b,"model":%b,"choices":[' % (
            orjson.dumps(head.rid or self.id_prefix + head.request_id),
            tier,
            kind,
            head.created or b"%d" % time.time(),
            orjson.dumps(head.model),
        )

    @property
    def _tail(self) -> bytes:
        """What ends an event behind its choice."""
        if self._extras is None:
            return self._plain_tail
        return b"]%b}\n\n" % self._extras.event_keys(nulls_usage=self._include_usage)

    def _extra(self, index: int, *, is_event: bool = True) -> bytes:
        """More keys of a choice."""
        if self._extras is None:
            return b""
        return self._extras.choice_keys(index, with_prompt=self.prompt_in_choice, is_event=is_event)

    def ending(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return DONE
        return b'%b],"usage":%b}\n\n%b' % (self._head, usage.to_json(), DONE)

    def whole(self, choices: list[bytes], usage: Usage) -> bytes:
        """The whole object around its choices."""
        parts = (self._top(self.whole_object), b",".join(choices), b'],"usage":', usage.to_json())
        return b"".join(parts) + b"}"


class ChatFormat(_OpenAIFormat, MessageFormat):
    """``chat.completion`` and its chunks: role first, then text, then a chunk with the reason."""

    id_prefix = "chatcmpl-"
    chunk_object = b"chat.completion.chunk"
    whole_object = b"chat.completion"
    has_plain = True

    def __init__(
        self,
        head: Head,
        extras: Extras | None = None,
        echo: str = "",
        logprobs: ChatLogprobs | None = None,
        prompt: PromptLogprobs | None = None,
    ) -> None:
        """``echo``: text that every answer begins with. ``prompt``: what lists the prompt's."""
        super().__init__(head, extras)
        self._echo = echo
        self._logprobs = logprobs
        self._prompt = prompt

    def with_logprobs(self, events: bytes, new: NewTokens) -> bytes:
        """The first of the events carries the tokens."""
        return fill_in(events, self._logprobs.to_json(new.tokens)) if self._logprobs else events

    def writer(self, index: int) -> ChatDeltas:
        delta = partial(self.delta, index) if self._answer_head.streams else _no_event
        return ChatDeltas(delta, self._echo)

    def prefix(self, index: int) -> bytes:
        return b'%b{"index":%d,"delta":{"content":"' % (self._head, index)

    def suffix(self, index: int) -> bytes:
        return b'"},"logprobs":null,"finish_reason":null%b}%b' % (self._extra(index), self._tail)

    def delta(self, index: int, fields: bytes) -> bytes:
        """An event with these fields of a delta, in JSON."""
        return b'%b{"index":%d,"delta":{%b},"logprobs":null,"finish_reason":null%b}%b' % (
            self._head,
            index,
            fields,
            self._extra(index),
            self._tail,
        )

    def opening(self, index: int, usage: Usage) -> bytes:
        role = self.delta(index, b'"role":"assistant","content":""')
        if self._extras is not None:
            role = role.removesuffix(b"}\n\n") + self._extras.prompt_key() + b"}\n\n"
        if not self._echo:
            return role
        return role + self.delta(index, b'"content":%b' % quoted(self._echo))

    def closing(self, answer: Answer) -> bytes:
        index = answer.index
        events = b""
        if answer.text:
            events = self.prefix(index) + answer.text + self.suffix(index)
        return events + b'%b{"index":%d,"delta":{},"logprobs":null,%b%b}%b' % (
            self._head,
            index,
            answer.end(),
            self._extra(index),
            self._tail,
        )

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        choices = [
            b'{"index":%d,"message":%b,"logprobs":%b,%b%b}'
            % (
                answer.index,
                answer.message
                or b'{"role":"assistant","content":"%b%b","refusal":null}'
                % (json_escaped(self._echo) if self._echo else b"", answer.text),
                self._logprobs.to_json(answer.logprobs) if self._logprobs else NULL,
                answer.end(),
                self._extra(answer.index, is_event=False),
            )
            for answer in answers
        ]
        whole = self.whole(choices, usage)
        more = b"" if self._extras is None else self._extras.prompt_key()
        if self._prompt is not None:
            more += b',"prompt_logprobs":' + self._prompt.to_json(answers[0].prompt_logprobs)
        return whole[:-1] + more + b"}" if more else whole


class CompletionFormat(_OpenAIFormat):
    """``text_completion`` for both forms; the reason rides on the last text chunk.

    ``echoes``: what stands before each choice's own text, empty without ``echo``.
    """

    prompt_in_choice = True
    id_prefix = "cmpl-"
    chunk_object = b"text_completion"
    whole_object = b"text_completion"

    def __init__(
        self,
        head: Head,
        echoes: list[Echo],
        extras: Extras | None = None,
        logprobs: CompletionLogprobs | None = None,
        prompt: PromptLogprobs | None = None,
    ) -> None:
        """``prompt``: what lists the prompts'."""
        super().__init__(head, extras)
        self._echoes = echoes
        self._logprobs = logprobs
        self._prompt = prompt

    def prefix(self, index: int) -> bytes:
        return b'%b{"index":%d,"text":"' % (self._head, index)

    def suffix(self, index: int) -> bytes:
        return b'","logprobs":null,"finish_reason":null%b}%b' % (self._extra(index), self._tail)

    def opening(self, index: int, usage: Usage) -> bytes:
        # With log-probabilities it waits for those of the prompt.
        if not self._echoes or not self._echoes[index].text or self._logprobs is not None:
            return b""
        return self._echo_event(index)

    def with_logprobs(self, events: bytes, new: NewTokens) -> bytes:
        if self._logprobs is None:
            return events
        echo = self._echoes[new.index] if self._echoes else None
        offset = 0 if echo is None else len(echo.text)
        events = fill_in(events, self._logprobs.to_json(new.tokens, offset))
        if echo is None or new.prompt is None:
            return events
        tokens = self._logprobs.to_json(echo.tokens(new.prompt))
        return fill_in(self._echo_event(new.index), tokens) + events

    def _echo_event(self, index: int) -> bytes:
        return self.prefix(index) + json_escaped(self._echoes[index].text) + self.suffix(index)

    def closing(self, answer: Answer) -> bytes:
        return b'%b%b","logprobs":null,%b%b}%b' % (
            self.prefix(answer.index),
            answer.text,
            answer.end(),
            self._extra(answer.index),
            self._tail,
        )

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        choices = [
            b'{"index":%d,"text":"%b%b","logprobs":%b,%b%b}'
            % (
                answer.index,
                json_escaped(self._echoes[answer.index].text) if self._echoes else b"",
                answer.text,
                self._logprobs_of(answer),
                answer.end(),
                self._extra(answer.index, is_event=False) + self._prompt_key(answer),
            )
            for answer in answers
        ]
        return self.whole(choices, usage)

    def _prompt_key(self, answer: Answer) -> bytes:
        if self._prompt is None:
            return b""
        return b',"prompt_logprobs":' + self._prompt.to_json(answer.prompt_logprobs)

    def _logprobs_of(self, answer: Answer) -> bytes:
        if self._logprobs is None:
            return NULL
        if not self._echoes:
            return self._logprobs.to_json(answer.logprobs)
        echo = self._echoes[answer.index]
        own = [one._replace(offset=len(echo.text) + one.offset) for one in answer.logprobs]
        return self._logprobs.to_json(echo.tokens(answer.prompt_logprobs) + own)
