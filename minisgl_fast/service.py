"""Service: one process's HTTP side, from its listener to its end.

The main process has one (launch.py), and every extra frontend (extra_frontend.py).

Rules: until the model's tokenizer is loaded, every request is answered that the model is loading;
the engine's death is an error event in every open stream; a drain refuses new work and lets what
runs finish.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from minisgl_fast.api.app import Api
from minisgl_fast.bench.fake_model import write_fake_model
from minisgl_fast.config import FAKE_MODEL, Config
from minisgl_fast.errors import ConfigError, OverloadedError
from minisgl_fast.frontend_channel import FrontendChannel
from minisgl_fast.model.config import GenerationConfig
from minisgl_fast.server.access import Access
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.http import JSON, Exchange, HttpLimits, HttpRequest, HttpServer
from minisgl_fast.server.peers import Peers
from minisgl_fast.server.tls import HANDSHAKE_TIMEOUT_S, SHUTDOWN_TIMEOUT_S, server_context
from minisgl_fast.text.template import ChatTemplate
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import FrameKind

OPEN_WHILE_DRAINING = ("/health", "/ready", "/metrics")
LISTEN_BACKLOG = 2048
DRAIN_POLL_S = 0.02
GC_THRESHOLD = 50_000
EXIT_ENGINE = 3
# Looking a member up and comparing with it takes longer than all else that a frame needs here.
FATAL, PROGRESS = int(FrameKind.FATAL), int(FrameKind.PROGRESS)

TextParts = tuple[Tokenizer, ChatTemplate, GenerationConfig | None]


class Service:
    """HTTP before one channel to the engine.

    on_ready    called when requests are welcome
    on_progress called with (stage, done, total) while the engine loads
    on_failure  called once with (message, exit code) when the engine is gone, after every open
                stream was told
    """

    def __init__(
        self,
        config: Config,
        *,
        on_ready: Callable[[], None],
        on_failure: Callable[[str, int], None],
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.access = Access.load(config)
        self.tls = None
        if config.ssl_certfile is not None:
            self.tls = server_context(config.ssl_certfile, config.ssl_keyfile)
        self.peers = Peers()
        self.frontend: Frontend | None = None
        self._config = config
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._on_progress = on_progress
        self._server = HttpServer(
            self.access.guard(self._answer_loading),
            HttpLimits(max_body=config.max_body),
            self.access.admit,
        )
        self._listeners: list[asyncio.Server] = []
        self._channel: FrontendChannel | None = None
        # From a failure or the end on, the engine's end of the channel closing is no news.
        self.is_ending = False

    @property
    def is_loaded(self) -> bool:
        """Whether the engine has been ready."""
        return self.frontend is not None and self.frontend.facts is not None

    def start(self) -> None:
        """Before the first connection, on the running loop."""
        self._server.start(asyncio.get_running_loop())

    async def listen(self, host: str, port: int, *, shared: bool) -> list[tuple[Any, ...]]:
        """Bind a port, with other processes if ``shared``; the addresses. OSError."""
        listener = await asyncio.get_running_loop().create_server(
            self._server.connection,
            host,
            port,
            backlog=LISTEN_BACKLOG,
            reuse_port=shared,
            ssl=self.tls,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self.tls else None,
            ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S if self.tls else None,
        )
        self._listeners.append(listener)
        return [sock.getsockname() for sock in listener.sockets]

    async def connect(self, sock: socket.socket) -> FrontendChannel:
        """Take the frontend's end of the engine's channel."""
        channel = self._channel = FrontendChannel(self._on_frame, self._on_engine_end)
        if self.frontend is not None:
            self.frontend.connect(channel)
        await asyncio.get_running_loop().create_connection(lambda: channel, sock=sock)
        return channel

    def load(self, parts: TextParts) -> None:
        """Serve with this model's text side, once the engine is ready. ``load`` and ``connect`` go
        in any order, but READY must not come before both."""
        tokenizer, template, defaults = parts
        frontend = Frontend(self._config, tokenizer, template, defaults, self.peers)
        if self._channel is not None:
            frontend.connect(self._channel)
        frontend.on_state = self._on_state
        self.frontend = frontend
        self._server.handler = self.access.guard(Api(self._config, frontend))

    async def drain(self, deadline: float) -> bool:
        """Let what runs finish, up to a time of the loop's clock; whether all has."""
        if self.frontend is not None:
            self.frontend.drain()
        self._server.drain(OPEN_WHILE_DRAINING)
        loop = asyncio.get_running_loop()
        while self._server.num_exchanges and loop.time() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        return not self._server.num_exchanges

    def fail(self, message: str, exit_code: int) -> None:
        """The engine is gone: tell every client."""
        if self.is_ending:
            return
        self.is_ending = True
        if self.frontend is not None:
            self.frontend.on_close(message)
        self._on_failure(message, exit_code)

    def close(self) -> None:
        """The end: close listeners, connections and the channel."""
        self.is_ending = True
        for listener in self._listeners:
            listener.close()
        self._server.close()
        if self._channel is not None:
            self._channel.close()

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == FATAL:
            report = json.loads(payload)
            self.fail(report["message"], report["exit_code"])
            return
        if kind == PROGRESS and self._on_progress is not None:
            report = json.loads(payload)
            self._on_progress(report["stage"], report["done"], report["total"])
        if self.frontend is not None:
            self.frontend.on_frame(kind, payload)

    def _on_engine_end(self) -> None:
        self.fail("The engine process ended unexpectedly.", EXIT_ENGINE)

    def _on_state(self) -> None:
        if self.frontend is not None and self.frontend.state == "ready":
            gc.collect()
            gc.freeze()
            # Requests leave no cycles: what is young and alive need not be looked at so often.
            gc.set_threshold(GC_THRESHOLD)
            self._on_ready()

    def _answer_loading(self, request: HttpRequest, exchange: Exchange) -> None:
        """The handler until the frontend's parts are loaded."""
        if request.path in ("/health", "/ready"):
            exchange.respond(503, orjson.dumps({"state": "loading", "progress": 0.0}), JSON)
        else:
            exchange.fail(OverloadedError("The model is still loading.", retry_after_s=5))


def load_text(config: Config, path: Path) -> TextParts:
    """What a frontend needs of the model's folder or file."""
    if config.fake_engine and config.model == FAKE_MODEL:
        with tempfile.TemporaryDirectory() as name:
            write_fake_model(Path(name))
            return Tokenizer.load(name), ChatTemplate.load(Path(name), config.chat_template), None
    defaults = GenerationConfig.load(path) if config.generation_config == "model" else None
    template = ChatTemplate.load(path, config.chat_template)
    return Tokenizer.load(path), template, defaults


def spawn(module: str, channels: list[socket.socket]) -> subprocess.Popen[bytes]:
    """A process of a module's main with its ends of socketpairs, which are closed here.

    A fresh interpreter, not a fork: nothing of this process's loop or threads is in it. Ctrl-C
    reaches the whole process group, and what is ignored stays ignored in a child: so the child
    ignores it from its first instruction on. To be called before there are signal handlers.
    """
    descriptors = [channel.fileno() for channel in channels]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
        )
    finally:
        signal.signal(signal.SIGINT, handler)
        for channel in channels:
            channel.close()


def cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    """The error to end with when a port cannot be bound."""
    unknown_host = isinstance(error, socket.gaierror)
    reason = error.strerror if unknown_host else os.strerror(error.errno or 0)
    return ConfigError(
        f"Cannot listen on {host}:{port}: {reason}. Choose another address with --host and --port."
    )


def raise_open_file_limit() -> None:
    """Every connection is a file: take what the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
