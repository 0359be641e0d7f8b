"""Reasoning, as the openai SDK sees it: apart from the text or not, counted, bounded."""

import json

import pytest
from api_client import CALL, CHAT, COMPLETIONS, THOUGHT, request
from chat_sdk import MESSAGES, TOOLS, joined, parts, whole
from fake_engine import eventually


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_stays_in_the_text_on_request(client, say, stream):
    say(f"{THOUGHT}Hi")
    answer = whole(client, stream=stream, extra_body={"separate_reasoning": False})
    message = joined(answer)[0] if stream else parts(answer.choices[0].message)
    assert (message["content"], message["reasoning_content"]) == (f"{THOUGHT}Hi", None)


def test_reasoning_comes_in_one_chunk_on_request(client, say):
    say(f"{THOUGHT}Hi")
    for stream_reasoning, is_many in ((False, False), (True, True)):
        body = {"stream_reasoning": stream_reasoning}
        chunks = list(whole(client, stream=True, extra_body=body))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        texts = [d.reasoning_content for d in deltas if getattr(d, "reasoning_content", None)]
        assert "".join(texts) == "\nLet me 想想 🤔\n"
        assert (len(texts) > 1) is is_many


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_left_out_on_request(client, say, stream):
    say(f"{THOUGHT}Hi")
    answer = whole(client, stream=stream, extra_body={"include_reasoning": False})
    message = joined(answer)[0] if stream else parts(answer.choices[0].message)
    assert (message["content"], message["reasoning_content"]) == ("\n\nHi", None)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"extra_body": {"reasoning": {"enabled": False}}},
    ],
)
def test_thinking_off_makes_all_text_content(server, client, say, template, fields):
    say("I say <think> and </think>.")
    answer = whole(client, **fields)
    assert answer.choices[0].message.content == "I say <think> and </think>."
    assert answer.usage.completion_tokens_details is None
    off = template.render(MESSAGES, chat_template_kwargs={"enable_thinking": False})
    assert server.engine.added[0].prompt == server.frontend.tokenizer.encode(off)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "counted"),
    [
        (f"{THOUGHT}Hi there", THOUGHT.rstrip("\n")),
        ("Hi there", ""),
        ("<think>a b c", None),
        (f"<think>so {CALL}", "<think>so <tool_call>"),
    ],
)
def test_reasoning_tokens_are_counted(client, say, tokenizer, stream, text, counted):
    tokens = say(text)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = whole(client, tools=TOOLS, **options)
    usage = (list(answer)[-1] if stream else answer).usage
    assert usage.completion_tokens == len(tokens) + 1
    expected = len(tokens) + 1 if counted is None else len(tokenizer.encode(counted))
    assert usage.completion_tokens_details.reasoning_tokens == expected


def test_a_prompt_that_opens_the_tag_starts_in_reasoning(server, say):
    say("deep</think>Hi")
    body = {"prompt": "<|im_start|>assistant\n<think>\n"}
    message = json.loads(request(server, "POST", CHAT, body)[2])["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("deep", "Hi")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_counts_in_all_of_the_text(server, client, say, stream):
    say(f"{THOUGHT}One two three")
    answer = whole(client, tools=TOOLS, stop=" three", stream=stream)
    message, reasons = (
        joined(answer)
        if stream
        else (parts(answer.choices[0].message), [answer.choices[0].finish_reason])
    )
    assert (message["content"], reasons) == ("\n\nOne two", ["stop"])
    assert message["reasoning_content"] == "\nLet me 想想 🤔\n"
    eventually(lambda: server.engine.aborted)


def test_other_routes_are_not_parsed(server, say):
    say(f"{THOUGHT}Hi")
    body = {"prompt": "x", "max_tokens": 100}
    answer = json.loads(request(server, "POST", COMPLETIONS, body)[2])
    assert answer["choices"][0]["text"] == f"{THOUGHT}Hi"
    assert "completion_tokens_details" not in answer["usage"]


@pytest.mark.parametrize(
    ("parser", "why"), [("none", "not told of a reasoning"), ("gpt-oss", "no single token")]
)
def test_a_budget_that_nothing_can_keep_is_refused(serve, parser, why):
    server = serve(reasoning_parser=parser)
    body = {"messages": MESSAGES, "thinking_token_budget": 5}
    status, _, data = request(server, "POST", CHAT, body)
    error = json.loads(data)["error"]
    assert (status, error["param"]) == (400, "thinking_token_budget")
    assert why in error["message"]
    body["thinking_token_budget"] = -1
    assert request(server, "POST", CHAT, body)[0] == 200
