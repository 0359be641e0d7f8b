"""Starts a server, watches over it and ends it.

The order of a start: bind the port (``/health`` says ``loading`` from here on), spawn the engine
process, find or download the model, load tokenizer and template while the engine process imports
torch, send CONFIG, wait for READY.

Exit codes: 0 drained after a signal, 1 a setting or a file that cannot work, 2 a usage error,
3 the engine failed, 4 the drain timed out.

Rules: the first SIGTERM or SIGINT refuses new work and lets what runs finish, for at most
``--drain-timeout``; the second ends the process at once. The engine sees its end of the socketpair
close and exits by itself; if the engine goes first, every open stream gets an error event and the
process ends. With ``--frontends N`` this process is the first of N (extra_frontend.py): it starts
the others, has them drain, and they end with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import uvloop

from minisgl_fast.bench.fake_model import FAKE_TEXT
from minisgl_fast.config import FAKE_MODEL, Config
from minisgl_fast.extra_frontend import LAST_WORDS_S, ExtraFrontend
from minisgl_fast.frontend_channel import FrontendChannel
from minisgl_fast.hub import resolve_model
from minisgl_fast.progress import ConsoleProgress
from minisgl_fast.server.access import is_loopback
from minisgl_fast.service import (
    DRAIN_POLL_S,
    EXIT_ENGINE,
    Service,
    TextParts,
    cannot_listen,
    load_text,
    raise_open_file_limit,
    spawn,
)
from minisgl_fast.wire import FrameKind

__all__ = ["EXIT_CONFIG", "EXIT_DRAINED", "EXIT_DRAIN_TIMED_OUT", "EXIT_ENGINE", "serve"]

ENGINE = "minisgl_fast.engine.worker"
EXIT_DRAINED = 0
EXIT_CONFIG = 1
EXIT_DRAIN_TIMED_OUT = 4

# For engine and frontends to follow the end of their channels.
PROCESS_EXIT_TIMEOUT_S = 5.0


def serve(config: Config) -> int:
    """Serve until a signal or a failure; the process's exit code. Raises ConfigError."""
    raise_open_file_limit()
    return uvloop.run(_Launch(config).run())


