"""Bodies in: every field's type and range, what is refused by name, what is ignored."""

import json
from types import SimpleNamespace

import pytest
from api_client import USER
from bodies import refused

from minisgl_fast.api.body import MAX_JSON_DEPTH
from minisgl_fast.api.openai_request import (
    MAX_MESSAGES,
    MAX_PROMPTS,
    parse_chat,
    parse_completion,
    parse_generate,
)
from minisgl_fast.api.sampling_fields import MAX_N
from minisgl_fast.api.sampling_params import cache_salt, check_token_ids, sampling_params
from minisgl_fast.errors import RequestError

DEFAULTS = SimpleNamespace(
    temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.1
)


def chat(**fields):
    """The parameters that a chat body with these fields asks for."""
    request, _ = parse_chat(json.dumps({"messages": USER, **fields}).encode())
    return sampling_params(request, None, request.max_tokens)


# Values at the edge of their range, just inside and just outside.
RANGES = [
    ("max_tokens", [1, 10**6], [0, -1]),
    ("temperature", [0, 1e-9, 0.5, 2, 100], [-0.001, 100.5]),
    ("top_p", [1e-6, 0.5, 1], [0, -0.1, 1.0001]),
    ("top_k", [-1, 0, 1, 50, 10**6], [-2]),
    ("min_p", [0, 0.3, 1], [-0.1, 1.1]),
    ("presence_penalty", [-2, 0, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 0, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.01, 1, 2], [0, -1, 2.1]),
    ("seed", [0, -(2**63), 2**63 - 1], [-(2**63) - 1]),
    ("min_tokens", [0, 5], [-1]),
    ("n", [1, MAX_N], [0, -1, MAX_N + 1]),
    ("stop", ["x", ["a"] * 32, "y" * 256, []], ["", ["a", ""], ["a"] * 33, "y" * 257]),
    ("stop_token_ids", [[], [0, 5], [1] * 64], [[-1], [1] * 65]),
    ("logit_bias", [{}, {"5": 1}, {"7": -100, "8": 100}], [{"5": 101}, {"-1": 0}]),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, good, _ in RANGES for value in good]
)
def test_a_value_inside_its_range_is_taken(field, value):
    chat(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, _, bad in RANGES for value in bad]
)
def test_a_value_outside_its_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError) as caught:
        chat(**{field: value})
    assert caught.value.param == field
    assert field in caught.value.message


WRONG_TYPES = [
    *((field, "5") for field, *_ in RANGES if field not in ("stop", "logit_bias")),
    *((field, True) for field in ("max_tokens", "temperature", "top_k", "seed", "n")),
    *((field, 1.5) for field in ("max_tokens", "top_k", "seed", "n", "min_tokens")),
    *((field, 1) for field in ("stream", "ignore_eos", "skip_special_tokens")),
    ("stop", 5),
    ("stop", {"a": 1}),
    ("logit_bias", [1]),
    ("messages", "Hi"),
    ("model", 5),
    ("stream_options", True),
    ("chat_template_kwargs", [1]),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_a_wrong_type_is_refused_by_name(field, value):
    error = refused(parse_chat, {"messages": USER, field: value})
    assert error.param == field
    assert error.message.startswith(f"{field}: Expected ")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids[1]"),
        ({"logit_bias": {"5": "x"}}, "logit_bias[...]"),
        ({"logit_bias": {"x": 5}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [*USER, {"content": "Hi"}]}, "messages[1].role"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": USER * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": None}, "messages"),
        ({"prompt": "Hi"}, "prompt"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ],
)
def test_the_error_names_the_place(fields, param):
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


def test_the_text_of_an_error_is_bounded():
    error = refused(parse_chat, {"messages": [{"role": "x" * 100_000, "content": ""}]})
    assert len(error.message) < 400


def test_whole_floats_are_integers_and_null_is_the_default():
    params = chat(max_tokens=5.0, top_k=40.0, seed=7.0, n=1.0, stop_token_ids=[3.0])
    assert (params.max_tokens, params.top_k, params.seed) == (5, 40, 7)
    assert params.stop_token_ids == (3,)
    names = [field for field, *_ in RANGES]
    assert chat(**dict.fromkeys(names)) == chat()
    _, prompts = parse_completion(b'{"prompt": [[1.0, 2], [3]]}')
    assert prompts == [[1, 2], [3]]


