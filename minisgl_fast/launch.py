"""Starts a server, watches over it and ends it.

The order of a start: bind the port (``/health`` says ``loading`` from here on), spawn the engine
process, find or download the model, load tokenizer and template while the engine process imports
torch, send CONFIG, wait for READY.

Exit codes: 0 drained after a signal, 1 a setting or a file that cannot work, 2 a usage error,
3 the engine failed, 4 the drain timed out.

Rules: the first SIGTERM or SIGINT refuses new work and lets what runs finish, for at most
``--drain-timeout``; the second ends the process at once. The engine sees its end of the socketpair
close and exits by itself; if the engine goes first, every open stream gets an error event and the
process ends.
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
from importlib.util import find_spec
from pathlib import Path

import orjson
import uvloop

from minisgl_fast.api.app import Api
from minisgl_fast.channel import FrontendChannel
from minisgl_fast.config import Config
from minisgl_fast.errors import ConfigError, OverloadedError
from minisgl_fast.hub import resolve_model
from minisgl_fast.model.config import GenerationConfig
from minisgl_fast.progress import ConsoleProgress
from minisgl_fast.server.access import Access
from minisgl_fast.server.frontend import Frontend
from minisgl_fast.server.http import JSON, Exchange, HttpLimits, HttpRequest, HttpServer
from minisgl_fast.server.tls import HANDSHAKE_TIMEOUT_S, SHUTDOWN_TIMEOUT_S, server_context
from minisgl_fast.text.template import ChatTemplate
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import FrameKind

EXIT_DRAINED = 0
EXIT_CONFIG = 1
EXIT_ENGINE = 3
EXIT_DRAIN_TIMED_OUT = 4

OPEN_WHILE_DRAINING = ("/health", "/ready", "/metrics")
LISTEN_BACKLOG = 2048
DRAIN_POLL_S = 0.02
# For the last bytes of failing streams to leave, and for the engine to follow its frontend.
LAST_WORDS_S = 0.2
ENGINE_EXIT_TIMEOUT_S = 5.0


def serve(config: Config) -> int:
    """Serve until a signal or a failure; the process's exit code. Raises ConfigError."""
    _raise_open_file_limit()
    return uvloop.run(_Launch(config).run())


