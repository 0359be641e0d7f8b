"""A whole frontend without sockets, before an engine played by hand: the same request in the short
way and in the long one."""

import asyncio
import json
import re
from types import SimpleNamespace

import pytest
from fake_engine import EOS, FACTS, MODEL, unpack_add

from minisgl_fast.api import openai
from minisgl_fast.api.app import Api
from minisgl_fast.api.openapi import OpenApi
from minisgl_fast.config import Config
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.http import HttpServer
from minisgl_fast.server.http_rules import HttpLimits
from minisgl_fast.wire import FinishReason, FrameKind, pack_step

DEFAULTS = SimpleNamespace(
    temperature=0.6, top_p=0.95, top_k=20, min_p=None, repetition_penalty=None
)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class NoLane:
    """In the place of PlainLane: every request goes the way that all can go."""

    def __init__(self, *arguments):
        pass

    def take(self, request, exchange, received):
        return False


class Transport:
    """What a connection writes to."""

    def __init__(self):
        self.written = b""
        self.aborted = False

    def write(self, data):
        self.written += data

    def get_extra_info(self, name):
        return None

    def set_write_buffer_limits(self, high):
        pass

    def get_write_buffer_size(self):
        return 0

    def abort(self):
        self.aborted = True

    def close(self):
        pass


class Driver:
    """A frontend with one connection; to be made and used on a running loop.

    sent   the frames to the engine, in order
    """

    def __init__(self, tokenizer, template, *, lane=True, facts=FACTS, **settings):
        config = Config(model=MODEL, **settings)
        self.frontend = Frontend(config, tokenizer, template, DEFAULTS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OpenApi, "describe", lambda self, routes: None)  # it takes long
            if not lane:
                patch.setattr(openai, "PlainLane", NoLane)
            self.api = Api(config, self.frontend)
        self.sent = []
        self.frontend.connect(SimpleNamespace(send=lambda *frame: self.sent.append(frame)))
        self.frontend.on_frame(FrameKind.READY, json.dumps(facts).encode())
        self.http = HttpServer(self.api, HttpLimits(), admit=lambda request: None)
        self.http.start(asyncio.get_running_loop())
        self.connect()

    def connect(self):
        self.transport = Transport()
        self.connection = self.http.connection()
        self.connection.connection_made(self.transport)

    async def send(self, path, body):
        """Send a request; the types of the responses that it opened."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: r1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        num_open = len(self.frontend.dispatcher)
        self.connection.data_received(head.encode() + body)
        while len(self.frontend.dispatcher) == num_open and not self.transport.written:
            await asyncio.sleep(0)  # a long text is encoded in a thread
        return [type(c.response).__name__ for c in self.frontend.dispatcher.choices()]

    async def step(self, *rows, first=()):
        """A frame of the engine's, and what it makes the frontend write."""
        self.frontend.on_frame(FrameKind.STEP, pack_step(rows, first))
        for _ in range(3):
            await asyncio.sleep(0)

    async def answer(self, tokens, reason=FinishReason.LENGTH, cached=3):
        """Play the engine for the open choices: all of them say the tokens. What was written."""
        rids = [choice.rid for choice in self.frontend.dispatcher.choices()]
        first = [(rid, cached) for rid in rids]
        for i, token in enumerate(tokens):
            last = i + 1 == len(tokens)
            open_rids = [r for r in rids if self.frontend.dispatcher.find(r) is not None]
            rows = [(rid, token, reason if last else FinishReason.RUNNING) for rid in open_rids]
            await self.step(*rows, first=first)
            first = ()
        return self.take()

    def take(self):
        """What was written, but for what differs from time to time."""
        written, self.transport.written = self.transport.written, b""
        written = re.sub(rb'"created":\d{10}', b'"created":0', written)
        return re.sub(rb"\r\ndate: [^\r]*", b"", written)

    def adds(self):
        """The requests that reached the engine since the last call."""
        found = [unpack_add(payload) for kind, payload in self.sent if kind == FrameKind.ADD]
        self.sent.clear()
        return found


def counters(driver):
    """What metrics have counted, but for times."""
    snapshot = driver.api.metrics.snapshot()
    histograms = [[count for _, count in buckets] for buckets, _ in snapshot.pop("histograms")]
    return {**snapshot, "observed": [counts[-1] for counts in histograms]}


def ended(tokens, tokenizer):
    """Tokens of a text, with the model's own end."""
    return [*tokenizer.encode(tokens), EOS]
