"""The life of a server, as a person starts it: process, port, engine process, signals, ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import (
    CHAT,
    ENDLESS,
    MESSAGES,
    MODULE,
    SCRIPT,
    TIMEOUT_S,
    StartServer,
    eventually,
    is_running,
    joined,
)
from smollm2 import PATH, needs_model


def test_from_the_bound_port_over_loading_and_ready_to_a_drained_end(
    start_server: StartServer, patient_model: Path
) -> None:
    server = start_server("--model", patient_model, program=SCRIPT)
    status, _, body = server.request("GET", "/health")
    assert (status, body["state"]) == (503, "loading")
    assert 0.0 <= body["progress"] <= 1.0
    status, headers, body = server.request("POST", CHAT, {"messages": MESSAGES})
    assert (status, body["error"]["type"]) == (503, "overloaded_error")
    assert int(headers["retry-after"]) > 0
    assert server.request("GET", "/ready")[0] == 503
    assert not server.printed

    server.wait_ready()
    assert server.request("GET", "/health")[::2] == (200, {"state": "ready"})
    assert server.request("GET", "/ready")[0] == 200
    command = server.wait_line(server.printed, r"^Try: (curl http://127\.0\.0\.1:\d+/.*)$")[1]
    answer = subprocess.run(
        ["sh", "-c", f"{command} --silent --max-time {TIMEOUT_S:g}"],
        capture_output=True,
        check=True,
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"

    stream = server.open_stream(**{**ENDLESS, "max_tokens": 1500})
    stream.wait_events(3)
    server.signal(signal.SIGTERM)
    eventually(lambda: server.request("GET", "/ready")[0] == 503)
    assert server.request("GET", "/health")[::2] == (200, {"state": "draining"})
    status, headers, body = server.request("POST", CHAT, {"messages": MESSAGES})
    assert (status, headers["connection"]) == (503, "close")
    assert body["error"]["message"] == "The server is shutting down."
    stream.rest()
    *_, last, done = stream.events()
    assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert server.wait() == 0
    stream.close()
    assert len(server.printed) == 2
    assert not [line for line in server.errors if "error" in line or "Traceback" in line]


def test_a_drain_that_takes_too_long_ends_with_4_and_takes_the_engine_along(
    start_server: StartServer, patient_model: Path
) -> None:
    server = start_server("--model", patient_model, "--drain-timeout", "0.5").wait_ready()
    engine = server.engine_pid
    stream = server.open_stream(**ENDLESS)
    stream.wait_events(3)
    server.signal(signal.SIGINT)
    assert server.wait() == 4
    eventually(lambda: not is_running(engine))
    assert b"[DONE]" not in stream.rest()
    stream.close()


def test_a_second_signal_ends_at_once(start_server: StartServer, patient_model: Path) -> None:
    server = start_server("--model", patient_model, "--drain-timeout", "3600").wait_ready()
    engine = server.engine_pid
    stream = server.open_stream(**ENDLESS)
    stream.wait_events(3)
    server.signal(signal.SIGTERM)
    eventually(lambda: server.request("GET", "/ready")[0] == 503)
    assert server.process.poll() is None
    server.signal(signal.SIGINT)
    assert server.wait() == 4
    eventually(lambda: not is_running(engine))
    stream.close()


@pytest.mark.parametrize("while_draining", [False, True])
def test_the_death_of_the_engine_is_an_error_event_in_every_stream_and_exit_code_3(
    start_server: StartServer, patient_model: Path, while_draining: bool
) -> None:
    server = start_server("--model", patient_model).wait_ready()
    streams = [server.open_stream(**ENDLESS) for _ in range(3)]
    for stream in streams:
        stream.wait_events(3)
    if while_draining:
        server.signal(signal.SIGTERM)
        eventually(lambda: server.request("GET", "/ready")[0] == 503)
    os.kill(server.engine_pid, signal.SIGKILL)
    killed = time.monotonic()
    assert server.wait() == 3
    waited_s = time.monotonic() - killed
    for stream in streams:
        stream.rest()
        *_, error, done = stream.events()
        assert error["error"]["message"] == "The inference engine failed."
        assert done == "[DONE]"
        stream.close()
    assert [line for line in server.errors if "error" in line] == [
        "minisgl-fast: error: The engine process ended unexpectedly."
    ]
    # A second on an idle machine; a wait for some time-out would be at least five.
    assert waited_s < 5.0


def test_an_engine_that_dies_before_an_answer_gives_a_plain_500(
    start_server: StartServer, patient_model: Path
) -> None:
    server = start_server("--model", patient_model).wait_ready()
    whole = server.open_stream(**{**ENDLESS, "stream": False})
    eventually(lambda: server.metric("minisgl_requests_running") == 1)
    os.kill(server.engine_pid, signal.SIGKILL)
    assert whole.rest().startswith(b"HTTP/1.1 500 ")
    assert server.wait() == 3
    whole.close()


def test_an_engine_outlives_a_signal_to_everyone_and_no_frontend(
    start_server: StartServer, patient_model: Path
) -> None:
    """A service manager sends SIGTERM to both processes; and the engine follows a kill -9."""
    server = start_server("--model", patient_model).wait_ready()
    engine = server.engine_pid
    stream = server.open_stream(**{**ENDLESS, "max_tokens": 300})
    stream.wait_events(3)
    os.kill(engine, signal.SIGTERM)
    stream.rest()
    assert stream.events()[-1] == "[DONE]"
    stream.close()
    server.process.kill()
    server.process.wait(TIMEOUT_S)
    eventually(lambda: not is_running(engine))


def test_ctrl_c_while_loading_ends_quietly(start_server: StartServer, patient_model: Path) -> None:
    server = start_server("--model", patient_model)
    assert server.request("GET", "/health")[0] == 503
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.wait() == 0
    assert server.printed == []
    assert not [line for line in server.errors if "error" in line or "Traceback" in line]


def test_a_signal_during_a_download_ends_it(start_server: StartServer, tmp_path: Path) -> None:
    """The hub takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_DOWNLOAD_TIMEOUT": "600",
            "HF_HUB_ETAG_TIMEOUT": "600",
        }
        server = start_server("--model", "someone/something", environment=environment)
        hub.settimeout(TIMEOUT_S)
        connection, _ = hub.accept()
        assert server.request("GET", "/health")[0] == 503
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        connection.close()


