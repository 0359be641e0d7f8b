"""Frontend: the link between HTTP sessions and the engine.

Life of its engine, as ``state`` tells it:

    loading --READY--> ready --drain()--> draining --close()--> closed
    any of them --on_close()--> failed

Rules: a session submits its choices all at once or not at all; a refused submission leaves
nothing behind; every open choice ends by the engine's last row, by ``abort``, or by the engine's
death, and then its rid is free. Frames that arrive together are delivered together and flushed
once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from minisgl_fast.config import Config
from minisgl_fast.errors import ContextLengthError, EngineError, OverloadedError, RequestError
from minisgl_fast.params import SamplingDefaults
from minisgl_fast.server.deliver import Dispatcher
from minisgl_fast.server.grammar_checker import GrammarChecker, make_checker
from minisgl_fast.server.peers import Peers
from minisgl_fast.server.rate import Rate
from minisgl_fast.server.response import Choice
from minisgl_fast.text.template import ChatTemplate
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import (
    AddTemplate,
    FinishReason,
    FrameKind,
    pack_step,
    unpack_embedding,
    unpack_logprobs,
)

log = logging.getLogger("minisgl_fast.frontend")

# Seconds; finer than the peers' at the low end, where a fast server spends its time.
TTFT_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0,
    4.0, 8.0, 15.0, 30.0, 60.0, 120.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.06,
    0.08, 0.1, 0.2, 0.4, 0.8, 2.0, 8.0,
)  # fmt: skip

# A member takes long to look up and to compare with.
ADD, STEP = int(FrameKind.ADD), int(FrameKind.STEP)


class Channel(Protocol):
    """What the frontend needs of frontend_channel.FrontendChannel."""

    def send(self, kind: int, payload: bytes) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What READY tells of the engine; sizes in tokens and pages."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    max_running_requests: int
    hidden_size: int
    dtype: str = ""
    device: str = ""
    grammars: bool = False
    architecture: str = ""
    num_parameters: int = 0


class Frontend:
    """One frontend's engine, as the sessions see it."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        defaults: SamplingDefaults | None = None,
        peers: Peers | None = None,
    ) -> None:
        """``defaults``: the model's recommended sampling values, where a client gives none.
        ``peers``: the other frontends of the server."""
        self.config = config
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self.state = "loading"
        self.progress = 0.0
        self.stage = ""
        self.failure = ""
        self.facts: EngineFacts | None = None
        self.stats: dict[str, int] = {}
        self.dispatcher = Dispatcher(
            self.abort_rid, TTFT_BUCKETS, INTER_TOKEN_BUCKETS, config.stream_interval
        )
        self.on_state: Callable[[], None] | None = None
        self.generation_rate = Rate()
        self.peers = peers or Peers()
        # Connections, and so requests, spread evenly over all frontends.
        self._max_open = -(-config.max_queued_requests // config.frontends)
        self._channel: Channel | None = None
        self._checker: GrammarChecker | None = None
        self._flush_is_due = False
        self._flushes: dict[int, asyncio.Future[bool]] = {}
        self._last_ticket = 0

    def connect(self, channel: Channel) -> None:
        """Send through this channel; its frames must come to ``on_frame``."""
        self._channel = channel

    def drain(self) -> None:
        """Refuse new work; what is open goes on."""
        if self.state in ("loading", "ready"):
            self._enter("draining")

    def close(self) -> None:
        """The end of this process: close the channel, whose end-of-file is then no failure."""
        self._enter("closed")
        if self._checker is not None:
            self._checker.close()
        if self._channel is not None:
            self._channel.close()

    def check_ready(self) -> EngineFacts:
        """The engine's facts, or the error that says why there is no service now."""
        if self.state == "ready" and self.facts is not None:
            return self.facts
        if self.state == "loading":
            raise OverloadedError("The model is still loading.", retry_after_s=5)
        if self.state in ("draining", "closed"):
            raise OverloadedError("The server is shutting down.")
        raise EngineError(self.failure)

    def check_room(self, num_choices: int) -> None:
        """OverloadedError if so many more generations would exceed ``--max-queued-requests``."""
        if len(self.dispatcher) + num_choices > self._max_open:
            raise OverloadedError("The request queue is full. Please try again later.")

    def grammars(self, param: str) -> GrammarChecker:
        """What checks grammars. RequestError, of the field that asks for one, if there are none."""
        if not self.check_ready().grammars:
            raise RequestError(
                f"This server cannot follow {param}: structured output needs the package "
                "llguidance (pip install 'minisgl_fast[structured]') on the engine's side.",
                param=param,
            )
        if self._checker is None:
            self._checker = make_checker(self.tokenizer.vocabulary())
        return self._checker

    def room_for(self, prompt: Sequence[int], max_tokens: int | None, *, param: str) -> int:
        """How many tokens to generate behind this prompt at most.

        ``max_tokens``: what the client asked for, None to fill the context. ContextLengthError if
        the prompt, or both together, are too long; ``param`` names the prompt's field.
        """
        limit = self.check_ready().max_model_len
        room = limit - len(prompt)
        if not prompt:
            raise RequestError(f"{param} must not be empty.", param=param)
        if room < 1:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, your {param} "
                f"has {len(prompt)} tokens.",
                param=param,
            )
        if max_tokens is None:
            return room
        if max_tokens > room:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{len(prompt) + max_tokens} tokens: {len(prompt)} in your {param} and "
                f"{max_tokens} for the completion. Please reduce one of them.",
                param="max_tokens",
            )
        return max_tokens

    def submit(
        self, choice: Choice, prompt: Sequence[int], add: AddTemplate, seed: int, max_tokens: int
    ) -> int:
        """Send one generation to the engine; returns its rid. Lengths were checked before.

        ``add``: what the generation asks for; a choice that asks for log-probabilities has a place
        for them.
        """
        rid = self.dispatcher.open_choice(choice)
        self._send(ADD, add.pack(rid, prompt, seed, max_tokens))
        return rid

    def abort(self, choice: Choice) -> bool:
        """End a choice before its time; False if it has ended already."""
        if not self.dispatcher.close(choice):
            return False
        self.abort_rid(choice.rid)
        return True

    def abort_rid(self, rid: int) -> None:
        """Tell the engine to drop a request."""
        self._send(FrameKind.ABORT, rid.to_bytes(4, "little"))

    def cut(self, choice: Choice) -> None:
        """End an open choice before its time, but for its client: with what there is of it, as if
        the engine had aborted it."""
        self.abort_rid(choice.rid)
        self._deliver(pack_step([(choice.rid, -1, FinishReason.ABORTED)]))

    async def flush_cache(self) -> bool:
        """Let the engine forget all cached prefixes; False if it has work that may use them."""
        self.check_ready()
        self._last_ticket = ticket = (self._last_ticket + 1) % 2**32
        answer = self._flushes[ticket] = asyncio.get_running_loop().create_future()
        self._send(FrameKind.FLUSH, ticket.to_bytes(4, "little"))
        try:
            is_flushed: bool = await answer
        finally:
            del self._flushes[ticket]
        return is_flushed

    # From the channel

    def on_frame(self, kind: int, payload: bytes) -> None:
        """Take one frame of the engine."""
        if kind == STEP:
            self._deliver(payload)
        elif kind == FrameKind.LOGPROBS:
            for record in unpack_logprobs(payload):
                asking = self.dispatcher.find(record.rid)
                if asking is not None and asking.logprobs is not None:
                    asking.logprobs.add(record)
        elif kind == FrameKind.EMBEDDING:
            rid, vector = unpack_embedding(payload)
            asking = self.dispatcher.find(rid)
            if asking is not None:
                asking.embedding = vector
        elif kind == FrameKind.STATS:
            self.stats = orjson.loads(payload)
            self.generation_rate.update(self.stats["generated_tokens"], time.monotonic())
        elif kind == FrameKind.FLUSHED:
            answer = self._flushes.get(int.from_bytes(payload[:4], "little"))
            if answer is not None and not answer.done():
                answer.set_result(bool(payload[4]))
        elif kind == FrameKind.PROGRESS:
            report: dict[str, Any] = orjson.loads(payload)
            self.stage = report["stage"]
            self.progress = report["done"] / report["total"] if report["total"] else 0.0
        elif kind == FrameKind.READY:
            facts = orjson.loads(payload)
            self.facts = EngineFacts(
                **{name: facts[name] for name in EngineFacts.__slots__ if name in facts}
            )
            if self.state == "loading":
                self._enter("ready")

    def on_close(self, reason: str = "The engine process ended unexpectedly.") -> None:
        """The engine is gone: every open session gets an error, new ones are refused."""
        if self.state in ("failed", "closed"):
            return
        log.info("engine failed: %s", reason)
        self.failure = "The inference engine failed."
        self._enter("failed")
        self._flush()
        for choice in self.dispatcher.choices():
            choice.response.fail(EngineError(self.failure))
        for answer in self._flushes.values():
            if not answer.done():
                answer.set_exception(EngineError(self.failure))

    def _deliver(self, payload: bytes) -> None:
        """Take the rows of a STEP frame; what they bring is written in this turn of the loop."""
        self.dispatcher.deliver(payload, time.perf_counter())
        if not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        self.dispatcher.flush()

    def _send(self, kind: int, payload: bytes) -> None:
        if self._channel is not None and self.state not in ("failed", "closed"):
            self._channel.send(kind, payload)

    def _enter(self, state: str) -> None:
        self.state = state
        if self.on_state is not None:
            self.on_state()
