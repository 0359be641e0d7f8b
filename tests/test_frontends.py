"""Several frontend processes on one port, before one engine."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, StartServer, Stream, eventually, is_running

FLAGS = ("--fake-engine", "--frontends", 2, "--tick-us", 5000)
ENDLESS = {"prompt": "x", "max_tokens": 100_000}
NUM_STREAMS = 16  # all on one of two frontends once in 32,768 runs


@pytest.fixture
def start(start_server: StartServer) -> StartServer:
    return lambda *flags: start_server(*FLAGS, *flags).wait_ready()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    server = ServerProcess(*FLAGS)
    try:
        yield server.wait_ready()
        server.signal()
        assert server.wait() == 0, server.errors
        assert not [line for line in server.errors if "Traceback" in line or "error" in line]
    finally:
        server.end()


def children(server: ServerProcess) -> dict[str, int]:
    """The processes that the server has started, by the last part of their module's name."""
    pid = server.process.pid
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        found[command[2].decode().rpartition(".")[2]] = int(child)
    return found


def frontend_of(stream: Stream) -> str:
    """A process numbers its requests behind a prefix of its own."""
    stream.wait_events(1)
    head = stream.received.partition(b"\r\n\r\n")[0].decode()
    (request_id,) = (
        line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("x-request-id")
    )
    return request_id.rpartition("-")[0]


def open_streams(server: ServerProcess, **body: Any) -> dict[str, list[Stream]]:
    """Endless streams by the frontend that has them; both have some."""
    streams: dict[str, list[Stream]] = {}
    for _ in range(NUM_STREAMS):
        stream = server.open_stream(**{**ENDLESS, **body})
        streams.setdefault(frontend_of(stream), []).append(stream)
    assert len(streams) == 2
    return streams


def everyone(streams: dict[str, list[Stream]]) -> list[Stream]:
    return [stream for some in streams.values() for stream in some]


def test_requests_spread_and_any_frontend_tells_the_sum(server: ServerProcess) -> None:
    name = 'minisgl_requests_total{code="200",finish_reason="length",route="/v1/completions"}'
    before = server.metric(name)
    tokens = server.metric("minisgl_generated_tokens_total")
    prefixes = set()
    for _ in range(NUM_STREAMS):
        status, headers, _ = server.request(
            "POST", "/v1/completions", {"prompt": "x", "max_tokens": 3}
        )
        assert status == 200
        prefixes.add(headers["x-request-id"].rpartition("-")[0])
    assert len(prefixes) == 2
    scraped = set()
    while len(scraped) < 2:
        _, headers, text = server.request("GET", "/metrics")
        scraped.add(headers["x-request-id"].rpartition("-")[0])
        assert f"{name} {before + NUM_STREAMS}" in text
        assert f"minisgl_generated_tokens_total {tokens + 3 * NUM_STREAMS}" in text
        assert "minisgl_frontends 2.0" in text
        assert "minisgl_ready 1.0" in text
    count = server.metric("minisgl_time_to_first_token_seconds_count")
    assert count == server.metric('minisgl_time_to_first_token_seconds_bucket{le="+Inf"}')
    assert count >= NUM_STREAMS


def test_clients_that_leave_any_frontend_are_aborted(server: ServerProcess) -> None:
    streams = open_streams(server)
    assert server.metric("minisgl_generations_open") == NUM_STREAMS
    for stream in everyone(streams):
        stream.close()
    eventually(lambda: server.metric("minisgl_generations_open") == 0)
    eventually(lambda: server.metric("minisgl_requests_running") == 0)


