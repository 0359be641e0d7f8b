"""The engine process over real socketpairs: what goes in, what comes out, and how it ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from worker_driver import TIMEOUT_S, Peer, Worker

from minisgl_fast.wire import FinishReason, FrameKind, unpack_step

FACTS = {
    "max_model_len": 1024,
    "vocab_size": 320,
    "hidden_size": 64,
    "num_pages": 64,
    "page_size": 16,
    "max_running_requests": 4,
    "dtype": "float32",
    "device": "cpu",
    "grammars": False,
    "architecture": "Qwen3ForCausalLM",
    "num_parameters": 119_232,
}


Spawn = Callable[..., Worker]
WORKER = ["-m", "minisgl_fast.engine.worker"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Gives a function that starts an engine process."""
    workers: list[Worker] = []

    def start(num_channels: int = 1, program: list[str] = WORKER) -> Worker:
        workers.append(Worker(num_channels, program))
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()


def test_it_loads_serves_aborts_and_leaves_with_its_frontend(
    spawn: Spawn, tiny_model: Path
) -> None:
    worker = spawn()
    (peer,) = worker.peers
    peer.configure(tiny_model)
    assert json.loads(peer.expect(FrameKind.READY)) == FACTS
    assert peer.progress
    for report in peer.progress:
        assert set(report) == {"stage", "done", "total"}
        assert 0 <= report["done"] <= report["total"]
    assert peer.progress[-1]["done"] == peer.progress[-1]["total"]

    peer.add(1, [10, 20, 30], 20)
    peer.add(2, [10, 20, 30], 5)
    results = peer.collect({1, 2})
    assert results[1][1] == results[2][1] == FinishReason.LENGTH
    assert (len(results[1][0]), results[2][0]) == (20, results[1][0][:5])

    # More than a socket holds: prompts of 1,000 tokens; then all but every tenth is given up.
    rids = set(range(3, 103))
    kept = set(range(3, 103, 10))
    for rid in rids:
        peer.add(rid, [rid] * 1000, 10)
    for rid in rids - kept:
        peer.abort(rid)
    results = peer.collect(rids)
    assert all(len(results[rid][0]) == 10 for rid in kept)
    reasons = [results[rid][1] for rid in rids - kept]
    assert set(reasons) <= {FinishReason.LENGTH, FinishReason.ABORTED}
    assert reasons.count(FinishReason.ABORTED) > 45
    peer.abort(999)  # unknown, and nothing happens

    peer.stats = {}
    peer.add(103, [1], 1)
    peer.collect({103})
    peer.wait_stats(lambda stats: stats["generated_tokens"] >= 25 + 100 and not stats["running"])
    assert peer.stats["pages_used"] == 0
    assert peer.stats["pages_free"] + peer.stats["pages_cached"] == peer.stats["pages_total"] == 64

    peer.close()
    assert worker.wait() == (0, "")


def test_a_frontend_that_dies_takes_its_requests_and_no_others(
    spawn: Spawn, tiny_model: Path
) -> None:
    worker = spawn(num_channels=2)
    first, second = worker.peers
    first.configure(tiny_model)
    assert json.loads(first.expect(FrameKind.READY)) == FACTS
    assert json.loads(second.expect(FrameKind.READY)) == FACTS
    # The same rid on both channels is two requests.
    first.add(1, [5] * 30, 900)
    first.add(2, [6] * 30, 900)
    second.add(1, [5] * 30, 40)
    unpack_step(first.expect(FrameKind.STEP))
    first.close()
    tokens, reason = second.collect({1})[1]
    assert (len(tokens), reason) == (40, FinishReason.LENGTH)
    second.wait_stats(lambda stats: stats["aborted"] == 2 and stats["running"] == 0)
    assert second.stats["pages_used"] == 0
    second.add(2, [1, 2, 3], 4)
    assert len(second.collect({2})[2][0]) == 4
    second.close()
    assert worker.wait() == (0, "")


def test_a_frontend_can_join_later(spawn: Spawn, tiny_model: Path) -> None:
    worker = spawn()
    (first,) = worker.peers
    first.configure(tiny_model)
    first.expect(FrameKind.READY)
    first.add(1, [5] * 30, 900)
    for _ in range(2):
        ours, theirs = socket.socketpair()
        first.send_socket(FrameKind.JOIN, theirs)
        theirs.close()
        joined = Peer(ours)
        assert json.loads(joined.expect(FrameKind.READY)) == FACTS
        # The same rid as the first one's is another request.
        joined.add(1, [5] * 30, 20)
        assert len(joined.collect({1})[1][0]) == 20
        joined.close()
    assert len(first.collect({1})[1][0]) == 900
    first.close()
    assert worker.wait() == (0, "")


def test_signals_are_for_the_frontend_to_act_on(spawn: Spawn, tiny_model: Path) -> None:
    worker = spawn()
    (peer,) = worker.peers
    peer.configure(tiny_model)
    peer.expect(FrameKind.READY)
    for number in (signal.SIGINT, signal.SIGTERM):
        worker.process.send_signal(number)
    peer.add(1, [1, 2, 3], 8)
    assert len(peer.collect({1})[1][0]) == 8
    peer.close()
    assert worker.wait() == (0, "")


