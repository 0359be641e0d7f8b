"""A budget of reasoning over HTTP from a real engine: kept to the token, and then the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server_process import ServerProcess, serving
from tiny_folder import add_marks, make_tiny_model

from minisgl_fast.text.tokenizer import Tokenizer

USER: Any = [{"role": "user", "content": "x"}]
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}
{%- elif opens is defined -%}{{ '<think>\n' }}{%- endif -%}
"""
OPEN = {"chat_template_kwargs": {"opens": True}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_tiny_model(tmp_path_factory.mktemp("thinking") / "model")
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    add_marks(folder, *marks)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer.load(folder)
    ids: dict[str, Any] = {mark: tokenizer.encode(mark)[0] for mark in marks}
    ids["bytes"] = {token: tokenizer.token_bytes(token) for token in (*range(256), *ids.values())}
    tokenizer.close()
    return {"folder": folder, **ids}


@pytest.fixture(scope="module")
def server(tokens: dict[str, Any]) -> Iterator[ServerProcess]:
    with serving(
        *("--model", tokens["folder"], "--served-model-name", "tiny"),
        *("--tool-call-parser", "qwen25"),
    ) as server:
        yield server


@pytest.fixture
def ask(server: ServerProcess, tokens: dict[str, Any]) -> Any:
    """Gives a function: the answer of a chat in which no reasoning ends by itself."""

    def send(**fields: Any) -> Any:
        body = {
            "model": "tiny",
            "messages": USER,
            "max_tokens": 60,
            "logit_bias": {str(tokens["</think>"]): -100},
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        }
        status, _, answer = server.request("POST", "/v1/chat/completions", body)
        assert status == 200, answer
        return answer

    return send


@pytest.mark.parametrize("budget", [0, 1, 25])
def test_a_reasoning_ends_at_its_budget_and_the_answer_follows(
    ask: Any, tokens: dict[str, Any], budget: int
) -> None:
    end = tokens["</think>"]
    for seed in range(3):
        answer = ask(**OPEN, thinking_token_budget=budget, seed=seed, n=2)
        for choice in answer["choices"]:
            ids = choice["token_ids"]
            assert ids.index(end) == budget and len(ids) == 60 and ids.count(end) == 1
            data = b"".join(tokens["bytes"].get(token, b"") for token in ids[:budget])
            reasoning = choice["message"]["reasoning_content"] or ""
            assert reasoning == data.decode(errors="replace")
            assert choice["message"]["content"]
        # The mark that ends a reasoning is one of its tokens; a reasoning without text is none.
        counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert counted == (2 * (budget + 1) if budget else 0)


def test_tokens_count_from_the_mark_where_the_model_begins_to_reason(
    ask: Any, tokens: dict[str, Any]
) -> None:
    start, end = tokens["<think>"], tokens["</think>"]
    begins = {str(start): 100, str(end): -100}
    ids = ask(thinking_token_budget=10, logit_bias=begins)["choices"][0]["token_ids"]
    assert ids[0] == start and ids.index(end) == 11 and ids.count(end) == 1
    never = {str(start): -100, str(end): -100}
    ids = ask(thinking_token_budget=10, logit_bias=never)["choices"][0]["token_ids"]
    assert start not in ids and end not in ids


def test_without_a_budget_or_with_none_the_reasoning_goes_on(
    ask: Any, tokens: dict[str, Any]
) -> None:
    for fields in ({}, {"thinking_token_budget": -1}, {"thinking_token_budget": 61}):
        ids = ask(**OPEN, **fields)["choices"][0]["token_ids"]
        assert tokens["</think>"] not in ids and len(ids) == 60
    off = {"chat_template_kwargs": {"enable_thinking": False}, "thinking_token_budget": 1}
    answer = ask(**off)
    assert tokens["</think>"] not in answer["choices"][0]["token_ids"]
    assert answer["choices"][0]["message"].get("reasoning_content") is None


def test_what_is_bound_follows_a_reasoning_that_was_ended(ask: Any, tokens: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    fields: Any = {"max_tokens": 500, "ignore_eos": False, "thinking_token_budget": 20, **OPEN}
    for seed in range(5):
        (choice,) = ask(**fields, response_format=form, seed=seed)["choices"]
        # The budget waits for the last character of the reasoning to be complete.
        assert 20 <= choice["token_ids"].index(tokens["</think>"]) <= 23
        assert isinstance(json.loads(choice["message"]["content"])["a"], int)
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    (choice,) = ask(**fields, tools=[tool], tool_choice="required")["choices"]
    assert choice["finish_reason"] == "tool_calls"


def test_a_budget_out_of_range_is_refused(server: ServerProcess) -> None:
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        refused: list[dict[str, Any]] = [
            {"thinking_token_budget": -2},
            {"thinking_token_budget": 2**31},
            {"thinking_token_budget": 1.5},
            {"thinking_token_budget": 3, "bad_words": ["</think>"]},
        ]
        for fields in refused:
            with pytest.raises(openai.BadRequestError) as found:
                client.chat.completions.create(model="tiny", messages=USER, extra_body=fields)
            assert found.value.param in fields
