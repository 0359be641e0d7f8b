"""The anthropic SDK, as its users call it, against a whole frontend with a fake engine."""

import json

import anthropic
import pytest
from api_client import CALL, THOUGHT, request
from fake_engine import ANSWER, MODEL, FinishReason, eventually

from minisgl_fast.token_rules import ThinkingBudget, TokenRules, split

MESSAGES = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [
    {
        "name": "get_weather",
        "description": "Weather 天气",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
ASK = {"model": MODEL, "messages": MESSAGES, "max_tokens": 200}


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def plain(message):
    """The message without what differs between two answers, and without the names of its ids."""
    fields = message.model_dump(exclude={"id"}, exclude_none=True)
    for block in fields["content"]:
        block.pop("id", None)
        block.pop("signature", None)
    return fields


def streamed(client, **fields):
    with client.messages.stream(**fields) as stream:
        events = list(stream)
        return events, stream.get_final_message()


WEATHER = {"type": "tool_use", "name": "get_weather", "input": {"city": "Zürich 🏔"}}
THINKING = {"type": "thinking", "thinking": "\nLet me 想想 🤔\n"}
ANSWERS = [
    ("Sunny ☀️.", [{"type": "text", "text": "Sunny ☀️."}], "end_turn"),
    ("", [{"type": "text", "text": ""}], "end_turn"),
    (CALL, [WEATHER], "tool_use"),
    (f"{CALL}\n{CALL}", [WEATHER, WEATHER], "tool_use"),
    (f"Sure 🙂.\n{CALL}", [{"type": "text", "text": "Sure 🙂.\n"}, WEATHER], "tool_use"),
    (f"{THOUGHT}{CALL}", [THINKING, WEATHER], "tool_use"),
    (f"{THOUGHT}Sunny.", [THINKING, {"type": "text", "text": "\n\nSunny."}], "end_turn"),
    ("<tool_call>{no", [{"type": "text", "text": "<tool_call>{no"}], "end_turn"),
    (THOUGHT[:20], [{"type": "thinking", "thinking": THOUGHT[7:20]}], "end_turn"),
]


@pytest.mark.parametrize(("text", "content", "reason"), ANSWERS)
def test_a_message_is_made_of_blocks_and_streams_as_it_is_whole(client, say, text, content, reason):
    say(text)
    message = client.messages.create(**ASK, tools=TOOLS)
    assert plain(message)["content"] == content
    assert message.stop_reason == reason
    assert message.id.startswith("msg_")
    assert (message.model, message.role, message.type) == (MODEL, "assistant", "message")
    for block in message.content:
        if block.type == "thinking":
            assert block.signature
        if block.type == "tool_use":
            assert block.id.startswith("toolu_")
    events, final = streamed(client, **ASK, tools=TOOLS)
    assert plain(final) == plain(message)
    assert events[0].message.usage.output_tokens == 0
    assert [event.type for event in events if event.type.startswith("message")] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


def test_a_stream_has_the_events_in_order_and_no_done(server, client, say):
    say(f"{THOUGHT}Hi{CALL}")
    status, headers, body = request(
        server, "POST", "/v1/messages", {**ASK, "tools": TOOLS, "stream": True}
    )
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = [block.split("\ndata: ") for block in body.decode().strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    datas = [json.loads(data) for _, data in events]
    assert [data["type"] for data in datas] == names
    merged = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert merged == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    kinds = [d["content_block"]["type"] for d in datas if d["type"] == "content_block_start"]
    assert kinds == ["thinking", "text", "tool_use"]
    for index, kind in enumerate(kinds):
        deltas = [d["delta"] for d in datas if d.get("index") == index and "delta" in d]
        types = {delta["type"] for delta in deltas}
        assert (
            types
            == {
                "thinking": {"thinking_delta", "signature_delta"},
                "text": {"text_delta"},
                "tool_use": {"input_json_delta"},
            }[kind]
        )
    start, delta = datas[0]["message"], datas[-2]
    assert start["usage"]["input_tokens"] + start["usage"]["cache_read_input_tokens"] > 0
    assert start["usage"]["output_tokens"] == 0
    assert delta["usage"]["output_tokens"] > 0
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_cached_tokens_are_counted_apart(server, client):
    message = client.messages.create(**ASK)
    usage = message.usage
    assert usage.cache_read_input_tokens == server.engine.cached
    assert usage.input_tokens == len(server.engine.added[-1].prompt) - server.engine.cached
    assert streamed(client, **ASK)[1].usage == usage


def test_sampling_fields_reach_the_engine(server, client):
    extra = {"temperature": 0.25, "top_k": 5, "top_p": 0.5}  # the SDK sends them no longer itself
    client.messages.create(**{**ASK, "max_tokens": 7}, extra_body=extra)
    sent = server.engine.added[-1]
    assert (sent.max_tokens, sent.temperature, sent.top_k, sent.top_p) == (7, 0.25, 5, 0.5)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_reasons_say_what_stopped_it(server, client, say, stream):
    def ask(**fields):
        fields = {**ASK, **fields}
        return streamed(client, **fields)[1] if stream else client.messages.create(**fields)

    say(ANSWER)
    message = ask(stop_sequences=["xyz", "is Paris"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "is Paris")
    assert message.content[0].text == "The capital of France "
    eventually(lambda: server.engine.aborted)
    message = ask(max_tokens=3)
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 3


def test_more_tokens_than_the_context_has_may_be_asked_for(server, client):
    server.engine.script = lambda request: [785]
    message = client.messages.create(**{**ASK, "max_tokens": 10_000})
    assert message.stop_reason == "model_context_window_exceeded"
    assert server.engine.added[-1].max_tokens == 4096 - len(server.engine.added[-1].prompt)


def test_a_call_that_was_cut_off_is_raw_in_a_stream_and_empty_as_a_whole(client, say):
    tokens = say(CALL)
    fields = {**ASK, "max_tokens": len(tokens) - 5, "tools": TOOLS}
    message = client.messages.create(**fields)
    assert message.stop_reason == "max_tokens"
    assert message.content[0].input == {}
    events, _ = streamed(client, **fields)
    raw = "".join(e.partial_json for e in events if e.type == "input_json")
    assert raw and json.dumps(WEATHER["input"], ensure_ascii=False).startswith(raw)


def test_a_conversation_with_tools_reaches_the_template(client, last_prompt):
    client.messages.create(
        model=MODEL,
        max_tokens=5,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        tools=TOOLS,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hmm", "signature": "s"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "É"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [{"type": "text", "text": "21 °C"}],
                    },
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
    )
    prompt = last_prompt()
    assert prompt.startswith("<|im_start|>system\nBe brief.")
    assert '"description": "Weather 天气"' in prompt
    assert 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "É"}}' in prompt
    assert "<tool_response>\n21 °C\n</tool_response>" in prompt
    assert prompt.endswith("<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n")


def test_a_last_message_of_the_assistant_is_continued(client, last_prompt):
    begun = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    message = client.messages.create(model=MODEL, max_tokens=100, messages=begun)
    assert last_prompt().endswith("</think>\n\nIt is")
    assert message.content[0].text.endswith(ANSWER)


def test_thinking_can_be_turned_off_and_tools_hidden(client, last_prompt):
    client.messages.create(**ASK, thinking={"type": "disabled"}, tools=TOOLS)
    assert last_prompt().endswith("<think>\n\n</think>\n\n")
    client.messages.create(
        **{**ASK, "max_tokens": 2000},
        thinking={"type": "enabled", "budget_tokens": 1024},
        tools=TOOLS,
        tool_choice={"type": "none"},
    )
    assert last_prompt().endswith("<|im_start|>assistant\n")
    assert "get_weather" not in last_prompt()


@pytest.mark.parametrize(("parser", "is_kept"), [("qwen3", True), ("gpt-oss", False)])
def test_a_thinking_budget_is_a_limit_where_a_token_ends_the_thinking(
    serve, tokenizer, parser, is_kept
):
    server = serve(reasoning_parser=parser)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        client.messages.create(**{**ASK, "max_tokens": 2000}, thinking=thinking)
    rules, _ = split(server.engine.added[-1].grammar)
    start, end = (tokenizer.encode(mark)[0] for mark in ("<think>", "</think>"))
    expected = TokenRules(None, (), ThinkingBudget(1024, start, False, (end,)))
    assert rules == (expected if is_kept else None)


def test_one_call_alone_can_be_asked_for(client, say):
    say(f"{CALL}\n{CALL}")
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = client.messages.create(**ASK, tools=TOOLS, tool_choice=choice)
    assert [block.type for block in message.content] == ["tool_use"]


def test_tokens_are_counted_as_they_would_be_sent(server, client):
    fields = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "system": "Be brief."}
    count = client.messages.count_tokens(**fields)
    client.messages.create(**fields, max_tokens=1)
    assert count.input_tokens == len(server.engine.added[-1].prompt)
    long = [{"role": "user", "content": "word " * 20000}]
    assert client.messages.count_tokens(model=MODEL, messages=long).input_tokens > 20000