class _Launch:
    """One server from its start to its end."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._progress = ConsoleProgress()
        self._service = Service(
            config,
            on_ready=self._announce,
            on_failure=self._on_failure,
            on_progress=self._progress,
        )
        self._extras = [
            ExtraFrontend(self._service, self._on_extra) for _ in range(config.frontends - 1)
        ]
        self._address = ""  # as in a URL, with the real port
        self._addresses: list[tuple[str, int]] = []
        self._path: Path | None = None  # known from when the frontends load
        self._channel: FrontendChannel | None = None
        self._is_announced = False
        self._replacements: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[int] | None = None
        self._num_signals = 0
        self._drain: asyncio.Task[None] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._service.start()
        await self._listen()
        print(f"Starting {self._config.model} on {self._address}", file=sys.stderr, flush=True)
        if not self._service.access.needs_key and not is_loopback(self._config.host):
            print(
                "minisgl-fast: warning: whoever reaches this address can use the server. "
                "Set --api-key-file, or --host 127.0.0.1.",
                file=sys.stderr,
                flush=True,
            )
        pairs = [socket.socketpair() for _ in range(self._config.frontends)]
        module = "minisgl_fast.engine.fake" if self._config.fake_engine else ENGINE
        engine = spawn(module, [theirs for _, theirs in pairs])
        for extra, (ours, _) in zip(self._extras, pairs[1:], strict=True):
            extra.spawn(ours)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        channel = self._channel = await self._service.connect(pairs[0][0])
        for extra in self._extras:
            await extra.connect()
        start = asyncio.ensure_future(self._start(loop, channel))
        try:
            await asyncio.wait((start, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                start.result()
            exit_code = await self._ended
        finally:
            self._service.close()
            for extra in self._extras:
                extra.close()
            self._progress.close()
            if not self._service.is_loaded:
                engine.kill()  # it is importing or loading and would notice the end too late
            await loop.run_in_executor(None, self._wait_for_processes, engine)
        if not start.done():
            # The threads of a download do not end when asked to, and an exit would wait for them.
            os._exit(exit_code)
        return exit_code

    async def _listen(self) -> None:
        host, port = self._config.host, self._config.port
        shared = self._config.frontends > 1
        try:
            if shared and port:
                # Two servers that both share a port would silently share their clients too.
                (
                    await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
                ).close()
            addresses = await self._service.listen(host, port, shared=shared)
        except OSError as error:
            raise cannot_listen(host, port, error) from error
        self._addresses = [address[:2] for address in addresses]
        port = addresses[0][1]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _start(self, loop: asyncio.AbstractEventLoop, channel: FrontendChannel) -> None:
        """Load what the frontends need, then tell the engine what to load."""
        path, parts = await loop.run_in_executor(None, self._load)
        tokenizer = parts[0]
        self._service.load(parts)
        settings = {
            "config": self._config.to_dict(),
            "model_path": str(path),
            "vocab_limit": tokenizer.vocab_size,
            "eos_ids": sorted(tokenizer.eos_ids),
            "vocabulary": tokenizer.vocabulary().to_text() if find_spec("llguidance") else None,
        }
        if self._config.fake_engine:
            settings["fake_tokens"] = tokenizer.encode(FAKE_TEXT)
        channel.send(FrameKind.CONFIG, json.dumps(settings).encode())
        self._path = path
        for extra in self._extras:
            extra.load(self._config, path, self._addresses)
        # While the engine loads, or after: requests need not wait for it.
        tokenizer.accelerate_later()

    def _load(self) -> tuple[Path, TextParts]:
        """The model's folder or file, and what a frontend needs of it."""
        config = self._config
        if config.fake_engine and config.model == FAKE_MODEL:
            path = Path(FAKE_MODEL)
        else:
            path = resolve_model(
                config.model,
                revision=config.revision,
                source=config.model_source,
                weights=not (config.dummy_weight or config.fake_engine),
                progress=self._progress,
            )
        return path, load_text(config, path)

    # What happens

    def _on_failure(self, message: str, exit_code: int) -> None:
        """The engine is gone, and every client knows: tell the terminal, then end."""
        self._progress.close()
        print(f"minisgl-fast: error: {message}", file=sys.stderr, flush=True)
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._end, exit_code)

    def _on_extra(self) -> None:
        """An extra frontend became ready, or ended."""
        lost = [extra for extra in self._extras if extra.has_ended]
        if lost and not self._service.is_ending and not self._num_signals:
            self._extras = [extra for extra in self._extras if not extra.has_ended]
            for extra in lost:
                task = asyncio.ensure_future(self._replace(extra))
                self._replacements.add(task)
                task.add_done_callback(self._replacements.discard)
        self._announce()

    async def _replace(self, lost: ExtraFrontend) -> None:
        """Start another frontend for one that has died, unless it never worked."""
        path, channel = self._path, self._channel
        print(
            "minisgl-fast: error: a frontend process ended unexpectedly, "
            + ("another is started." if lost.is_ready else "the others go on."),
            file=sys.stderr,
            flush=True,
        )
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, lost.wait, PROCESS_EXIT_TIMEOUT_S)
        if not lost.is_ready or path is None or channel is None:
            return
        ours, theirs = socket.socketpair()
        while not channel.send_socket(FrameKind.JOIN, theirs):
            await asyncio.sleep(DRAIN_POLL_S)
            if self._service.is_ending or self._num_signals:
                break
        theirs.close()
        if self._service.is_ending or self._num_signals:
            ours.close()
            return
        extra = ExtraFrontend(self._service, self._on_extra)
        self._extras.append(extra)
        extra.spawn(ours)
        await extra.connect()
        extra.load(self._config, path, self._addresses)

    def _announce(self) -> None:
        """Say once that all frontends are ready."""
        frontend = self._service.frontend
        if self._is_announced or frontend is None or frontend.state != "ready":
            return
        if not all(extra.is_ready for extra in self._extras):
            return
        self._is_announced = True
        print(f"API server is ready to serve on {self._address}", flush=True)
        scheme = "http" if self._service.tls is None else "https"
        key = '-H "Authorization: Bearer $KEY" ' if self._service.access.needs_key else ""
        print(
            f"Try: curl {scheme}://{self._address}/v1/chat/completions {key}"
            "-H 'Content-Type: application/json' "
            '-d \'{"messages": [{"role": "user", "content": "What is the capital of Japan?"}], '
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
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.drain_timeout_s
        for extra in self._extras:
            extra.drain()
        drained = await self._service.drain(deadline)
        while loop.time() < deadline and not all(extra.has_ended for extra in self._extras):
            await asyncio.sleep(DRAIN_POLL_S)
        drained = drained and all(extra.has_ended for extra in self._extras)
        if not self._service.is_ending:  # an engine that failed meanwhile has its own exit code
            self._end(EXIT_DRAINED if drained else EXIT_DRAIN_TIMED_OUT)

    def _end(self, exit_code: int) -> None:
        assert self._ended is not None
        if not self._ended.done():
            self._ended.set_result(exit_code)

    def _wait_for_processes(self, engine: subprocess.Popen[bytes]) -> None:
        """Wait for all that follow the end of a channel; kill what does not."""
        for extra in self._extras:
            extra.wait(PROCESS_EXIT_TIMEOUT_S)
        try:
            engine.wait(PROCESS_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            engine.kill()
            engine.wait()
