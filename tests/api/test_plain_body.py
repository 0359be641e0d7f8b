"""Plain bodies: read in one pass, to the same request as in full, or not at all."""

import itertools
import json

import pytest

from minisgl_fast.api import openai_request
from minisgl_fast.api.openai_request import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)
from minisgl_fast.errors import RequestError

USER = {"role": "user", "content": 'Hi 你好 \U0001f600 \\ " \n'}
TURNS = [
    {"role": "system", "content": ""},
    USER,
    {"role": "assistant", "content": "x" * 5000},
    USER,
]

PLAIN_VALUES = {
    "model": ["m", "", None],
    "max_tokens": [1, 4096, None],
    "max_completion_tokens": [5, None],
    "temperature": [0, 0.0, 1, 1e-9, 1.5, None],
    "top_p": [1, 0.1],
    "top_k": [-1, 0, 50],
    "seed": [0, -1, 2**63 - 1],
    "stop": ["a", ["a", "b"], [], None],
    "ignore_eos": [True, False],
    "stream": [True, False, None],
    "n": [1, None],
    "presence_penalty": [-2, 1.5],
    "chat_template_kwargs": [{"enable_thinking": False}, {}, None],
}
OTHER_VALUES = {
    "model": [5],
    "max_tokens": [0, -1, 1.0, 1.5, "1", True, 2**63, 10**30, [1]],
    "temperature": ["0", None, True, 1e400],
    "top_k": [2**64, 1.0],
    "seed": [2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**40, 1.0, "1"],
    "n": [0, 2, 17, 1.0, 2**70],
    "stop": [5, [5], {"a": 1}],
    "stream_options": [{"include_usage": True}, {}, None, 5],
    "logit_bias": [{"5": 1}, {"a": 1}],
    "stop_token_ids": [[1, 2], []],
    "user": ["u"],
    "logprobs": [True, False, None],
    "unknown": [1],
    "tools": [[], [{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["none", "required"],
    "reasoning_effort": ["low", "none"],
    "echo": [True, False],
    "prompt": ["p", None],
    "chat_template_kwargs": [5],
}
MESSAGES = [
    TURNS,
    [],
    [USER] * 4096,
    [USER] * 4097,
    [{"role": "user", "content": [{"type": "text", "text": "t"}]}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "tool", "content": "c", "tool_call_id": "1"}],
    [{"role": "developer", "content": "c"}],
    [{"role": "user", "content": "c", "name": "n", "more": 1}],
    [{"role": "nobody", "content": "c"}],
    [{"role": "user", "content": 5}],
    "no list",
]


def bodies():
    yield from ({"messages": messages} for messages in MESSAGES)
    for values in (PLAIN_VALUES, OTHER_VALUES):
        for name, found in values.items():
            yield from ({"messages": TURNS, name: value} for value in found)
    for first, second in itertools.combinations(PLAIN_VALUES, 2):
        pair = {first: PLAIN_VALUES[first][0], second: PLAIN_VALUES[second][-1]}
        yield {"messages": [USER], **pair}
    yield {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}}
    yield {"messages": [USER], "stream": True, "stream_options": {"other": 1}}


RAW = [
    b"", b"{", b"null", b"[]", b'{"messages":[{"role":"user","content":"\xff"}]}',
    b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}',
    b'{"messages":[{"role":"user","content":"a","content":"b"}],"top_k":1,"top_k":2}',
    b'{"messages":[{"role":"user","content":"a"}],"temperature":-0.0}  ',
    b'{"messages":[{"role":"user","content":"a"}]} x',
    b'\xef\xbb\xbf{"messages":[{"role":"user","content":"a"}]}',
    b'{"messages":[{"role":"user","content":"a\x01"}]}',
    b'{"messages":[{"role":"user","content":"a"}],"temperature":1E0,"max_tokens":10}',
    b'{"messages":[{"role":"user","content":"a"}],"temperature":01}',
    b'{"chat_template_kwargs":{"a":' + b"[" * 70 + b"]" * 70 + b"}}",
]  # fmt: skip


def outcome(parse, body):
    try:
        request, given = parse(body)
    except RequestError as error:
        return error.message, error.param
    shape = ChatRequest if parse is parse_chat else CompletionRequest
    names = {name for name in dir(shape) if not name.startswith("_")} - {"messages"}
    names = {name for name in names if not callable(getattr(shape, name))}
    assert set(shape.__struct_fields__) - {"messages"} < names  # the rest are properties
    values = {name: getattr(request, name) for name in names}
    return {name: (type(value), value) for name, value in values.items()}, given


@pytest.fixture
def in_full(monkeypatch):
    """The parsers without the way for plain bodies."""

    def call(parse, body):
        with monkeypatch.context() as patch:
            for reader in (openai_request._PLAIN_CHAT, openai_request._PLAIN_COMPLETION):
                patch.setattr(reader, "read", lambda body: None)
            return outcome(parse, body)

    return call


def test_chat_bodies_read_the_same_in_full(in_full):
    for body in [json.dumps(fields).encode() for fields in bodies()] + RAW:
        assert outcome(parse_chat, body) == in_full(parse_chat, body), body[:200]


def test_completion_bodies_read_the_same_in_full(in_full):
    for prompt in ("Hi", ["a", "b"], [1, 2], [[1], [2]], [], [1, "a"], [1.0], [2**70], None, 5):
        for fields in bodies():
            fields.pop("messages")
            body = json.dumps({**fields, "prompt": prompt}).encode()
            assert outcome(parse_completion, body) == in_full(parse_completion, body), body[:200]


@pytest.mark.parametrize("name", PLAIN_VALUES)
def test_the_common_fields_are_plain(name):
    for value in PLAIN_VALUES[name]:
        body = json.dumps({"messages": TURNS, name: value}).encode()
        assert openai_request._PLAIN_CHAT.read(body) is not None


@pytest.mark.parametrize("name", sorted(set(OTHER_VALUES) - {"stream_options", "temperature"}))
def test_other_values_are_not(name):
    for value in OTHER_VALUES[name]:
        if value is not None:
            body = json.dumps({"messages": TURNS, name: value}).encode()
            assert openai_request._PLAIN_CHAT.read(body) is None


def test_messages_reach_the_template_as_they_came():
    request, messages = parse_chat(json.dumps({"messages": TURNS}).encode())
    assert messages == TURNS
    assert [(m.role, m.content, m.tool_calls) for m in request.messages] == [
        (turn["role"], turn["content"], None) for turn in TURNS
    ]