def test_values_come_from_the_client_then_the_model_then_neutral_ones():
    request, _ = parse_chat(json.dumps({"messages": USER, "top_p": 0.5, "temperature": 0}).encode())
    params = sampling_params(request, DEFAULTS, None)
    assert (params.top_p, params.temperature, params.top_k, params.min_p) == (0.5, 0, 20, 0.05)
    assert params.repetition_penalty == 1.1
    params = sampling_params(request, None, None)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (0, 0.0, 1.0)


def test_a_temperature_too_small_for_float32_is_greedy():
    assert chat(temperature=1e-9).temperature == 0
    assert chat(temperature=0.01).temperature == 0.01


REFUSED = [
    ("routed_experts_start_len", 3),
    ("functions", [{"name": "f"}]),
    ("modalities", ["text", "audio"]),
    ("return_meta_info", True),
    ("suffix", "x"),
    ("best_of", 2),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_what_is_not_built_yet_is_refused_by_name(field, value):
    error = refused(parse_chat, {"messages": USER, field: value})
    assert error.param == field
    assert "not support" in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False, "top_logprobs": None, "tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "functions": None},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {
            "parallel_tool_calls": False,
            "prompt_cache_key": "k",
            "verbosity": "low",
            "made_up": [{}],
        },
    ],
)
def test_what_asks_for_nothing_is_ignored(fields):
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"5",
        b"null",
        b"\xff",
        b'{"a":NaN}',
        b'{"a":1e999}',
    ],
)
@pytest.mark.parametrize("parse", [parse_chat, parse_completion, parse_generate])
def test_a_body_that_is_no_json_object_is_refused(parse, body):
    assert "JSON" in refused(parse, body).message


def test_depth_is_bounded_and_many_brackets_alone_are_fine():
    def nested(depth):
        inner = b"[" * (depth - 1) + b"]" * (depth - 1)
        return b'{"messages":[{"role":"user","content":"Hi"}],"x":' + inner + b"}"

    parse_chat(nested(MAX_JSON_DEPTH))
    assert "nested" in refused(parse_chat, nested(MAX_JSON_DEPTH + 1)).message
    assert "JSON" in refused(parse_chat, b'{"x":' + b"[" * 100_000).message
    parse_chat(json.dumps({"messages": [{"role": "user", "content": "[{" * 500}]}).encode())


def test_messages_reach_the_template_as_they_came():
    messages = [
        {"role": "developer", "content": "D", "extra": 1},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": [{"type": "text", "text": "42"}], "tool_call_id": "c"},
    ]
    _, found = parse_chat(json.dumps({"messages": messages}).encode())
    assert found == messages


def test_chat_takes_a_raw_prompt_in_place_of_messages():
    request, messages = parse_chat(b'{"prompt": "Once"}')
    assert (request.prompt, messages) == ("Once", [])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", ["Hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_come_in_four_forms(prompt, expected):
    assert parse_completion(json.dumps({"prompt": prompt}).encode())[1] == expected


@pytest.mark.parametrize(
    "prompt", [None, [], ["a", 1], [1, [2]], ["a", ["b"]], 5, {}, ["a"] * (MAX_PROMPTS + 1)]
)
def test_other_prompts_are_refused(prompt):
    assert refused(parse_completion, {"prompt": prompt}).param in ("prompt", "prompt[1][0]")


def test_no_tokens_only_with_echo():
    assert refused(parse_completion, {"prompt": "Hi", "max_tokens": 0}).param == "max_tokens"
    parse_completion(b'{"prompt": "Hi", "max_tokens": 0, "echo": true}')


def test_generate_needs_a_prompt_and_has_one_choice():
    assert refused(parse_generate, {"max_tokens": 5}).param == "prompt"
    assert refused(parse_generate, {"prompt": "Hi", "n": 2}).param == "n"
    assert (
        refused(parse_generate, {"prompt": "Hi", "sampling_params": {}}).param == "sampling_params"
    )


def test_token_ids_are_checked_against_the_vocabulary():
    check_token_ids(chat(logit_bias={"99": 1}, stop_token_ids=[99]), 100)
    for fields in ({"logit_bias": {"100": 1}}, {"stop_token_ids": [3, 100]}):
        with pytest.raises(RequestError) as caught:
            check_token_ids(chat(**fields), 100)
        assert caught.value.param in fields


def test_cache_salts_differ_and_no_salt_is_the_common_cache():
    def salt(value):
        return cache_salt(parse_generate(json.dumps({"prompt": "", "cache_salt": value}).encode()))

    assert salt(None) == salt("") == 0
    assert 0 < salt("a") != salt("b") > 0
    assert salt("a") == salt("a") < 2**64
