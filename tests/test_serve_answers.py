"""What a whole server answers, to curl and the SDK, and to clients that leave or err."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import (
    CHAT,
    ENDLESS,
    MESSAGES,
    TIMEOUT_S,
    ServerProcess,
    eventually,
    joined,
)

from minisgl_fast.text.tokenizer import Tokenizer

# 3 control tokens, and a token a byte.
NUM_PROMPT_TOKENS = 3 + len("user\nWhat is the capital of France?\nassistant\n")
NUM_PAGES = 65_536 // 16  # one request may fill the context
USED_PAGES = 'minisgl_kv_pages{state="used"}'


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
