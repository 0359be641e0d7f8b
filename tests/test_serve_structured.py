"""Structured output over HTTP from a real engine, as SDKs ask for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Literal

import openai
import pydantic
import pytest
from server_process import ServerProcess
from tiny_folder import make_tiny_model

USER = [{"role": "user", "content": "x"}]


class Point(pydantic.BaseModel):
    kind: Literal["a", "b"]
    x: int = pydantic.Field(ge=0, le=99)
    done: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = make_tiny_model(tmp_path_factory.mktemp("structured") / "model")
    server = ServerProcess(
        *("--model", model, "--served-model-name", "tiny", "--num-pages", 512),
        *("--tool-call-parser", "qwen25"),
    )
    try:
        yield server.wait_ready()
        server.signal()
        assert server.wait() == 0
    finally:
        server.end()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_the_sdk_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    for seed in range(5):
        answer = client.chat.completions.parse(
            model="tiny", messages=USER, response_format=Point, max_tokens=1000, seed=seed
        )
        parsed = answer.choices[0].message.parsed
        assert isinstance(parsed, Point) and answer.choices[0].finish_reason == "stop"


def test_streams_of_bound_and_free_text_go_on_together(client: openai.OpenAI) -> None:
    bound = client.completions.create(
        model="tiny", prompt="x", max_tokens=50, stream=True, extra_body={"regex": "[a-c]{5,9}!"}
    )
    free = client.completions.create(model="tiny", prompt="x", max_tokens=30, stream=True)
    assert re.fullmatch("[a-c]{5,9}!", "".join(chunk.choices[0].text for chunk in bound))
    assert [chunk.choices[0].finish_reason for chunk in free][-1] is not None


def test_a_bound_call_satisfies_its_schema(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Point, name="draw")
    for choice in ("required", {"type": "function", "function": {"name": "draw"}}):
        answer = client.chat.completions.create(
            model="tiny",
            messages=USER,
            tools=[tool],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=1000,
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "draw"
        Point.model_validate(json.loads(call.function.arguments))
        assert answer.choices[0].finish_reason == "tool_calls"