class _Launch:
    """One server from its start to its end."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._progress = ConsoleProgress()
        self._frontend: Frontend | None = None
        self._access = Access.load(config)
        self._tls = None
        if config.ssl_certfile is not None:
            self._tls = server_context(config.ssl_certfile, config.ssl_keyfile)
        self._server = HttpServer(
            self._access.guard(self._answer_loading),
            HttpLimits(max_body=config.max_body),
            self._access.admit,
        )
        self._address = ""  # as in a URL, with the real port
        self._ended: asyncio.Future[int] | None = None
        self._num_signals = 0
        self._drain: asyncio.Task[None] | None = None
        # From a failure or the end on, the engine's end of the channel closing is no news.
        self._is_ending = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._server.start(loop)
        listener = await self._listen(loop)
        print(f"Starting {self._config.model} on {self._address}", file=sys.stderr, flush=True)
        if not self._access.needs_key and not _is_loopback(self._config.host):
            print(
                "minisgl-fast: warning: whoever reaches this address can use the server. "
                "Set --api-key-file, or --host 127.0.0.1.",
                file=sys.stderr,
                flush=True,
            )
        ours, theirs = socket.socketpair()
        engine = _spawn_engine(theirs)
        theirs.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        _, channel = await loop.create_connection(
            lambda: FrontendChannel(self._on_frame, self._on_engine_end), sock=ours
        )
        start = asyncio.ensure_future(self._start(loop, channel))
        try:
            await asyncio.wait((start, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                start.result()
            exit_code = await self._ended
        finally:
            self._is_ending = True
            listener.close()
            self._server.close()
            channel.close()
            self._progress.close()
            if self._frontend is None or self._frontend.facts is None:
                engine.kill()  # it is importing or loading and would notice the end too late
            await loop.run_in_executor(None, _end_engine, engine)
        if not start.done():
            # The threads of a download do not end when asked to, and an exit would wait for them.
            os._exit(exit_code)
        return exit_code

    async def _listen(self, loop: asyncio.AbstractEventLoop) -> asyncio.Server:
        host, port = self._config.host, self._config.port
        try:
            listener = await loop.create_server(
                self._server.connection,
                host,
                port,
                backlog=LISTEN_BACKLOG,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self._tls else None,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S if self._tls else None,
            )
        except OSError as error:
            unknown_host = isinstance(error, socket.gaierror)
            reason = error.strerror if unknown_host else os.strerror(error.errno or 0)
            raise ConfigError(
                f"Cannot listen on {host}:{port}: {reason}. "
                "Choose another address with --host and --port."
            ) from error
        port = listener.sockets[0].getsockname()[1]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return listener

    async def _start(self, loop: asyncio.AbstractEventLoop, channel: FrontendChannel) -> None:
        """Load what the frontend needs, then tell the engine what to load."""
        path = await loop.run_in_executor(None, self._resolve)
        tokenizer, template, defaults = await loop.run_in_executor(None, self._load_text, path)
        frontend = Frontend(self._config, tokenizer, template, defaults)
        frontend.connect(channel)
        frontend.on_state = self._on_state
        self._frontend = frontend
        self._server.handler = self._access.guard(Api(self._config, frontend))
        settings = {
            "config": self._config.to_dict(),
            "model_path": str(path),
            "vocab_limit": tokenizer.vocab_size,
            "eos_ids": sorted(tokenizer.eos_ids),
            "vocabulary": tokenizer.vocabulary().to_text() if find_spec("llguidance") else None,
        }
        channel.send(FrameKind.CONFIG, json.dumps(settings).encode())
        # While the engine loads, or after: requests need not wait for it.
        tokenizer.accelerate_later()

    def _resolve(self) -> Path:
        config = self._config
        return resolve_model(
            config.model,
            revision=config.revision,
            source=config.model_source,
            weights=not config.dummy_weight,
            progress=self._progress,
        )

    def _load_text(self, path: Path) -> tuple[Tokenizer, ChatTemplate, GenerationConfig | None]:
        defaults = None
        if self._config.generation_config == "model":
            defaults = GenerationConfig.load(path)
        template = ChatTemplate.load(path, self._config.chat_template)
        return Tokenizer.load(path), template, defaults

    # What happens

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == FrameKind.FATAL:
            report = json.loads(payload)
            self._fail(report["message"], report["exit_code"])
            return
        if kind == FrameKind.PROGRESS:
            report = json.loads(payload)
            self._progress(report["stage"], report["done"], report["total"])
        if self._frontend is not None:
            self._frontend.on_frame(kind, payload)

    def _on_engine_end(self) -> None:
        self._fail("The engine process ended unexpectedly.", EXIT_ENGINE)

    def _fail(self, message: str, exit_code: int) -> None:
        """The engine is gone: tell every client and the terminal, then end."""
        if self._is_ending:
            return
        self._is_ending = True
        self._progress.close()
        print(f"minisgl-fast: error: {message}", file=sys.stderr, flush=True)
        if self._frontend is not None:
            self._frontend.on_close(message)
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._end, exit_code)

    def _on_state(self) -> None:
        """The engine's state changed; the first ``ready`` is announced."""
        if self._frontend is None or self._frontend.state != "ready":
            return
        gc.collect()
        gc.freeze()
        print(f"API server is ready to serve on {self._address}", flush=True)
        scheme = "http" if self._tls is None else "https"
        key = '-H "Authorization: Bearer $KEY" ' if self._access.needs_key else ""
        print(
            f"Try: curl {scheme}://{self._address}/v1/chat/completions {key}"
            "-H 'Content-Type: application/json' "
            '-d \'{"messages": [{"role": "user", "content": "What is the capital of France?"}], '
            '"max_tokens": 64}\'',
            flush=True,
        )

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            os._exit(EXIT_DRAIN_TIMED_OUT)
        self._drain = asyncio.ensure_future(self._drain_and_end())

    async def _drain_and_end(self) -> None:
        """Let what runs finish, but not for ever."""
        if self._frontend is not None:
            self._frontend.drain()
        self._server.drain(OPEN_WHILE_DRAINING)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.drain_timeout_s
        while self._server.num_exchanges and loop.time() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        if not self._is_ending:  # an engine that failed meanwhile has its own exit code
            self._end(EXIT_DRAIN_TIMED_OUT if self._server.num_exchanges else EXIT_DRAINED)

    def _end(self, exit_code: int) -> None:
        assert self._ended is not None
        if not self._ended.done():
            self._ended.set_result(exit_code)

    def _answer_loading(self, request: HttpRequest, exchange: Exchange) -> None:
        """The handler until the frontend's parts are loaded."""
        if request.path in ("/health", "/ready"):
            exchange.respond(503, orjson.dumps({"state": "loading", "progress": 0.0}), JSON)
        else:
            exchange.fail(OverloadedError("The model is still loading.", retry_after_s=5))


def _spawn_engine(channel: socket.socket) -> subprocess.Popen[bytes]:
    """The engine process on its end of the socketpair.

    A fresh interpreter, not a fork: nothing of the frontend's loop or threads is in it. Ctrl-C
    reaches the whole process group, and what is ignored stays ignored in a child: so the engine
    ignores it from its first instruction on. To be called before there are signal handlers.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "minisgl_fast.engine.worker", str(channel.fileno())],
            pass_fds=[channel.fileno()],
            stdin=subprocess.DEVNULL,
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def _end_engine(engine: subprocess.Popen[bytes]) -> None:
    """Wait for the engine, which follows the end of its channel; kill it if it does not."""
    try:
        engine.wait(ENGINE_EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        engine.kill()
        engine.wait()


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches such an address."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _raise_open_file_limit() -> None:
    """Every connection is a file: take what the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
