"""Structured output over HTTP from a real engine, as SDKs ask for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import jsonschema
import ollama
import openai
import pydantic
import pytest
from server_process import ServerProcess, serving
from tiny_folder import make_tiny_model

USER = [{"role": "user", "content": "x"}]


class Point(pydantic.BaseModel):
    kind: Literal["a", "b"]
    x: int = pydantic.Field(ge=0, le=99)
    done: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = make_tiny_model(tmp_path_factory.mktemp("structured") / "model")
    with serving(
        *("--model", model, "--served-model-name", "tiny", "--num-pages", 512),
        *("--tool-call-parser", "qwen25"),
    ) as server:
        yield server


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


# The same by the words of other APIs

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def is_weather(value: object) -> bool:
    jsonschema.validate(value, WEATHER)
    return True


def test_responses_bind_their_text_and_their_calls(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model="tiny", input="x", text_format=Point, max_output_tokens=1000
    )
    assert isinstance(answer.output_parsed, Point) and answer.status == "completed"
    tool = {"type": "function", "name": "ask", "parameters": WEATHER, "strict": True}
    asked: Any = {"model": "tiny", "input": "x", "tools": [tool], "max_output_tokens": 2000}
    for choice in ("required", {"type": "function", "name": "ask"}):
        answer = client.responses.create(**asked, tool_choice=choice)
        calls = [item for item in answer.output if item.type == "function_call"]
        assert calls and all(is_weather(json.loads(call.arguments)) for call in calls)
        with client.responses.stream(**asked, tool_choice=choice) as stream:
            final = stream.get_final_response()
        (first, *_) = final.output
        assert first.type == "function_call" and is_weather(json.loads(first.arguments))


def test_messages_bind_their_text_and_their_calls(server: ServerProcess) -> None:
    url = f"http://127.0.0.1:{server.port}"
    tool: Any = {"name": "ask", "input_schema": WEATHER}
    asked: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 2000,
    }
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        choices: list[Any] = [{"type": "any"}, {"type": "tool", "name": "ask"}]
        for choice in choices:
            answer = client.messages.create(**asked, tools=[tool], tool_choice=choice)
            calls = [block for block in answer.content if block.type == "tool_use"]
            assert calls and all(is_weather(call.input) for call in calls)
            assert answer.stop_reason == "tool_use"
            with client.messages.stream(**asked, tools=[tool], tool_choice=choice) as stream:
                final = stream.get_final_message()
            assert all(is_weather(one.input) for one in final.content if one.type == "tool_use")
        form = {"format": {"type": "json_schema", "schema": WEATHER}}
        answer = client.messages.create(**asked, extra_body={"output_config": form})
        (block,) = answer.content
        assert block.type == "text" and is_weather(json.loads(block.text))


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_binds_text_to_a_format(server: ServerProcess, stream: bool) -> None:
    client = ollama.Client(host=f"http://127.0.0.1:{server.port}")
    options = {"num_predict": 1000}
    chat: Any = {"model": "tiny", "messages": USER, "format": WEATHER, "options": options}
    generate: Any = {"model": "tiny", "prompt": "x", "format": WEATHER, "options": options}
    if stream:
        texts = [
            "".join(part.message.content for part in client.chat(**chat, stream=True)),
            "".join(part.response for part in client.generate(**generate, stream=True)),
        ]
    else:
        texts = [client.chat(**chat).message.content, client.generate(**generate).response]
    assert all(is_weather(json.loads(text)) for text in texts)
    client._client.close()
