"""The second to N-th process of ``--frontends N``, and how the main process sees them.

An extra frontend is ``python -m minisgl_fast.extra_frontend ENGINE_FD MAIN_FD``: a channel to the
engine like the main frontend's, and a link to the main process, over which go

    START  main -> extra   JSON {"config", "model_path", "addresses"}, first
    READY  extra -> main   it has bound the port and is ready
    DRAIN  main -> extra   refuse new work, exit when what runs has finished
    ASK, REPLY             questions of peers.py, both ways

The kernel spreads new connections over the processes (SO_REUSEPORT). An extra frontend binds the
port only when it can serve.

Rules: signals are the main process's to handle, and ignored here; the end of the link is an order
to exit at once; the end of the engine ends every frontend by itself. An extra frontend that dies
takes its own connections with it and the engine drops its requests; the others go on, and another
is started whose channel goes to the engine with a JOIN frame.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from minisgl_fast.config import Config
from minisgl_fast.frontend_channel import FrontendChannel
from minisgl_fast.server.peers import ASK, REPLY
from minisgl_fast.service import Service, load_text, raise_open_file_limit, spawn

START, READY, DRAIN = 16, 17, 18
# For the last bytes of failing streams to leave.
LAST_WORDS_S = 0.2
EXIT_LOST = 5  # the main process is gone, or the port


class ExtraFrontend:
    """An extra frontend as the main process sees it.

    ``on_change`` is called when it becomes ready or ends.
    """

    def __init__(self, service: Service, on_change: Callable[[], None]) -> None:
        self.is_ready = False
        self.has_ended = False
        self._service = service
        self._on_change = on_change
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._link: FrontendChannel | None = None

    def spawn(self, engine_channel: socket.socket) -> None:
        """Start the process; the channel's end is its own from then on."""
        self._socket, theirs = socket.socketpair()
        self._process = spawn(__name__, [engine_channel, theirs])

    async def connect(self) -> None:
        """Begin to listen to what it says."""
        link = self._link = FrontendChannel(self._on_frame, self._on_end)
        await asyncio.get_running_loop().create_connection(lambda: link, sock=self._socket)

    def load(self, config: Config, path: Path, addresses: list[tuple[str, int]]) -> None:
        """Tell it what to serve, and where."""
        settings = {
            "config": asdict(config),
            "model_path": str(path),
            "addresses": addresses,
        }
        self._send(START, json.dumps(settings).encode())

    def drain(self) -> None:
        """Let it finish what runs and exit."""
        self._send(DRAIN, b"")

    def close(self) -> None:
        """Have it exit at once."""
        if self._link is not None:
            self._link.close()

    def wait(self, timeout_s: float) -> int:
        """The exit code; the process is killed when it takes too long. Blocks."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _send(self, kind: int, payload: bytes) -> None:
        if self._link is not None:
            self._link.send(kind, payload)

    def _on_frame(self, kind: int, payload: bytes) -> None:
        assert self._link is not None
        if kind in (ASK, REPLY):
            self._service.peers.on_frame(self._link, kind, payload)
        elif kind == READY:
            self.is_ready = True
            self._service.peers.add(self._link)
            self._on_change()

    def _on_end(self) -> None:
        self.has_ended = True
        if self._link is not None:
            self._service.peers.remove(self._link)
        self._on_change()


class _Extra:
    """This process, when it is an extra frontend."""

    def __init__(self) -> None:
        self._service: Service | None = None
        self._link: FrontendChannel | None = None
        self._started: asyncio.Future[dict[str, Any]] | None = None
        self._ended: asyncio.Future[int] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses: list[tuple[str, int]] = []

    async def run(self, engine_descriptor: int, main_descriptor: int) -> int:
        loop = asyncio.get_running_loop()
        self._started, self._ended = loop.create_future(), loop.create_future()
        link = self._link = FrontendChannel(self._on_frame, self._on_end)
        sock = socket.socket(fileno=main_descriptor)
        await loop.create_connection(lambda: link, sock=sock)
        work = loop.create_task(self._serve(socket.socket(fileno=engine_descriptor)))
        await asyncio.wait((work, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        exit_code = await self._ended
        if self._service is not None:
            self._service.close()
        self._link.close()
        await asyncio.sleep(0)
        return exit_code

    async def _serve(self, channel: socket.socket) -> None:
        assert self._started is not None and self._link is not None
        settings = await self._started
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings["config"].items()
        }
        config = Config(**values)
        self._addresses = [(host, port) for host, port in settings["addresses"]]
        self._service = Service(config, on_ready=self._on_ready, on_failure=self._on_failure)
        self._service.start()
        self._service.peers.add(self._link)
        loop = asyncio.get_running_loop()
        parts = await loop.run_in_executor(None, load_text, config, Path(settings["model_path"]))
        self._service.load(parts)
        await self._service.connect(channel)
        parts[0].accelerate_later()

    def _on_ready(self) -> None:
        self._run(self._listen())

    async def _listen(self) -> None:
        assert self._service is not None and self._link is not None
        try:
            for host, port in self._addresses:
                await self._service.listen(host, port, shared=True)
        except OSError as error:
            print(f"minisgl-fast: error: an extra frontend: {error}", file=sys.stderr, flush=True)
            self._end(EXIT_LOST)
            return
        self._link.send(READY, b"")

    def _on_frame(self, kind: int, payload: bytes) -> None:
        assert self._link is not None and self._started is not None
        if kind == START:
            self._started.set_result(json.loads(payload))
        elif kind == DRAIN:
            self._run(self._drain())
        elif self._service is not None:
            self._service.peers.on_frame(self._link, kind, payload)

    async def _drain(self) -> None:
        if self._service is not None:
            # The main process keeps the time, and closes the link when it is over.
            await self._service.drain(float("inf"))
        self._end(0)

    def _on_failure(self, message: str, exit_code: int) -> None:
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._end, exit_code)

    def _on_end(self) -> None:
        self._end(EXIT_LOST)

    def _end(self, exit_code: int) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(exit_code)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def main(arguments: list[str]) -> int:
    """Serve until the main process or the engine ends it; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise_open_file_limit()
    engine_descriptor, main_descriptor = map(int, arguments)
    return uvloop.run(_Extra().run(engine_descriptor, main_descriptor))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
