"""``/v1/responses`` through the openai SDK, against a whole frontend with a fake engine."""

import json

import openai
import pytest
from api_client import CALL, THOUGHT, request
from fake_engine import ANSWER, MODEL, FinishReason, eventually, logprob_of, top_of
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

WEATHER_TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather 天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
WEATHER = ("function_call", "get_weather", '{"city": "Zürich 🏔"}')
THINKING = ("reasoning", "\nLet me 想想 🤔\n")
ASK = {"model": MODEL, "input": "What is the weather?"}


def parts(response):
    found = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, item.name, item.arguments))
        else:
            (part,) = item.content
            found.append((item.type, part.text))
    return found


def plain(response):
    """The response without what differs between two answers."""
    fields = response.model_dump(exclude={"id", "created_at", "metadata"}, warnings=False)
    for item in fields["output"]:
        item.pop("id")
        item.pop("call_id", None)
        for part in item.get("content") or []:
            part.pop("parsed", None)
        item.pop("parsed_arguments", None)
    return fields


ANSWERS = [
    ("Sunny ☀️.", [("message", "Sunny ☀️.")]),
    ("", [("message", "")]),
    (CALL, [WEATHER]),
    (f"{CALL}\n{CALL}", [WEATHER, WEATHER]),
    (f"Sure 🙂.\n{CALL}", [("message", "Sure 🙂.\n"), WEATHER]),
    (f"{THOUGHT}{CALL}", [THINKING, WEATHER]),
    (f"{THOUGHT}Sunny.", [THINKING, ("message", "\n\nSunny.")]),
    ("<tool_call>{no", [("message", "<tool_call>{no")]),
    (THOUGHT[:20], [("reasoning", THOUGHT[7:20])]),
]


@pytest.mark.parametrize(("text", "items"), ANSWERS)
def test_a_response_is_made_of_items_and_streams_as_it_is_whole(client, say, text, items):
    say(text)
    response = client.responses.create(**ASK, tools=[WEATHER_TOOL])
    assert parts(response) == items
    assert (response.status, response.error, response.incomplete_details) == (
        "completed",
        None,
        None,
    )
    assert response.output_text == "".join(item[1] for item in items if item[0] == "message")
    with client.responses.stream(**ASK, tools=[WEATHER_TOOL]) as stream:
        list(stream)
        final = stream.get_final_response()
    assert plain(final) == plain(response)


def test_a_response_and_its_events_are_what_the_sdk_s_models_demand(server, say):
    say(f"{THOUGHT}Hi{CALL}")
    body = {**ASK, "tools": [WEATHER_TOOL]}
    whole = json.loads(request(server, "POST", "/v1/responses", body)[2])
    Response.model_validate(whole)
    assert whole["id"].startswith("resp_")
    assert whole["store"] is False
    assert whole["tools"] == [WEATHER_TOOL]
    status, headers, data = request(server, "POST", "/v1/responses", {**body, "stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\ndata: ") for block in data.decode().strip().split("\n\n")]
    events = [json.loads(text) for _, text in blocks]
    assert [f"event: {event['type']}" for event in events] == [name for name, _ in blocks]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    adapter = TypeAdapter(ResponseStreamEvent)
    for event in events:
        assert adapter.validate_python(event).type == event["type"]
    names = [event["type"].removeprefix("response.") for event in events]
    merged = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert merged == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    done = [event["item"] for event in events if event["type"].endswith("item.done")]
    assert done == events[-1]["response"]["output"]
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == done[event["output_index"]]["id"]
    for kind in ("output_text", "reasoning_text", "function_call_arguments"):
        joined = "".join(e["delta"] for e in events if e["type"] == f"response.{kind}.delta")
        (end,) = [e for e in events if e["type"] == f"response.{kind}.done"]
        assert joined == end.get("text", end.get("arguments"))


def test_usage_tells_cached_and_reasoning_tokens(server, client, say, tokenizer):
    tokens = say(f"{THOUGHT}Hi")
    usage = client.responses.create(**ASK).usage
    assert usage.input_tokens == len(server.engine.added[-1].prompt)
    assert usage.input_tokens_details.cached_tokens == server.engine.cached
    assert usage.output_tokens == len(tokens) + 1
    end = tokenizer.encode("</think>")[0]
    assert usage.output_tokens_details.reasoning_tokens == tokens.index(end) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_length_makes_it_incomplete(client, say, stream):
    def ask(**fields):
        answer = client.responses.create(**ASK, **fields, stream=stream)
        if not stream:
            return answer
        last = list(answer)[-1]
        assert last.type == "response.incomplete"
        return last.response

    say(ANSWER)
    response = ask(max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert response.output[0].status == "incomplete"
    assert response.output_text == "The capital of"
    tokens = say(CALL)
    response = ask(max_output_tokens=len(tokens) - 5, tools=[WEATHER_TOOL])
    (call,) = response.output
    assert call.status == "incomplete"
    assert call.arguments and WEATHER[2].startswith(call.arguments)


def test_fields_reach_the_engine(server, client):
    client.responses.create(
        **ASK,
        max_output_tokens=20,
        temperature=0.25,
        top_p=0.5,
        extra_body={"top_k": 5, "seed": 7, "stop": ["is Paris"]},
    )
    sent = server.engine.added[-1]
    assert (sent.max_tokens, sent.temperature, sent.top_p, sent.top_k) == (20, 0.25, 0.5, 5)
    assert sent.seed == 7
    eventually(lambda: server.engine.aborted)


def test_a_conversation_of_items_reaches_the_template(client, say, last_prompt):
    say(f"{THOUGHT}I look.{CALL}")
    first = client.responses.create(**ASK, tools=[WEATHER_TOOL])
    reply = [item.model_dump(exclude_none=True, warnings=False) for item in first.output]
    client.responses.create(
        model=MODEL,
        instructions="Be brief.",
        tools=[WEATHER_TOOL],
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            *reply,
            {
                "type": "function_call_output",
                "call_id": reply[-1]["call_id"],
                "output": "21 °C",
            },
            {"role": "user", "content": "And now?"},
        ],
    )
    prompt = last_prompt()
    assert prompt.startswith("<|im_start|>system\nBe brief.")
    assert prompt.count("<|im_start|>assistant") == 2
    assert (
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🏔"}}'
    ) in prompt
    assert "<tool_response>\n21 °C\n</tool_response>" in prompt
    assert prompt.endswith("<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n")


