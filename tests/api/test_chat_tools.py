"""Tool calls and reasoning, as the openai SDK sees them: whole, streamed, in requests and usage."""

import json
import re

import pytest
from fake_engine import EOS, MODEL, eventually
from test_api_errors import CHAT, COMPLETIONS, request

from minisgl_fast.api.chat_output import ChatOutputs
from minisgl_fast.config import Config
from minisgl_fast.errors import ConfigError, RequestError
from minisgl_fast.parsers.select import Formats
from minisgl_fast.text.template import ChatTemplate

TIME = {"type": "function", "function": {"name": "get_time"}}
MESSAGES = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather 天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🏔"}}\n</tool_call>'
CALLS = f"{CALL}\n{CALL.replace('Zürich 🏔', '北京')}"
THOUGHT = "<think>\nLet me 想想 🤔\n</think>\n\n"


def whole(client, **fields):
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **fields)


def joined(stream, index=0):
    """One choice of a stream as a message, with its finish reasons."""
    message = {"content": None, "reasoning_content": None, "tool_calls": []}
    reasons = []
    for chunk in stream:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            for key in ("content", "reasoning_content"):
                text = getattr(choice.delta, key, None)
                if text:
                    message[key] = (message[key] or "") + text
            for call in choice.delta.tool_calls or []:
                if call.index == len(message["tool_calls"]):
                    assert call.type == "function"
                    assert re.fullmatch("call_[0-9a-f]{24}", call.id)
                    assert call.function.arguments == ""
                    message["tool_calls"].append([call.function.name, ""])
                else:
                    assert (call.id, call.type, call.function.name) == (None, None, None)
                    message["tool_calls"][call.index][1] += call.function.arguments
            if choice.finish_reason:
                reasons.append(choice.finish_reason)
    return message, reasons


def parts(message):
    calls = [[call.function.name, call.function.arguments] for call in message.tool_calls or []]
    return {
        "content": message.content or None,
        "reasoning_content": getattr(message, "reasoning_content", None),
        "tool_calls": calls,
    }


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


# Reasoning


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


def test_other_routes_are_not_parsed(server, say):
    say(f"{THOUGHT}Hi")
    body = {"prompt": "x", "max_tokens": 100}
    answer = json.loads(request(server, "POST", COMPLETIONS, body)[2])
    assert answer["choices"][0]["text"] == f"{THOUGHT}Hi"
    assert "completion_tokens_details" not in answer["usage"]


def test_flags_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="gpt-oss"):
        Config(model="m", reasoning_parser="gpt-oss", tool_call_parser="mistral")
    with pytest.raises(ConfigError, match="--tool-call-parser"):
        Config(model="m", tool_call_parser="claude")
    Config(model="m", reasoning_parser="gpt-oss")


# Templates

ROUND = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c",
                "type": "function",
                "function": {"name": "f", "arguments": '{"b":1, "a":"é"}'},
            }
        ],
    },
]
EACH = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
DONE = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{{ c.function.arguments }}", '{"b":1, "a":"é"}'),
        ("{{ c.function.arguments | tojson }}", '{"b": 1, "a": "é"}'),
        ("{{ c.function | tojson }}", '{"name": "f", "arguments": {"b": 1, "a": "é"}}'),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}", "b=1;a=é;"),
    ],
)
def test_arguments_take_the_form_that_a_template_can_write(body, expected):
    template = ChatTemplate({"default": EACH + body + DONE})
    assert template.render(ROUND) == expected
    assert ROUND[1]["tool_calls"][0]["function"]["arguments"] == '{"b":1, "a":"é"}'


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "5", "[" * 100_000])
def test_arguments_that_are_no_object_are_refused_where_one_is_needed(arguments):
    function = {"name": "f", "arguments": arguments}
    messages = [*ROUND[:1], {"role": "assistant", "tool_calls": [{"function": function}]}]
    template = ChatTemplate({"default": EACH + "{{ c.function.arguments | tojson }}" + DONE})
    with pytest.raises(RequestError) as caught:
        template.render(messages)
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"
    text = ChatTemplate({"default": EACH + "{{ c.function.arguments }}" + DONE})
    assert text.render(messages) == arguments


def test_missing_arguments_are_empty_and_empty_calls_are_left_out():
    for value in (None, ""):
        function = {"name": "f", "arguments": value}
        messages = [*ROUND[:1], {"role": "assistant", "tool_calls": [{"function": function}]}]
        template = ChatTemplate({"default": EACH + "{{ c.function.arguments | tojson }}" + DONE})
        assert template.render(messages) == "{}"
    template = ChatTemplate({"default": "{{ 'tool_calls' in messages[0] }}"})
    assert template.render([{"role": "assistant", "content": "x", "tool_calls": []}]) == "False"
    template = ChatTemplate({"default": "{{ messages[0].reasoning_content }}"})
    assert template.render([{"role": "assistant", "reasoning": "r"}]) == "r"


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