BAD = [
    ({"model": "gpt-4"}, anthropic.NotFoundError, "not_found_error", "gpt-4"),
    ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
    ({"temperature": -1}, anthropic.BadRequestError, "invalid_request_error", "temperature"),
    ({"stop_sequences": [""]}, anthropic.BadRequestError, "invalid_request_error", "stop_seq"),
    ({"messages": []}, anthropic.BadRequestError, "invalid_request_error", "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        anthropic.BadRequestError,
        "invalid_request_error",
        "messages[0].content[0].type: 'image'",
    ),
    (
        {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        anthropic.BadRequestError,
        "invalid_request_error",
        "tools[0].type",
    ),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 1}},
        anthropic.BadRequestError,
        "invalid_request_error",
        "budget_tokens",
    ),
    (
        {"messages": [{"role": "user", "content": "word " * 5000}]},
        anthropic.BadRequestError,
        "invalid_request_error",
        "maximum context length",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "kind", "name", "text"), BAD)
def test_errors_are_the_sdk_exceptions(server, client, fields, kind, name, text, stream):
    with pytest.raises(kind) as caught:
        client.messages.create(**ASK, stream=stream, extra_body=fields)
    body = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == name
    assert text in body["error"]["message"]
    assert not server.engine.added


def test_a_missing_field_is_named(server):
    status, _, body = request(
        server, "POST", "/v1/messages", {"messages": MESSAGES, "model": MODEL}
    )
    assert status == 400
    assert json.loads(body)["error"]["message"] == "Missing required field: max_tokens."


def test_a_server_that_is_not_ready_is_overloaded(serve):
    server = serve(ready=False)
    with (
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError) as caught,
    ):
        client.messages.create(**ASK)
    assert caught.value.status_code == 503
    assert caught.value.body["error"]["type"] == "overloaded_error"


def test_an_engine_that_fails_ends_the_stream_with_an_error(server, client):
    server.engine.script = lambda request: [785]
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(**{**ASK, "max_tokens": 4000}) as stream,
    ):
        for event in stream:
            if event.type == "content_block_delta":
                server.engine.end_of_all = FinishReason.ERROR
    assert caught.value.body["error"]["type"] == "api_error"


def test_every_answer_has_the_request_s_id_where_the_sdk_looks(server, client, say):
    say("Sunny.")
    assert client.messages.create(**ASK)._request_id
    with client.messages.stream(**ASK) as stream:
        assert stream.response.headers["request-id"] == stream.response.headers["x-request-id"]
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{**ASK, "max_tokens": 0})
    assert caught.value.request_id == caught.value.body["request_id"]
    fields = {key: value for key, value in ASK.items() if key != "max_tokens"}
    assert client.messages.with_raw_response.count_tokens(**fields).headers["request-id"]
