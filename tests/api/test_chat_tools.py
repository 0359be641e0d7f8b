"""Tool calls, as the openai SDK sees them: whole, streamed, in requests."""

import json
import re

import pytest
from api_client import CALL, CHAT, THOUGHT, request
from chat_sdk import MESSAGES, TOOLS, joined, parts, whole
from fake_engine import EOS, MODEL

from minisgl_fast.api.chat_output import ChatOutputs
from minisgl_fast.config import Config
from minisgl_fast.errors import ConfigError
from minisgl_fast.parsers.select import Formats

TIME = {"type": "function", "function": {"name": "get_time"}}
CALLS = f"{CALL}\n{CALL.replace('Zürich 🏔', '北京')}"
WEATHER = ["get_weather", '{"city": "Zürich 🏔"}']
BEIJING = ["get_weather", '{"city": "北京"}']
ANSWERS = [
    (CALL, None, None, [WEATHER], "tool_calls"),
    (CALLS, None, None, [WEATHER, BEIJING], "tool_calls"),
    (f"Sure 🙂.\n{CALL}", "Sure 🙂.\n", None, [WEATHER], "tool_calls"),
    (f"{THOUGHT}{CALL}", None, "\nLet me 想想 🤔\n", [WEATHER], "tool_calls"),
    (f"{THOUGHT}Sunny ☀️.", "\n\nSunny ☀️.", "\nLet me 想想 🤔\n", [], "stop"),
    ("Sunny ☀️.", "Sunny ☀️.", None, [], "stop"),
    ("<tool_call>{no", "<tool_call>{no", None, [], "stop"),
    (CALL[:-18], None, None, [[WEATHER[0], WEATHER[1][:-4]]], "stop"),
    (THOUGHT[:20], None, THOUGHT[7:20], [], "stop"),
]


@pytest.mark.parametrize(("text", "content", "reasoning", "calls", "reason"), ANSWERS)
def test_an_answer_is_taken_apart_and_streams_as_it_is_whole(
    client, say, text, content, reasoning, calls, reason
):
    say(text)
    answer = whole(client, tools=TOOLS)
    (choice,) = answer.choices
    expected = {"content": content, "reasoning_content": reasoning, "tool_calls": calls}
    assert parts(choice.message) == expected
    assert choice.finish_reason == reason
    assert choice.matched_stop == EOS
    for call in choice.message.tool_calls or []:
        assert re.fullmatch("call_[0-9a-f]{24}", call.id)
    stream = whole(client, tools=TOOLS, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert joined(chunks) == (expected, [reason])
    assert chunks[0].choices[0].delta.content == ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == answer.usage


def test_whole_messages_have_null_content_only_beside_calls(server, say):
    def message(text, **fields):
        say(text)
        body = {"messages": MESSAGES, **fields}
        return json.loads(request(server, "POST", CHAT, body)[2])["choices"][0]["message"]

    assert message(CALL, tools=TOOLS)["content"] is None
    assert message("<think>a</think>") == {
        "role": "assistant",
        "content": "",
        "refusal": None,
        "reasoning_content": "a",
    }
    assert message("Hi")["reasoning_content"] is None
    assert "tool_calls" not in message("Hi", tools=TOOLS)


def test_a_length_is_a_length_and_the_call_stays_raw(client, say, tokenizer):
    tokens = say(CALL)
    answer = whole(client, tools=TOOLS, max_tokens=len(tokens) - 5)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls
    assert WEATHER[1].startswith(call.function.arguments)
    assert not call.function.arguments.endswith("}")


def test_the_sdk_stream_helper_accumulates_calls(client, say):
    say(f"{THOUGHT}Well.{CALLS}")
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "\n\nWell."
    assert [call.function.arguments for call in message.tool_calls] == [WEATHER[1], BEIJING[1]]
    assert final.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_most_without_parallel_calls(client, say, stream):
    say(CALLS)
    answer = whole(client, tools=TOOLS, parallel_tool_calls=False, stream=stream)
    if stream:
        message, reasons = joined(answer)
        assert (message["tool_calls"], reasons) == ([WEATHER], ["tool_calls"])
    else:
        assert parts(answer.choices[0].message)["tool_calls"] == [WEATHER]
        assert answer.choices[0].finish_reason == "tool_calls"


def test_choices_are_parsed_apart(server, client, tokenizer):
    server.engine.script = lambda request: [
        *tokenizer.encode(CALL if request.seed % 2 else f"{THOUGHT}{request.seed}"),
        EOS,
    ]
    chunks = list(whole(client, tools=TOOLS, seed=1, n=3, stream=True))
    assert joined(chunks, 0)[0]["tool_calls"] == [WEATHER]
    assert joined(chunks, 1)[0]["content"] == "\n\n2"
    assert joined(chunks, 2)[0]["tool_calls"] == [WEATHER]
    answer = whole(client, tools=TOOLS, seed=1, n=3)
    assert [choice.finish_reason for choice in answer.choices] == [
        "tool_calls",
        "stop",
        "tool_calls",
    ]


def test_tools_reach_the_template_and_choice_none_hides_them(server, client, say, template):
    say(CALL)
    answer = whole(client, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].finish_reason == "stop"
    whole(client, tools=TOOLS, tool_choice="auto")
    sent = [request.prompt for request in server.engine.added]
    encode = server.frontend.tokenizer.encode
    assert sent == [encode(template.render(MESSAGES)), encode(template.render(MESSAGES, TOOLS))]


def test_allowed_tools_leave_the_model_those_alone(server, client, say, template):
    say(CALL)
    named = [{"type": "function", "function": {"name": "get_weather"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named}}
    answer = whole(client, tools=[TIME, *TOOLS], tool_choice=choice)
    assert answer.choices[0].finish_reason == "tool_calls"
    free = server.engine.added[-1]
    assert free.prompt == server.frontend.tokenizer.encode(template.render(MESSAGES, TOOLS))
    choice["allowed_tools"]["mode"] = "required"
    whole(client, tools=[TIME, *TOOLS], tool_choice=choice)
    bound = server.engine.added[-1]
    assert bound.prompt == free.prompt and free.grammar == b""
    assert b"get_weather" in bound.grammar and b"get_time" not in bound.grammar


def test_a_round_of_calls_goes_through_the_template(server, client, say, template):
    say(CALLS)
    message = whole(client, tools=TOOLS).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        for call in message.tool_calls
    ]
    say("Sunny.")
    history = [*MESSAGES, message.model_dump(exclude_none=True), *results]
    client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS)
    prompt = server.frontend.tokenizer.decode(
        server.engine.added[-1].prompt, skip_special_tokens=False
    )
    assert f"{CALLS}<|im_end|>" in prompt
    assert prompt.count("<tool_response>\nsunny\n</tool_response>") == 2