# A start that cannot work


def copy_with(model: Path, folder: Path, fault: str) -> Path:
    shutil.copytree(model, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif fault == "architecture":
        config.write_text(config.read_text().replace("Qwen3ForCausalLM", "GptForCausalLM"))
    elif fault == "mismatch":
        config.write_text(
            config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 64')
        )
    elif fault == "tokenizer":
        (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("truncated", "truncated or not a safetensors file"),
        ("architecture", "GptForCausalLM is not supported"),
        ("mismatch", "the configuration says [64, 64]"),
        ("tokenizer", "There is no tokenizer.json in"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_clear_line_and_exit_code_1(
    start_server: StartServer, tiny_model: Path, tmp_path: Path, fault: str, words: str
) -> None:
    server = start_server("--model", copy_with(tiny_model, tmp_path / "model", fault))
    assert server.wait() == 1
    (line,) = (line for line in server.errors if "error" in line)
    assert line.startswith("minisgl-fast: error: ") and words in line
    assert server.printed == []
    for line in server.errors:  # and what else there is, is progress
        assert line.startswith(("Starting ", "Loading weights: ", "minisgl-fast: error: "))


def test_settings_that_cannot_work_are_one_clear_line_and_exit_code_1(
    start_server: StartServer, tiny_model: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        servers = [
            start_server("--model", tiny_model, "--port", port),
            start_server("--model", tmp_path / "nowhere"),
            start_server("--model", tiny_model, "--page-size", "17"),
            start_server("--model", tiny_model, "--chat-template", tmp_path / "none.jinja"),
            start_server("--model", tiny_model, "--max-model-len", "5000"),
        ]
        words = [
            f"Cannot listen on 127.0.0.1:{port}: Address already in use.",
            "There is no file or folder",
            "--page-size must be a power of two from 16 to 256, got 17.",
            "none.jinja",
            "--max-model-len 5000 is over the model's 4096 positions.",
        ]
        for server, message in zip(servers, words, strict=True):
            assert server.wait() == 1
            (line,) = (line for line in server.errors if "error" in line)
            assert line.startswith("minisgl-fast: error: ") and message in line
            assert server.printed == []


@pytest.mark.parametrize("program", [MODULE, SCRIPT], ids=["module", "script"])
def test_usage_errors_exit_with_2_and_help_with_0(program: tuple[str, ...]) -> None:
    for flags, code in ((["--nonsense"], 2), (["--model"], 2), ([], 2), (["--help"], 0)):
        done = subprocess.run([*program, *flags], capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == code
        assert (done.stderr if code else done.stdout).startswith("usage: ")


@needs_model
@pytest.mark.xdist_group("goldens")
def test_the_demo_model_knows_the_capital_of_france(start_server: StartServer) -> None:
    server = start_server("--model", PATH, "--num-pages", "64").wait_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        body: Any = {"model": str(PATH), "messages": MESSAGES, "temperature": 0}
        text, chunks = joined(client.chat.completions.create(**body, stream=True))
        assert "Paris" in text
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert client.chat.completions.create(**body).choices[0].message.content == text
        before, *_ = text.split("Paris")
        stopped = client.chat.completions.create(**body, stop="Paris")
        assert stopped.choices[0].message.content == before
    server.signal()
    assert server.wait() == 0
