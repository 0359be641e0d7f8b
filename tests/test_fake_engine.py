"""The engine without a model: its rows, its pace, and a whole server before it."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, serving
from tiny_folder import make_tiny_model

from minisgl_fast import cli
from minisgl_fast.bench.fake_model import FAKE_TEXT, write_fake_model
from minisgl_fast.bench.vocabulary import WORDS
from minisgl_fast.engine.fake import Lane
from minisgl_fast.frames import FrameReader
from minisgl_fast.params import SamplingParams
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import FinishReason, FrameKind, Task, frame, pack_add, unpack_step

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving("--fake-engine") as server:
        yield server


def test_it_needs_no_model_and_says_the_words_of_its_text(server: ServerProcess) -> None:
    stream = server.open_stream(
        CHAT, messages=[{"role": "user", "content": "year"}], max_tokens=150,
        stream_options={"include_usage": True},
    )  # fmt: skip
    stream.rest()
    *chunks, usage, done = stream.events()
    assert done == "[DONE]"
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text in FAKE_TEXT * 5
    assert len(text.split()) == 150
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 150
    stream.close()


def test_an_answer_in_one_piece_and_the_counts(server: ServerProcess) -> None:
    before = server.metric("minisgl_generated_tokens_total")
    status, _, body = server.request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 30})
    assert status == 200
    assert body["choices"][0]["finish_reason"] == "length"
    assert len(body["choices"][0]["text"].split()) == 30
    assert server.metric("minisgl_generated_tokens_total") == before + 30
    assert server.metric("minisgl_requests_running") == 0


def test_a_tick_sets_the_pace_and_a_folder_the_tokenizer(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    server = ServerProcess("--fake-engine", "--tick-us", 20_000, "--model", model)
    try:
        server.wait_ready()
        start = time.monotonic()
        status, _, body = server.request(
            "POST", "/v1/completions", {"prompt": "Once", "max_tokens": 30}
        )
        assert status == 200
        assert time.monotonic() - start >= 29 * 0.02  # the first token comes at once
        assert body["choices"][0]["text"] in FAKE_TEXT * 2  # a token a byte
        assert len(body["choices"][0]["text"]) == 30
        assert body["usage"]["prompt_tokens"] == len("Once")
    finally:
        server.end()


def test_clients_that_count_what_they_read_are_not_overrun(tmp_path: Path) -> None:
    credit = tmp_path / "credit"
    credit.write_bytes(bytes(8))
    server = ServerProcess("--fake-engine", "--credit-file", credit)
    try:
        server.wait_ready()
        start = time.monotonic()
        server.request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 30})
        # Nothing was ever counted: beyond its head start, a step each 20 ms.
        assert time.monotonic() - start > (30 - 8 - 2) * 0.02
    finally:
        server.end()


def test_without_it_a_model_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse([])
    assert ended.value.code == 2
    assert "--model" in capsys.readouterr().err
    assert cli.parse(["--fake-engine"]).model == "fake"
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    assert "fake" not in capsys.readouterr().out


def test_a_word_after_a_space_is_a_token_and_every_byte_too(tmp_path: Path) -> None:
    write_fake_model(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = "".join(f" {word}" for word in WORDS)
    assert len(tokenizer.encode(text)) == len(WORDS)
    for sample in (text, "Ünïcode 你好 🥐\n\ttabs", "".join(map(chr, range(1, 300)))):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert len(tokenizer.eos_ids) == 1


# The rows of one frontend


def test_every_request_gets_its_tokens_whatever_else_comes_and_goes() -> None:
    ours, theirs = socket.socketpair()
    lane = Lane(theirs, [5, 6, 7], waits=True)
    reader = FrameReader()
    rng = random.Random(0)
    wanted: dict[int, int] = {}
    seen: dict[int, int] = {}
    ended: set[int] = set()
    announced: set[int] = set()
    aborted: set[int] = set()
    for number in range(400):
        if number < 300 and rng.random() < 0.6:
            wanted[number] = rng.randint(1, 20)
            ours.sendall(frame(FrameKind.ADD, _add(number, wanted[number])))
        running = [rid for rid in wanted if rid not in ended | aborted]
        if running and rng.random() < 0.1:
            rid = rng.choice(running)
            aborted.add(rid)
            ours.sendall(frame(FrameKind.ABORT, rid.to_bytes(4, "little")))
        lane.receive()
        if not len(lane):
            continue
        lane.step()
        for kind, payload in reader.feed(ours.recv(1 << 20)):
            assert kind == FrameKind.STEP
            rows, first = unpack_step(payload)
            announced |= {rid for rid, _ in first}
            assert len({token for _, token, _ in rows}) == 1
            for rid, _, reason in rows:
                assert rid not in ended | aborted
                seen[rid] = seen.get(rid, 0) + 1
                assert reason == (
                    FinishReason.LENGTH if seen[rid] == wanted[rid] else FinishReason.RUNNING
                )
                if reason:
                    ended.add(rid)
    assert len(lane) == 0
    assert ended | aborted == set(wanted)
    assert ended <= announced
    ours.close()
    lane.channel.close()


def test_what_has_no_tokens_to_give_is_refused() -> None:
    ours, theirs = socket.socketpair()
    lane = Lane(theirs, [5], waits=True)
    ours.sendall(
        frame(FrameKind.ADD, _add(1, 4))
        + frame(FrameKind.ADD, _add(2, 4, task=Task.EMBED_LAST))
        + frame(FrameKind.ADD, _add(3, 4, num_top_logprobs=0))
    )
    lane.receive()
    lane.step()
    ((_, payload),) = FrameReader().feed(ours.recv(1 << 20))
    assert unpack_step(payload) == (
        [(1, 5, FinishReason.RUNNING), (2, -1, FinishReason.ERROR), (3, -1, FinishReason.ERROR)],
        [(1, 0)],
    )
    assert lane.was_read()
    ours.close()
    lane.channel.close()


def _add(rid: int, max_tokens: int, **options: int) -> bytes:
    return pack_add(rid, SamplingParams(), [1, 2], seed=0, max_tokens=max_tokens, **options)