# Servers


def test_other_parsers_are_chosen_by_flag(serve, tokenizer):
    server = serve(tool_call_parser="llama3", reasoning_parser="none")
    text = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
    server.engine.script = lambda request: [*tokenizer.encode(text), EOS]
    body = {"messages": MESSAGES, "tools": TOOLS}
    choice = json.loads(request(server, "POST", CHAT, body)[2])["choices"][0]
    assert "reasoning_content" not in choice["message"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    text = f"<think>a</think>{text}"
    choice = json.loads(request(server, "POST", CHAT, body)[2])["choices"][0]
    assert choice["message"]["content"] == text


def test_calls_of_mistral_have_ids_of_nine_characters(serve, tokenizer):
    server = serve(tool_call_parser="mistral")
    server.engine.script = lambda request: [*tokenizer.encode("[TOOL_CALLS]f{}"), EOS]
    body = {"messages": MESSAGES, "tools": TOOLS}
    choice = json.loads(request(server, "POST", CHAT, body)[2])["choices"][0]
    assert re.fullmatch("[A-Za-z0-9]{9}", choice["message"]["tool_calls"][0]["id"])


class OneTokenMarks:
    """A tokenizer whose markup is tokens, of which one is special."""

    def encode(self, text):
        return [len(text)]

    def is_special(self, token):
        return token == len("[CALL_ID]")


def test_markup_that_is_a_special_token_is_kept_for_the_parser(serve, tokenizer):
    assert ChatOutputs(Formats(None, "mistral"), OneTokenMarks()).keeps_special
    assert not ChatOutputs(Formats("qwen3", "qwen25"), OneTokenMarks()).keeps_special
    server = serve(reasoning_parser="gpt-oss", tool_call_parser="gpt-oss")
    assert not server.api.chat.outputs.keeps_special
    server.api.chat.outputs.keeps_special = True
    server.engine.script = lambda request: [*tokenizer.encode("a<|im_start|>b"), EOS]
    answer = json.loads(request(server, "POST", CHAT, {"messages": MESSAGES})[2])
    assert answer["choices"][0]["message"]["content"] == "a<|im_start|>b"


def test_tools_without_a_known_format_are_refused(serve):
    server = serve(tool_call_parser="none")
    body = {"messages": MESSAGES, "tools": TOOLS}
    status, _, data = request(server, "POST", CHAT, body)
    assert (status, json.loads(data)["error"]["param"]) == (400, "tools")
    assert request(server, "POST", CHAT, {**body, "tool_choice": "none"})[0] == 200


def test_flags_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="gpt-oss"):
        Config(model="m", reasoning_parser="gpt-oss", tool_call_parser="mistral")
    with pytest.raises(ConfigError, match="--tool-call-parser"):
        Config(model="m", tool_call_parser="claude")
    Config(model="m", reasoning_parser="gpt-oss")
