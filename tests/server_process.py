"""The real server as a process: started on a port from the system, watched, signalled, ended."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_S = 90.0  # a deadline for a loaded machine, not a figure
MODULE = (sys.executable, "-m", "minisgl_fast")
SCRIPT = (str(Path(sys.executable).with_name("minisgl-fast")),)
CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
ENDLESS = {"prompt": "Once", "max_tokens": 60_000, "ignore_eos": True, "temperature": 1.0}
CPU = ("--port", "0", "--device", "cpu", "--dtype", "float32", "--num-threads", "1")


# start_server(*flags, **options): a fixture of conftest.py.
StartServer = Callable[..., "ServerProcess"]


class ServerProcess:
    """One server. Everything that waits does so for TIMEOUT_S at most."""

    def __init__(
        self,
        *flags: str | Path | int,
        program: Sequence[str] = MODULE,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [*program, *CPU, *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self.printed: list[str] = []
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines))
            for stream, lines in (
                (self.process.stdout, self.printed),
                (self.process.stderr, self.errors),
            )
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._changed:
                lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_line(self, lines: list[str], pattern: str) -> re.Match[str]:
        """The first line of ``printed`` or ``errors`` that the pattern matches, now or later."""
        deadline = time.monotonic() + TIMEOUT_S
        with self._changed:
            while True:
                for line in lines:
                    if found := re.search(pattern, line):
                        return found
                assert any(reader.is_alive() for reader in self._readers), self.errors
                assert self._changed.wait(deadline - time.monotonic()), (pattern, self.errors)

    @property
    def port(self) -> int:
        """Known as soon as it is bound, long before the server is ready."""
        return int(self.wait_line(self.errors, r"^Starting .* on 127\.0\.0\.1:(\d+)$")[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> ServerProcess:
        ready = self.wait_line(
            self.printed, r"^API server is ready to serve on 127\.0\.0\.1:(\d+)$"
        )
        assert int(ready[1]) == self.port
        return self

    def wait(self) -> int:
        """The exit code."""
        code = self.process.wait(TIMEOUT_S)
        for reader in self._readers:
            reader.join(TIMEOUT_S)
        return code

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        (pid,) = map(int, children.split())
        return pid

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        """(status, headers, body); the body is read as JSON where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            headers = {name.lower(): value for name, value in response.getheaders()}
            if headers.get("content-type") == "application/json":
                return response.status, headers, json.loads(text)
            return response.status, headers, text
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """One sample of /metrics by name and labels; 0 if it is not there."""
        found = re.search(
            rf"^{re.escape(name)} (\S+)$", self.request("GET", "/metrics")[2], re.MULTILINE
        )
        return float(found[1]) if found else 0.0

    def open_stream(self, path: str = "/v1/completions", **body: Any) -> Stream:
        return Stream(self.port, path, {"stream": True, **body})

    def end(self) -> None:
        """Leave nothing running, whatever the test did."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


class Stream:
    """A raw socket that has asked for a stream and reads it event by event."""

    def __init__(self, port: int, path: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.socket.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
            % (path.encode(), len(data), data)
        )
        self.received = b""

    def wait_events(self, count: int) -> None:
        """Read until there are at least so many events."""
        while self.received.count(b"data: ") < count:
            assert self.read_some(), self.received

    def rest(self) -> bytes:
        """Everything to the end of the connection or of the response."""
        while not self.received.endswith(b"\r\n0\r\n\r\n") and self.read_some():
            pass
        return self.received

    def events(self) -> list[Any]:
        """The events so far; ``[DONE]`` as a string. Joins the chunks of the HTTP framing."""
        body = re.sub(rb"(?m)^[0-9a-f]+\r\n", b"", self.received.split(b"\r\n\r\n", 1)[1])
        texts = re.findall(rb"data: (.*?)\n\n", body.replace(b"\r\n", b""))
        return [text.decode() if text == b"[DONE]" else json.loads(text) for text in texts]

    def close(self) -> None:
        self.socket.close()

    def read_some(self) -> bool:
        """What comes next; False at the end."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        self.received += data
        return bool(data)


@contextmanager
def serving(*flags: str | Path | int) -> Iterator[ServerProcess]:
    """A server that is ready, and that ends well when it is told to."""
    server = ServerProcess(*flags)
    try:
        yield server.wait_ready()
        server.signal()
        assert server.wait() == 0
    finally:
        server.end()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition of another process holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def joined(stream: Any) -> tuple[str, list[Any]]:
    """The text of a stream of the SDK, and its chunks."""
    chunks = list(stream)
    texts = [
        getattr(choice, "text", None) or getattr(getattr(choice, "delta", None), "content", None)
        for chunk in chunks
        for choice in chunk.choices
    ]
    return "".join(text or "" for text in texts), chunks
