"""Bodies out: whole objects and stream events, byte by byte where clients look."""

import json

import pytest

from minisgl_fast.api.native_format import GenerateFormat
from minisgl_fast.api.openai_response import (
    ChatFormat,
    CompletionFormat,
    Echo,
    Head,
)
from minisgl_fast.api.response_format import DONE, Answer, Usage, json_escaped

ANSWER = Answer(1, json_escaped('a "b"\n'), "stop", "END")
USAGE = Usage(9, 2, 4)
USAGE_JSON = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def events(data):
    assert data.endswith(b"\n\n")
    return [json.loads(event.removeprefix(b"data: ")) for event in data[:-2].split(b"\n\n")]


def test_a_chat_completion_has_every_key_of_the_schema():
    body = json.loads(ChatFormat(Head("x", 'm"%')).body([ANSWER], USAGE))
    assert body.pop("created") > 1.7e9
    assert body == {
        "id": "chatcmpl-x",
        "object": "chat.completion",
        "model": 'm"%',
        "choices": [
            {
                "index": 1,
                "message": {"role": "assistant", "content": 'a "b"\n', "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": "END",
                "stop_reason": "END",
            }
        ],
        "usage": USAGE_JSON,
    }


@pytest.mark.parametrize("include_usage", [False, True])
def test_chat_chunks_are_role_text_reason_usage(include_usage):
    form = ChatFormat(Head("x", "m", include_usage))
    data = form.opening(1, USAGE) + form.prefix(1) + b"Hi" + form.suffix(1) + form.closing(ANSWER)
    chunks = events(data)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Hi"},
        {"content": 'a "b"\n'},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, "stop"]
    assert chunks[-1]["choices"][0]["matched_stop"] == "END"
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)
    assert all(chunk["choices"][0]["index"] == 1 for chunk in chunks)
    assert all(("usage" in chunk) is include_usage for chunk in chunks)
    if include_usage:
        (last,) = events(form.ending(USAGE).removesuffix(DONE))
        assert (last["choices"], last["usage"]) == ([], USAGE_JSON)
        assert last["object"] == "chat.completion.chunk"
    else:
        assert form.ending(USAGE) == DONE


def test_an_end_without_text_is_one_chunk():
    form = ChatFormat(Head("x", "m"))
    assert len(events(form.closing(Answer(0, b"", "length", None)))) == 1


def test_completion_chunks_carry_the_reason_on_the_last_text():
    form = CompletionFormat(Head("x", "m"), [Echo(""), Echo("Echo")])
    assert form.opening(0, USAGE) == b""
    chunks = events(
        form.opening(1, USAGE) + form.prefix(1) + b"Hi" + form.suffix(1) + form.closing(ANSWER)
    )
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Echo", "Hi", 'a "b"\n']
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert {chunk["id"] for chunk in chunks} == {"cmpl-x"}
    body = json.loads(form.body([ANSWER], USAGE))
    assert body["choices"][0]["text"] == 'Echoa "b"\n'
    assert body["usage"] == USAGE_JSON


@pytest.mark.parametrize(
    ("text", "event"),
    [
        (b" Paris", b"data:  Paris\n\n"),
        (b"a\nb", b"data: a\ndata: b\n\n"),
        (b"\n", b"data: \ndata: \n\n"),
        (b"a\r\nb\rc", b"data: a\ndata: b\ndata: c\n\n"),
    ],
)
def test_generate_frames_are_plain_text_that_sse_can_carry(text, event):
    assert GenerateFormat().text_event(text) == event