def test_a_frontend_that_goes_before_it_configures_is_no_error(spawn: Spawn) -> None:
    worker = spawn()
    worker.peers[0].close()
    assert worker.wait() == (0, "")


def broken(folder: Path, model: Path, fault: str) -> Path:
    shutil.copytree(model, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif fault == "unknown":
        config.write_text(config.read_text().replace("Qwen3ForCausalLM", "GptForCausalLM"))
    else:
        config.write_text(
            config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
        )
    return folder


@pytest.mark.parametrize("fault", ["truncated", "unknown", "mismatched"])
def test_a_broken_model_is_fatal_with_one_clear_line_and_exit_code_1(
    spawn: Spawn, tiny_model: Path, tmp_path: Path, fault: str
) -> None:
    folder = broken(tmp_path / "model", tiny_model, fault)
    worker = spawn()
    (peer,) = worker.peers
    peer.configure(folder)
    report = json.loads(peer.expect(FrameKind.FATAL))
    assert report["exit_code"] == 1
    assert report["message"].startswith(str(folder))
    assert "\n" not in report["message"]
    words = {"truncated": "truncated", "unknown": "GptForCausalLM", "mismatched": "model.layers.2"}
    assert words[fault] in report["message"]
    peer.wait_for_end()
    assert worker.wait() == (1, "")


CRASH = """
import sys
from minisgl_fast.engine import runner, worker

forward = runner.ModelRunner.forward

def crash(self, step, *rest):
    if step.num_tokens == 77:
        raise IndexError("a bug")
    return forward(self, step, *rest)

runner.ModelRunner.forward = crash
raise SystemExit(worker.main(sys.argv[1:]))
"""


def test_an_engine_that_crashes_says_so_and_exits_with_3(spawn: Spawn, tiny_model: Path) -> None:
    worker = spawn(num_channels=2, program=["-c", CRASH])
    first, second = worker.peers
    first.configure(tiny_model)
    for peer in worker.peers:
        peer.expect(FrameKind.READY)
    second.add(1, [1, 2, 3], 4)
    assert len(second.collect({1})[1][0]) == 4
    first.add(1, [9] * 77, 4)
    for peer in worker.peers:
        report = json.loads(peer.expect(FrameKind.FATAL))
        assert report == {"message": "The engine failed: IndexError.", "exit_code": 3}
        peer.wait_for_end()
    exit_code, errors = worker.wait()
    assert exit_code == 3
    assert errors.startswith("Traceback") and errors.endswith("IndexError: a bug\n")


def test_a_malformed_add_is_the_end_of_the_engine(spawn: Spawn, tiny_model: Path) -> None:
    """The frontend is ours: a frame that makes no sense means that nothing can be trusted."""
    worker = spawn()
    (peer,) = worker.peers
    peer.configure(tiny_model)
    peer.expect(FrameKind.READY)
    peer.send(FrameKind.ADD, b"too short")
    assert json.loads(peer.expect(FrameKind.FATAL))["exit_code"] == 3
    assert worker.wait()[0] == 3


def test_a_frontend_that_does_not_read_stops_nobody(spawn: Spawn, tiny_model: Path) -> None:
    worker = spawn(num_channels=2)
    silent, reader = worker.peers
    silent.configure(tiny_model, max_model_len=4096, num_pages=1024)
    reader.expect(FrameKind.READY)
    for rid in range(3):
        silent.add(rid, [rid + 1], 4000)
    for rid in range(20):
        reader.add(rid, [rid], 10)
        assert len(reader.collect({rid})[rid][0]) == 10
    deadline = time.monotonic() + TIMEOUT_S
    while reader.stats.get("generated_tokens", 0) < 3000 and time.monotonic() < deadline:
        reader.add(999, [1], 1)
        reader.collect({999})
    # Nothing of what waited is lost.
    silent.expect(FrameKind.READY)
    for rid in range(3):
        silent.abort(rid)
    results = silent.collect({0, 1, 2})
    assert sum(len(tokens) for tokens, _ in results.values()) >= 2500


def test_the_cache_is_flushed_on_request_but_not_under_a_request(
    spawn: Spawn, tiny_model: Path
) -> None:
    worker = spawn(num_channels=2)
    first, second = worker.peers
    first.configure(tiny_model)
    first.expect(FrameKind.READY)
    second.expect(FrameKind.READY)

    def flush(peer: Peer, ticket: int) -> bool:
        peer.send(FrameKind.FLUSH, ticket.to_bytes(4, "little"))
        kind, payload = FrameKind.STEP, b""
        while kind == FrameKind.STEP:
            kind, payload = peer.receive()
        assert kind == FrameKind.FLUSHED
        assert int.from_bytes(payload[:4], "little") == ticket
        return bool(payload[4])

    def num_cached(prompt: list[int]) -> int:
        second.add(1, prompt, 1)
        _, ((_, cached),) = unpack_step(second.expect(FrameKind.STEP))
        return cached

    prompt = [*range(40)]
    assert num_cached(prompt) == 0
    assert num_cached(prompt) == 32
    first.add(1, [5] * 30, 900)
    assert not flush(first, 7)
    first.abort(1)
    while not flush(first, 2**32 - 1):  # the step in flight has to end first
        time.sleep(0.01)
    assert num_cached(prompt) == 0
    first.close()
    second.close()
    assert worker.wait() == (0, "")
