"""What a route's format has to write, and what it gets to write it from.

Every choice's text arrives JSON-escaped from its TextStream, so nothing is escaped twice: a body is
pieces of bytes around it. A stream event of running text is ``prefix(index) + text + suffix``, made
once per choice; the token loop (deliver.pyx) joins the three.

Rules: a format writes what its route's clients read and overrides that alone; what it leaves as it
is here writes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import orjson

from minisgl_fast.api.chat_deltas import quoted
from minisgl_fast.api.logprobs import TokenLogprobs
from minisgl_fast.api.usage import usage_json
from minisgl_fast.errors import MinisglError
from minisgl_fast.server.errors_json import error_body
from minisgl_fast.server.exchange import EVENT_STREAM

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Usage:
    """Token counts of one response. A prompt counts once, however many choices it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int | None = None  # None where nothing tells reasoning from content

    def to_json(self) -> bytes:
        return usage_json(
            self.prompt_tokens, self.completion_tokens, self.cached_tokens, self.reasoning_tokens
        )


@dataclass(slots=True)
class Answer:
    """One finished choice. ``text`` is JSON-escaped; ``matched`` the stop string or token id,
    ``is_eos``: which is an end of text of the model.

    ``message``: the whole message in JSON, where the text is not all of it. ``first_time`` and
    ``last_time``: when its first and last token came, by time.perf_counter(). ``logprobs``: the
    tokens of a whole answer, ``prompt_logprobs`` those of its prompt, where they were asked for; in
    a stream they go through ``ResponseFormat.with_logprobs``. ``num_reasoning_tokens``: of all that
    were generated, where an answer has parts.
    """

    index: int
    text: bytes
    finish_reason: str
    matched: str | int | None
    is_eos: bool = False
    message: bytes = b""
    first_time: float = 0.0
    last_time: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: Sequence[float] = ()
    num_reasoning_tokens: int = 0

    def end(self) -> bytes:
        """The keys behind the text of a finished choice."""
        return end_keys(self.finish_reason, self.matched, self.is_eos)


@lru_cache(maxsize=1024)
def end_keys(finish_reason: str, matched: str | int | None, is_eos: bool) -> bytes:
    """What ended a choice, by SGLang's name, and by vLLM's, where the model's own end is null."""
    by = orjson.dumps(matched)
    return b'"finish_reason":"%b","matched_stop":%b,"stop_reason":%b' % (
        finish_reason.encode(),
        by,
        b"null" if is_eos else by,
    )


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The tokens of a choice that come with its new text.

    ``prompt``: with the first of a choice the tokens of its prompt, else None.
    """

    index: int
    tokens: list[TokenLogprobs]
    prompt: list[TokenLogprobs] | None


class ResponseFormat(ABC):
    """How one route writes its answers; as it stands, no stream but for its errors.

    content_type   of a stream
    text_event     makes an event of plain text, where it is not prefix + JSON-escaped text + suffix
    places_tokens  tokens belong to parts of the answer, so that ``with_logprobs`` wants each of
                   them with the events that it made; of a choice that is not streamed, too
    """

    content_type = EVENT_STREAM
    places_tokens = False
    text_event: Callable[[bytes], bytes] | None = None

    def prefix(self, index: int) -> bytes:
        return b""

    def suffix(self, index: int) -> bytes:
        return b""

    def opening(self, index: int, usage: Usage) -> bytes:
        """The events before a choice's first text; of ``usage`` the prompt is known."""
        return b""

    def closing(self, answer: Answer) -> bytes:
        """The events that end a choice; ``answer.text`` is the rest of its text."""
        return b""

    def with_logprobs(self, events: bytes, new: NewTokens) -> bytes:
        """The events of a choice, never none, together with its tokens that are new.

        Only called where the request asked for log-probabilities.
        """
        return events

    def ending(self, usage: Usage) -> bytes:
        """The events behind all choices."""
        return b""

    def failure(self, error: MinisglError, request_id: str) -> bytes:
        """The events that end a stream with an error."""
        return b"data: %b\n\n%b" % (error_body(error, request_id), DONE)

    @abstractmethod
    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        """The whole answer where nothing is streamed."""


def fill_in(events: bytes, logprobs: bytes) -> bytes:
    """The events with log-probabilities in the first; no text within can look like the key."""
    return events.replace(b'"logprobs":null', b'"logprobs":' + logprobs, 1)


def json_escaped(text: str) -> bytes:
    """The text as the inside of a JSON string."""
    return quoted(text)[1:-1]
