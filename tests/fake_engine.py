"""An engine with no model, on the other end of a real channel: it says what its script says.

``script(request)`` returns the tokens of one request, of which the last may be EOS; the fake keeps
max_tokens, ignore_eos, stop ids and aborts as the real one does, and makes one token per request
and step.
"""

import asyncio
import json
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minisgl_fast.frontend_channel import FrontendChannel
from minisgl_fast.wire import (
    AddFlag,
    FinishReason,
    FrameKind,
    LogprobsRecord,
    pack_embedding,
    pack_logprobs,
    pack_step,
)

MODEL = "Qwen/Qwen3-0.6B"
# Emoji and Chinese are cut inside characters by their tokens.
ANSWER = 'The capital of France is Paris 🥐🗼.\nIt says "bonjour" 你好鑫 \\ Jürgen'


def eventually(condition, timeout_s=5.0):
    """Wait until a condition on another thread's objects holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


ADD_HEADER = struct.Struct("<IIQQ6f4i5IihBx")
EOS = 151645  # <|im_end|> of Qwen3
FACTS = {
    "max_model_len": 4096,
    "vocab_size": 151936,
    "hidden_size": 8,
    "num_pages": 1000,
    "page_size": 16,
    "dtype": "float32",
    "device": "fake",
    "grammars": True,
    "max_running_requests": 64,
    "architecture": "Qwen3ForCausalLM",
    "num_parameters": 596_049_920,
}


@dataclass
class FakeRequest:
    """One ADD, unpacked, and how far it is."""

    rid: int
    ignore_eos: bool
    seed: int
    cache_salt: int
    temperature: float
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    top_k: int
    max_tokens: int
    min_tokens: int
    priority: int
    prompt: list[int]
    stop_ids: list[int]
    bias: dict[int, float]
    logprob_ids: list[int]
    grammar: bytes
    prompt_logprobs_from: int = -1
    num_top_logprobs: int = -1
    task: int = 0
    tokens: list[int] = field(default_factory=list)
    num_done: int = 0


def unpack_add(payload: bytes) -> FakeRequest:
    rid, flags, *values = ADD_HEADER.unpack_from(payload)
    *values, num_prompt, num_stop_ids, num_bias, num_ids, num_grammar, first, num_top, task = values
    at = ADD_HEADER.size

    def take(code: str, count: int) -> list[int]:
        nonlocal at
        at += 4 * count
        return list(struct.unpack_from(f"<{count}{code}", payload, at - 4 * count))

    prompt, stop_ids, bias_ids = take("i", num_prompt), take("i", num_stop_ids), take("i", num_bias)
    bias = dict(zip(bias_ids, take("f", num_bias), strict=True))
    logprob_ids = take("i", num_ids)
    assert len(payload) == at + num_grammar
    return FakeRequest(
        rid, bool(flags & AddFlag.IGNORE_EOS), *values, prompt, stop_ids, bias, logprob_ids,
        payload[at:], first, num_top, task,
    )  # fmt: skip


def logprob_of(position: int, token: int) -> float:
    """The log-probability of a token at a position; exact in float32."""
    return -1.0 - (position * 31 + token * 7) % 64 / 8


def top_of(position: int, count: int) -> list[tuple[int, float]]:
    """The largest ones there: likelier than all others."""
    return [(1000 + position + i, -0.25 - i / 64) for i in range(count)]


def embedding_of(prompt: Sequence[int]) -> list[float]:
    return [float(sum(prompt) % (7 + i) - 3) for i in range(FACTS["hidden_size"])]


class FakeEngine:
    """Answers the frames of one frontend.

    hold     while True no step is made
    cached   prompt tokens reported as found in the cache
    added, aborted   every request, and every rid of an ABORT, in order
    """

    def __init__(self, script: Callable[[FakeRequest], Sequence[int]]) -> None:
        self.script = script
        self.hold = False
        self.num_flushes = 0
        self.cached = 4
        self.added: list[FakeRequest] = []
        self.aborted: list[int] = []
        self.running: dict[int, FakeRequest] = {}
        self.reason_of: dict[int, FinishReason] = {}
        self.end_of_all: FinishReason | None = None
        self.channel = FrontendChannel(self._on_frame, lambda: None)

    def ready(self) -> None:
        self.channel.send(FrameKind.READY, json.dumps(FACTS).encode())

    async def run(self) -> None:
        """Make a step in every turn of the loop, as long as there is something to do."""
        while True:
            await asyncio.sleep(0 if self.running and not self.hold else 0.001)
            if not self.hold:
                self.step()

    def step(self) -> None:
        rows, first = [], []
        for request in list(self.running.values()):
            if not request.num_done:
                first.append((request.rid, self.cached))
                self._send_prompt_logprobs(request)
            position = len(request.prompt) + request.num_done
            token, reason = self._next(request)
            if token >= 0 and request.num_top_logprobs >= 0:
                self._send_logprobs(request, False, position, [token])
            rows.append((request.rid, token, reason))
            if reason != FinishReason.RUNNING:
                del self.running[request.rid]
        if rows:
            self.channel.send(FrameKind.STEP, pack_step(rows, first))
            self.send_stats()

    def _send_prompt_logprobs(self, request: FakeRequest) -> None:
        if request.task:
            vector = struct.pack(f"<{FACTS['hidden_size']}f", *embedding_of(request.prompt))
            self.channel.send(FrameKind.EMBEDDING, pack_embedding(request.rid, vector))
        first = max(request.prompt_logprobs_from, 1)
        if request.prompt_logprobs_from >= 0 and first < len(request.prompt):
            middle = (first + len(request.prompt)) // 2  # as if it came in two chunks
            for start, end in ((first, middle), (middle, len(request.prompt))):
                if start < end:
                    self._send_logprobs(request, True, start, request.prompt[start:end])

    def _send_logprobs(
        self, request: FakeRequest, is_prompt: bool, position: int, tokens: list[int]
    ) -> None:
        num_top = max(request.num_top_logprobs, 0)
        places = range(position, position + len(tokens))
        tops = [pair for place in places for pair in top_of(place, num_top)]
        record = LogprobsRecord(
            request.rid,
            is_prompt,
            position,
            num_top,
            array("i", tokens),
            array("f", [logprob_of(p, t) for p, t in zip(places, tokens, strict=True)]),
            array("i", [token for token, _ in tops]),
            array("f", [value for _, value in tops]),
            array("f", [logprob_of(p, t) for p in places for t in request.logprob_ids]),
        )
        self.channel.send(FrameKind.LOGPROBS, pack_logprobs([record]))

    def send_stats(self) -> None:
        used = sum(-(-(len(r.prompt) + r.num_done) // 16) for r in self.running.values())
        stats = {
            "running": len(self.running),
            "queued": 0,
            "queued_tokens": 0,
            "pages_total": 1000,
            "pages_free": 1000 - used,
            "pages_cached": 0,
            "pages_used": used,
            "preemptions": 0,
            "steps": 1,
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "generated_tokens": 0,
            "aborted": len(self.aborted),
        }
        self.channel.send(FrameKind.STATS, json.dumps(stats).encode())

    def _next(self, request: FakeRequest) -> tuple[int, FinishReason]:
        if self.end_of_all is not None:
            return -1, self.end_of_all
        if request.task or request.max_tokens == 0:
            return -1, FinishReason.LENGTH
        token = request.tokens[request.num_done % len(request.tokens)]
        request.num_done += 1
        if token == EOS and not request.ignore_eos:
            return token, FinishReason.EOS
        if token in request.stop_ids:
            return token, FinishReason.STOP_TOKEN
        if request.num_done == request.max_tokens:
            return token, FinishReason.LENGTH
        return token, FinishReason.RUNNING

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == FrameKind.ADD:
            request = unpack_add(payload)
            request.tokens = list(self.script(request))
            self.added.append(request)
            self.running[request.rid] = request
        elif kind == FrameKind.ABORT:
            rid = int.from_bytes(payload, "little")
            self.aborted.append(rid)
            self.running.pop(rid, None)
            self.send_stats()
        elif kind == FrameKind.FLUSH:
            is_idle = not self.running
            self.num_flushes += is_idle
            self.channel.send(FrameKind.FLUSHED, payload + bytes((is_idle,)))
