"""How ``/generate`` answers: text, token ids and ``meta_info`` in SGLang's form, or Mini-SGLang's
plain text.

A stream's events are cumulative as SGLang's are by default: each repeats the text and the tokens
from the beginning, so only the last one counts. Incremental ones hold what is new.

Rules: a format is also the Extras of its session, which is how it learns tokens and counts; every
choice ends with one event, or object, with a finish_reason.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from minisgl_fast.api.extras import Extras
from minisgl_fast.api.logprobs import TokenLogprobs
from minisgl_fast.api.native_logprobs import NativeLogprobs
from minisgl_fast.api.response_format import (
    DONE,
    Answer,
    NewTokens,
    ResponseFormat,
    Usage,
    json_escaped,
)
from minisgl_fast.text.tokenizer import Tokenizer

# Stands where log-probabilities come to stand; no JSON text has this byte.
_LATER = b"\0"


@dataclass(slots=True)
class _Progress:
    """How far a choice is. ``shown``: what the events so far said, ``text`` JSON-escaped."""

    usage: Usage = field(default_factory=Usage)
    text: bytes = b""
    shown: bytes = b""
    tokens: list[int] = field(default_factory=list)
    shows_prompt: bool = True
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class NativeFormat(Extras, ResponseFormat):
    """The answers to one prompt.

    rid         the prompt's name; its n-th choice has ``_n`` behind it where there are several
    logprobs    what of them its ``meta_info`` is to hold
    first       the number of its first choice in the whole answer
    is_part     it is a part of a batch's answer: no brackets, no end of the stream
    """

    def __init__(
        self,
        rid: str,
        logprobs: NativeLogprobs,
        tokenizer: Tokenizer,
        *,
        n: int,
        streams: bool,
        incremental: bool,
        received: float,
        first: int = 0,
        is_part: bool = False,
    ) -> None:
        """``received``: when the request arrived, by time.perf_counter()."""
        super().__init__(
            token_ids=True, prompt_ids=False, usage=False, padding=False, n=n, streams=streams
        )
        self._rid = rid
        self._logprobs = logprobs
        self._tokenizer = tokenizer
        self._num_choices = n
        self._incremental = incremental
        self._received = received
        self._first = first
        self._is_part = is_part
        self._has_index = is_part or n > 1
        self._progress = [_Progress() for _ in range(n)]

    # As Extras

    def prepare(self, index: int, tokens: list[int], usage: Usage, text: bytes) -> None:
        progress = self._progress[index]
        progress.usage = usage
        if self._incremental:
            progress.tokens = tokens
        else:
            progress.tokens += tokens
            progress.shown = progress.text
            progress.text += json_escaped(text.decode())

    # As ResponseFormat

    def prefix(self, index: int) -> bytes:
        return b'data: {"text":"' + self._progress[index].shown

    def suffix(self, index: int) -> bytes:
        return b'",%b}\n\n' % self._behind_text(index, None)

    def closing(self, answer: Answer) -> bytes:
        behind = self._behind_text(answer.index, answer)
        return b'%b%b",%b}\n\n' % (self.prefix(answer.index), answer.text, behind)

    def with_logprobs(self, events: bytes, new: NewTokens) -> bytes:
        if not self._logprobs.is_wanted:
            return events
        progress = self._progress[new.index]
        if new.prompt is not None:
            progress.prompt_logprobs = new.prompt
        if self._incremental:
            progress.logprobs = new.tokens
        else:
            progress.logprobs += new.tokens
        events = events.replace(_LATER, self._logprob_keys(progress), 1)
        progress.shows_prompt = not self._incremental
        return events

    def ending(self, usage: Usage) -> bytes:
        return b"" if self._is_part else DONE

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        """Objects with commas between them, in brackets where the client expects a list."""
        objects = b",".join(map(self._object, answers))
        return b"[%b]" % objects if self._num_choices > 1 and not self._is_part else objects

    def _object(self, answer: Answer) -> bytes:
        """One choice of a whole answer."""
        progress = self._progress[answer.index]
        progress.prompt_logprobs = answer.prompt_logprobs
        progress.logprobs = list(answer.logprobs)
        behind = self._behind_text(answer.index, answer)
        if self._logprobs.is_wanted:
            behind = behind.replace(_LATER, self._logprob_keys(progress), 1)
        return b'{"text":"%b",%b}' % (answer.text, behind)

    def _logprob_keys(self, progress: _Progress) -> bytes:
        """The keys of ``meta_info`` about log-probabilities, each after a comma."""
        made = self._logprobs
        keys = made.output_keys(progress.logprobs, self._tokenizer)
        if progress.shows_prompt:
            prompt = self.prompts[0]
            keys |= made.input_keys(prompt, progress.prompt_logprobs, self._tokenizer)
        return b"," + orjson.dumps(keys)[1:-1]

    def _behind_text(self, index: int, answer: Answer | None) -> bytes:
        """The keys behind the text; ``answer`` once the choice is complete."""
        progress = self._progress[index]
        usage = progress.usage
        rid = self._rid if self._num_choices == 1 else f"{self._rid}_{index}"
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": None if answer is None else _finish_reason(answer, usage),
            "prompt_tokens": len(self.prompts[0]),
            "weight_version": "default",
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        }
        if answer is not None:
            meta["e2e_latency"] = round(time.perf_counter() - self._received, 6)
        keys = b'"output_ids":%b,"meta_info":%b%b}' % (
            orjson.dumps(progress.tokens),
            orjson.dumps(meta)[:-1],
            _LATER if self._logprobs.is_wanted else b"",
        )
        return keys + b',"index":%d' % (self._first + index) if self._has_index else keys


class GenerateFormat(ResponseFormat):
    """Mini-SGLang's ``/generate``: the plain text in SSE data lines, or {"text": ...}.

    A text with line ends takes several data lines in one event, which SSE clients join again.
    """

    def text_event(self, text: bytes) -> bytes:
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        return b"".join(b"data: %b\n" % line for line in lines) + b"\n"

    def closing(self, answer: Answer) -> bytes:
        return self.text_event(answer.text) if answer.text else b""

    def ending(self, usage: Usage) -> bytes:
        return DONE

    def body(self, answers: list[Answer], usage: Usage) -> bytes:
        answer = answers[0]
        return b'{"text":"%b",%b,"usage":%b}' % (answer.text, answer.end(), usage.to_json())


def _finish_reason(answer: Answer, usage: Usage) -> dict[str, Any]:
    if answer.finish_reason == "stop":
        return {"type": "stop", "matched": answer.matched}
    if answer.finish_reason == "length":
        return {"type": "length", "length": usage.completion_tokens}
    return {
        "type": "abort",
        "message": "The request was aborted.",
        "status_code": None,
        "err_type": None,
    }