def test_reasoning_effort_and_tool_choice_shape_the_prompt(client, last_prompt):
    client.responses.create(
        **ASK, reasoning={"effort": "none"}, tools=[WEATHER_TOOL], tool_choice="none"
    )
    assert last_prompt().endswith("<think>\n\n</think>\n\n")
    assert "get_weather" not in last_prompt()
    other = {**WEATHER_TOOL, "name": "get_time"}
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "get_time"}],
    }
    client.responses.create(**ASK, tools=[WEATHER_TOOL, other], tool_choice=allowed)
    assert "get_time" in last_prompt()
    assert "get_weather" not in last_prompt()


def test_one_call_alone_can_be_asked_for(client, say):
    say(f"{CALL}\n{CALL}")
    response = client.responses.create(**ASK, tools=[WEATHER_TOOL], parallel_tool_calls=False)
    assert parts(response) == [WEATHER]
    assert response.parallel_tool_calls is False


BAD = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
    ({"conversation": "c"}, "conversation", "stores no responses"),
    ({"background": True}, "background", "background"),
    ({"truncation": "auto"}, "truncation", "truncation"),
    ({"input": []}, "input", "must not be empty"),
    ({"top_logprobs": 21}, "top_logprobs", "must be in [0, 20]"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "x"}}, "tool_choice.mode", "auto or"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name", "Missing required field"),
    ({"input": None}, "input", "input"),
    ({"temperature": -1}, "temperature", "temperature must be in"),
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be at least 1"),
    ({"max_output_tokens": 9999}, "max_output_tokens", "maximum context length"),
    ({"input": "word " * 5000}, "input", "maximum context length"),
    ({"reasoning": {"effort": "lots"}}, "reasoning.effort", "reasoning.effort must be"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0].type",
        "input_image",
    ),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "item_reference"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "text"), BAD)
def test_errors_name_the_field_before_any_event(server, client, fields, param, text, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASK, stream=stream, extra_body=fields)
    assert caught.value.param == param
    assert text in caught.value.message
    assert not server.engine.added


def test_an_engine_that_fails_fails_the_response(server, client):
    server.engine.script = lambda request: [785]
    events = []
    for event in client.responses.create(**ASK, stream=True):
        events.append(event)
        if event.type == "response.output_text.delta":
            server.engine.end_of_all = FinishReason.ERROR
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.code


LISTED = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


@pytest.mark.parametrize(("text", "items"), ANSWERS)
def test_log_probabilities_are_those_of_the_messages_tokens(server, client, say, text, items):
    tokens = say(text)
    response = client.responses.create(**ASK, **LISTED, tools=[WEATHER_TOOL])
    assert parts(response) == items
    position = len(server.engine.added[-1].prompt)
    known = [(logprob_of(position + i, token), top_of(position + i, 2)) for i, token in
             enumerate(tokens)]  # fmt: skip
    place = 0
    for item in response.output:
        if item.type != "message":
            continue
        (part,) = item.content
        assert b"".join(bytes(one.bytes) for one in part.logprobs).decode() == part.text
        for one in part.logprobs:
            found = one.logprob, [top.logprob for top in one.top_logprobs]
            while (known[place][0], [value for _, value in known[place][1]]) != found:
                place += 1  # of reasoning and calls
            place += 1
    assert response.top_logprobs == 2
    with client.responses.stream(**ASK, **LISTED, tools=[WEATHER_TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert plain(final) == plain(response)
    listed = {}
    for event in events:
        if event.type == "response.output_text.delta":
            listed.setdefault(event.output_index, []).extend(
                (one.token, one.logprob) for one in event.logprobs
            )
        elif event.type == "response.output_text.done":
            done = [(one.token, one.logprob) for one in event.logprobs]
            assert listed.get(event.output_index, []) == done
    for index, item in enumerate(final.output):
        if item.type == "message":
            found = [(one.token, one.logprob) for one in item.content[0].logprobs]
            assert listed.get(index, []) == found


def test_log_probabilities_come_only_where_they_are_asked_for(server, client):
    response = client.responses.create(**ASK, include=["reasoning.encrypted_content"])
    assert response.output[0].content[0].logprobs == []
    assert server.engine.added[-1].num_top_logprobs == -1
    response = client.responses.create(**ASK, include=LISTED["include"])
    assert [one.top_logprobs for one in response.output[0].content[0].logprobs[:2]] == [[], []]
    assert client.responses.create(**ASK, top_logprobs=1).output[0].content[0].logprobs
