"""Calls that a request binds, over HTTP, in every format but qwen25, which test_serve_structured.py
has: a random model has no choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from server_process import ServerProcess
from tiny_folder import HARMONY, add_marks, make_harmony_model, make_tiny_model

from minisgl_fast.text.tokenizer import Tokenizer

USER: Any = [{"role": "user", "content": "x"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "wind": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def marked(*marks: str) -> Callable[[Path], Path]:
    """Makes a model whose tokenizer has these marks, which no text has."""
    return lambda folder: add_marks(make_tiny_model(folder), *marks, special=True)


# The format, what its markup is to the tokenizer, and how many calls an answer may have.
FORMATS: dict[str, tuple[str, Callable[[Path], Path], int]] = {
    "qwen3_coder": ("qwen3_coder", marked("<tool_call>", "</tool_call>"), 99),
    "llama3": ("llama3", marked("<|python_tag|>"), 99),
    "pythonic": ("pythonic", make_tiny_model, 99),
    "mistral": ("mistral", marked("[TOOL_CALLS]"), 99),
    "mistral-named": ("mistral", marked("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), 99),
    "gpt-oss": ("gpt-oss", make_harmony_model, 1),
}


@pytest.fixture(scope="module", params=FORMATS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[openai.OpenAI, dict[str, Any], int]]:
    """(client, fields of every request, most calls of an answer)"""
    parser, make, most = FORMATS[request.param]
    folder = make(tmp_path_factory.mktemp("calls") / "model")
    fields: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 3000}
    tokenizer = Tokenizer.load(folder)
    if parser == "gpt-oss":  # nothing binds a thought, so it is made short
        bias = {tokenizer.encode(HARMONY[4])[0]: 100}
    else:  # to be quick: few blanks, and few calls too many
        bias = dict.fromkeys(tokenizer.encode(" \t\n\r"), -20) | {max(tokenizer.eos_ids): 8}
    fields["logit_bias"] = {str(token): value for token, value in bias.items()}
    tokenizer.close()
    flags = ("--served-model-name", "tiny", "--tool-call-parser", parser)
    server = ServerProcess("--model", folder, "--num-pages", 1024, *flags)
    try:
        server.wait_ready()
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client, fields, most
        server.signal()
        assert server.wait() == 0
    finally:
        server.end()


def answer(
    client: openai.OpenAI, stream: bool, fields: dict[str, Any]
) -> tuple[list[tuple[str, str]], str, str | None]:
    """(calls, content, reason) of an answer, which the SDK puts together where it is streamed."""
    if stream:
        with client.chat.completions.stream(**fields) as events:
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**fields).choices[0]
    calls = choice.message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    content = choice.message.content or ""
    found = [(call.function.name, call.function.arguments) for call in calls]
    return found, content, choice.finish_reason


def check(calls: list[tuple[str, str]]) -> None:
    assert calls
    for name, arguments in calls:
        schema = CITY if name == "get_weather" else {"type": "object", "maxProperties": 0}
        jsonschema.validate(json.loads(arguments), schema)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bound_call_comes_as_a_call(
    served: tuple[openai.OpenAI, dict[str, Any], int], stream: bool
) -> None:
    client, fields, most = served
    called = set()
    for seed in range(2):
        for choice in ("required", NAMED):
            asked = {**fields, "tools": TOOLS, "tool_choice": choice, "seed": seed}
            calls, content, reason = answer(client, stream, asked)
            check(calls)
            assert reason == "tool_calls" and not content.strip()
            assert len(calls) <= (most if choice == "required" else 1)
            assert choice == "required" or calls[0][0] == "get_weather"
            called.update(name for name, _ in calls)
    assert "get_weather" in called


def test_a_stream_joined_is_the_whole_answer(
    served: tuple[openai.OpenAI, dict[str, Any], int],
) -> None:
    client, fields, _ = served
    asked = {**fields, "tools": TOOLS, "tool_choice": "required", "seed": 7}
    assert answer(client, True, asked) == answer(client, False, asked)


def test_one_call_alone_is_one(served: tuple[openai.OpenAI, dict[str, Any], int]) -> None:
    client, fields, _ = served
    asked = {**fields, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    calls, _, _ = answer(client, False, asked)
    check(calls)
    assert len(calls) == 1