def test_a_request_is_aborted_by_its_name_whoever_has_it(server: ServerProcess) -> None:
    streams = open_streams(server)
    names = {}
    for stream in everyone(streams):
        head = stream.received.partition(b"\r\n\r\n")[0].decode()
        (names[stream],) = re.findall(r"x-request-id: (\S+)", head)
    first, *others = everyone(streams)
    answer = server.request("POST", "/abort_request", {"rid": names[first]})
    assert answer[::2] == (200, {"num_aborted": 1})
    first.rest()
    *_, last, done = first.events()
    assert (last["choices"][0]["finish_reason"], done) == ("abort", "[DONE]")
    answer = server.request("POST", "/abort_request", {"abort_all": True})
    assert answer[::2] == (200, {"num_aborted": NUM_STREAMS - 1})
    for stream in others:
        stream.rest()
        stream.close()
    first.close()
    eventually(lambda: server.metric("minisgl_requests_running") == 0)
    assert server.request("POST", "/flush_cache")[0] == 200


def test_all_frontends_drain(start: StartServer) -> None:
    server = start()
    processes = children(server)
    streams = open_streams(server, max_tokens=400)
    server.signal(signal.SIGTERM)
    for stream in everyone(streams):
        *_, last, done = stream.rest() and stream.events()
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        stream.close()
    assert server.wait() == 0, server.errors
    eventually(lambda: not any(map(is_running, processes.values())))
    assert not [line for line in server.errors if "error" in line or "Traceback" in line]


def test_a_drain_that_takes_too_long_on_an_extra_frontend_ends_with_4(start: StartServer) -> None:
    server = start("--drain-timeout", "0.5")
    processes = children(server)
    streams = open_streams(server)
    server.signal(signal.SIGTERM)
    assert server.wait() == 4
    eventually(lambda: not any(map(is_running, processes.values())))
    for stream in everyone(streams):
        assert b"[DONE]" not in stream.rest()
        stream.close()


def test_the_death_of_an_extra_frontend_ends_its_streams_alone_and_another_comes(
    start: StartServer,
) -> None:
    server = start()
    streams = open_streams(server)
    extra = children(server)["extra_frontend"]
    os.kill(extra, signal.SIGKILL)
    server.wait_line(server.errors, "a frontend process ended unexpectedly, another is started")
    eventually(lambda: not Path(f"/proc/{extra}").exists())
    (alive,) = [owner for owner, some in streams.items() if goes_on(some[0])]
    for owner, some in streams.items():
        for stream in some:
            assert goes_on(stream) is (owner == alive)
    eventually(lambda: server.metric("minisgl_requests_running") == len(streams[alive]))
    eventually(lambda: server.metric("minisgl_frontends") == 2)
    assert children(server)["extra_frontend"] != extra
    more = open_streams(server)
    assert len({*streams, *more}) == 3
    num_running = NUM_STREAMS + len(streams[alive])
    eventually(lambda: server.metric("minisgl_requests_running") == num_running)
    for stream in everyone(streams) + everyone(more):
        stream.close()
    eventually(lambda: server.metric("minisgl_requests_running") == 0)
    server.signal()
    assert server.wait() == 0


def goes_on(stream: Stream) -> bool:
    """Whether a stream brings more; else it has been cut."""
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        if not stream.read_some():
            assert b"[DONE]" not in stream.received
            return False
    return True


def test_the_death_of_the_engine_is_told_by_all_frontends(start: StartServer) -> None:
    server = start()
    processes = children(server)
    streams = open_streams(server)
    os.kill(processes["fake"], signal.SIGKILL)
    for stream in everyone(streams):
        stream.rest()
        *_, error, done = stream.events()
        assert error["error"]["message"] == "The inference engine failed."
        assert done == "[DONE]"
        stream.close()
    assert server.wait() == 3
    eventually(lambda: not any(map(is_running, processes.values())))
    assert [line for line in server.errors if "error" in line] == [
        "minisgl-fast: error: The engine process ended unexpectedly."
    ]


def test_the_death_of_the_main_process_ends_all(start: StartServer) -> None:
    server = start()
    processes = children(server)
    streams = open_streams(server)
    os.kill(server.process.pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_running, processes.values())))
    for stream in everyone(streams):
        stream.close()


def test_a_port_that_is_taken_is_not_shared_with_a_stranger() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = ServerProcess(*FLAGS, "--port", taken.getsockname()[1])
        try:
            assert server.wait() == 1
            assert "Cannot listen" in "".join(server.errors)
        finally:
            server.end()
