"""The ollama package, as its users call it, against a whole frontend with a fake engine."""

import json

import ollama
import pytest
from api_client import CALL, THOUGHT, request
from fake_engine import ANSWER, EOS, MODEL, FinishReason, eventually, logprob_of, top_of

MESSAGES = [{"role": "user", "content": "What is the weather?"}]


def get_weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: The name of the city.
    """
    return city


WEATHER = ("get_weather", {"city": "Zürich 🏔"})


@pytest.fixture
def client(server):
    client = ollama.Client(host=server.url)
    yield client
    client._client.close()


def calls_of(message):
    return [(c.function.name, dict(c.function.arguments)) for c in message.tool_calls or []]


def joined(parts):
    """The content, thinking, calls and last part of a chat stream."""
    parts = list(parts)
    content = "".join(part.message.content or "" for part in parts)
    thinking = "".join(part.message.thinking or "" for part in parts)
    calls = [call for part in parts for call in calls_of(part.message)]
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    return content, thinking, calls, parts[-1]


ANSWERS = [
    ("Sunny ☀️.", "Sunny ☀️.", "", []),
    ("", "", "", []),
    (CALL, "", "", [WEATHER]),
    (f"{CALL}\n{CALL}", "", "", [WEATHER, WEATHER]),
    (f"Sure 🙂.\n{CALL}", "Sure 🙂.\n", "", [WEATHER]),
    (f"{THOUGHT}{CALL}", "", "\nLet me 想想 🤔\n", [WEATHER]),
    (f"{THOUGHT}Sunny.", "\n\nSunny.", "\nLet me 想想 🤔\n", []),
    ("<tool_call>{no", "<tool_call>{no", "", []),
]


@pytest.mark.parametrize(("text", "content", "thinking", "calls"), ANSWERS)
def test_a_chat_streams_what_it_answers_whole(client, say, text, content, thinking, calls):
    tokens = say(text)
    fields = {"model": MODEL, "messages": MESSAGES, "tools": [get_weather]}
    whole = client.chat(**fields)
    message = whole.message
    assert (message.content, message.thinking or "", calls_of(message)) == (
        content,
        thinking,
        calls,
    )
    assert (message.role, whole.model) == ("assistant", MODEL)
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "stop", len(tokens) + 1)
    *parts, last = joined(client.chat(**fields, stream=True))
    assert parts == [content, thinking, calls]
    assert last.message.content == ""
    assert (last.done_reason, last.eval_count) == ("stop", whole.eval_count)
    assert last.prompt_eval_count == whole.prompt_eval_count > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_answered_through_the_template(client, say, stream, last_prompt):
    say(f"{THOUGHT}{ANSWER}")
    answer = client.generate(model=MODEL, prompt="Capital?", system="Be brief.", stream=stream)
    parts = list(answer) if stream else [answer]
    assert "".join(part.response for part in parts) == "\n\n" + ANSWER
    assert "".join(part.thinking or "" for part in parts) == "\nLet me 想想 🤔\n"
    assert last_prompt() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_raw_prompt_is_taken_as_it_is(client, last_prompt):
    answer = client.generate(model=MODEL, prompt="The capital", raw=True)
    assert answer.response.endswith(ANSWER)
    assert last_prompt() == "The capital"


def test_durations_are_nanoseconds_and_add_up(client):
    for answer in (
        client.chat(model=MODEL, messages=MESSAGES),
        list(client.chat(model=MODEL, messages=MESSAGES, stream=True))[-1],
    ):
        parts = answer.load_duration + answer.prompt_eval_duration + answer.eval_duration
        assert answer.prompt_eval_duration > 0
        assert answer.eval_duration > 0
        assert 1e5 < parts <= answer.total_duration < 60e9


def test_lines_are_json_and_nothing_else(server):
    status, headers, body = request(
        server, "POST", "/api/chat", {"model": MODEL, "messages": MESSAGES}
    )
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    lines = [json.loads(line) for line in body.decode().splitlines()]
    assert lines[-1]["done"] is True
    assert {line["model"] for line in lines} == {MODEL}
    assert len({line["created_at"] for line in lines}) == 1


def test_options_reach_the_engine(server, client, tokenizer):
    client.chat(
        model=f"{MODEL}:latest",
        messages=MESSAGES,
        options={
            "num_predict": 7,
            "temperature": 0.25,
            "top_k": 5,
            "top_p": 0.5,
            "min_p": 0.125,
            "seed": 12,
            "repeat_penalty": 1.5,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.75,
            "num_ctx": 8192,
        },
    )
    sent = server.engine.added[-1]
    assert (sent.max_tokens, sent.temperature, sent.top_k, sent.top_p) == (7, 0.25, 5, 0.5)
    assert (sent.min_p, sent.seed, sent.repetition_penalty) == (0.125, 12, 1.5)
    assert (sent.presence_penalty, sent.frequency_penalty) == (0.5, 0.75)
    client.chat(model=MODEL, messages=MESSAGES, options={"num_predict": -1, "seed": -1})
    assert server.engine.added[-1].max_tokens == 4096 - len(server.engine.added[-1].prompt)
    client.chat(model=MODEL, messages=MESSAGES, options={"num_predict": 10_000_000})
    assert server.engine.added[-1].max_tokens == 4096 - len(server.engine.added[-1].prompt)
    client.chat(model=MODEL, messages=MESSAGES, options={"repeat_penalty": 1.5, "repeat_last_n": 0})
    assert server.engine.added[-1].repetition_penalty == 1.0


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_and_lengths_end_an_answer(server, client, say, stream):
    def ask(**options):
        answer = client.chat(model=MODEL, messages=MESSAGES, options=options, stream=stream)
        parts = list(answer) if stream else [answer]
        return "".join(part.message.content for part in parts), parts[-1].done_reason

    say(ANSWER)
    assert ask(stop=["is Paris"]) == ("The capital of France ", "stop")
    eventually(lambda: server.engine.aborted)
    assert ask(num_predict=3) == ("The capital of", "length")


def test_thinking_is_chosen_by_the_request(client, last_prompt):
    client.chat(model=MODEL, messages=MESSAGES, think=False)
    assert last_prompt().endswith("<think>\n\n</think>\n\n")
    client.chat(model=MODEL, messages=MESSAGES, think=True)
    assert last_prompt().endswith("<|im_start|>assistant\n")
    client.chat(model=MODEL, messages=MESSAGES, think="low")
    assert last_prompt().endswith("<|im_start|>assistant\n")


def test_a_conversation_with_tools_reaches_the_template(client, last_prompt):
    call = {"function": {"name": "get_weather", "arguments": {"city": "É"}}}
    client.chat(
        model=MODEL,
        tools=[get_weather],
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call, call]},
            {"role": "tool", "tool_name": "get_weather", "content": "21 °C"},
            {"role": "tool", "tool_name": "get_weather", "content": "22 °C"},
        ],
    )
    prompt = last_prompt()
    assert '"name": "get_weather"' in prompt
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "É"}}' in prompt
    assert "<tool_response>\n21 °C\n</tool_response>\n<tool_response>\n22 °C" in prompt


def test_a_call_that_was_cut_off_is_left_out(client, say):
    tokens = say(CALL)
    fields = {
        "model": MODEL,
        "messages": MESSAGES,
        "tools": [get_weather],
        "options": {"num_predict": len(tokens) - 5},
    }
    whole = client.chat(**fields)
    assert (whole.done_reason, whole.message.tool_calls) == ("length", None)
    content, _, calls, last = joined(client.chat(**fields, stream=True))
    assert (content, calls, last.done_reason) == ("", [], "length")


def test_the_model_is_listed_described_and_loaded(server, client):
    (card,) = client.list().models
    assert card.model == MODEL
    assert card.details.format == "safetensors"
    (running,) = client.ps().models
    assert running.context_length == 4096
    shown = client.show(MODEL)
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo == {
        "general.architecture": "qwen3",
        "general.basename": MODEL,
        "general.parameter_count": 596_049_920,
        "qwen3.context_length": 4096,
        "qwen3.embedding_length": 8,
        "qwen3.vocab_size": 151936,
    }
    assert shown.parameters == "temperature 0.6\ntop_p 0.95\ntop_k 20"
    details = shown.details
    assert (details.family, details.families) == ("qwen3", ["qwen3"])
    assert (details.parameter_size, details.quantization_level) == ("596.05M", "F32")
    assert "<|im_start|>" in shown.template
    assert client.generate(model=MODEL).done_reason == "load"
    assert client.chat(model=MODEL).done_reason == "load"
    status, _, body = request(server, "GET", "/api/version")
    assert (status, list(json.loads(body))) == (200, ["version"])


BAD = [
    ({"model": "llama9"}, 404, "llama9"),
    ({"options": {"temperature": -1}}, 400, "options.temperature must be in"),
    ({"options": {"repeat_penalty": 9}}, 400, "options.repeat_penalty must be in"),
    ({"options": {"mirostat": 2}}, 400, "options.mirostat"),
    ({"options": {"seed": "x"}}, 400, "options.seed"),
    ({"think": "hard"}, 400, "think must be one of"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs must be in"),
    ({"top_logprobs": 2}, 400, "top_logprobs can only be given"),
    ({"format": "xml"}, 400, "format must be"),
    ({"messages": [{"role": "user", "content": "x", "images": ["aa"]}]}, 400, "images"),
    ({"messages": [{"role": "god", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "maximum context length"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "status", "text"), BAD)
def test_errors_are_the_client_s_exceptions(server, fields, status, text, stream):
    body = {"model": MODEL, "messages": MESSAGES, **fields, "stream": stream}
    found, _, answer = request(server, "POST", "/api/chat", body)
    assert found == status
    assert list(json.loads(answer)) == ["error"]
    assert text in json.loads(answer)["error"]
    assert not server.engine.added


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"model": "llama9"}, 404, "llama9"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat"),
        ({"options": {"seed": "x"}}, 400, "options.seed"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs must be in"),
        ({"top_logprobs": 2}, 400, "top_logprobs can only be given"),
        ({"format": "xml"}, 400, "format must be"),
    ],
)
def test_a_request_that_only_loads_the_model_is_checked_too(server, path, fields, status, text):
    found, _, answer = request(server, "POST", path, {"model": MODEL, **fields})
    assert found == status
    assert text in json.loads(answer)["error"]


def test_the_package_raises_what_the_server_says(client):
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat(model="llama9", messages=MESSAGES)
    assert caught.value.status_code == 404
    assert "llama9" in caught.value.error


def test_a_body_without_a_content_type_is_read(server):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(
        "POST",
        "/api/generate",
        json.dumps({"model": MODEL, "prompt": "Hi", "stream": False}),
        {"Content-Type": "application/x-www-form-urlencoded"},
    )
    response = connection.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["response"].endswith(ANSWER)
    connection.close()


def test_an_engine_that_fails_ends_the_stream_with_an_error(server, client):
    server.engine.script = lambda request: [785]
    with pytest.raises(ollama.ResponseError):
        for part in client.chat(model=MODEL, messages=MESSAGES, stream=True):
            if part.message.content:
                server.engine.end_of_all = FinishReason.ERROR


def shown(entry):
    """What the client got of a token's entry, from JSON to the package's type and back."""
    return (entry.token, entry.logprob, [(one.token, one.logprob) for one in entry.top_logprobs])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat", "generate"])
def test_every_token_has_its_log_probability(server, client, say, tokenizer, route, stream):
    tokens = [*say(f"{THOUGHT}Zürich 🏔 it is."), EOS]
    ask = {"messages": MESSAGES} if route == "chat" else {"prompt": "Where?"}
    fields = {"model": MODEL, "logprobs": True, "top_logprobs": 2, "stream": stream, **ask}
    answer = getattr(client, route)(**fields)
    parts = list(answer) if stream else [answer]
    position = len(server.engine.added[-1].prompt)

    def text(token):
        return tokenizer.token_bytes(token).decode("utf-8", "replace")

    expected = [
        (
            text(token),
            logprob_of(position + i, token),
            [(text(one), value) for one, value in top_of(position + i, 2)],
        )
        for i, token in enumerate(tokens)
    ]
    assert [shown(entry) for part in parts for entry in part.logprobs or []] == expected
    plain = getattr(client, route)(model=MODEL, **ask)
    assert plain.logprobs is None
    assert server.engine.added[-1].num_top_logprobs == -1
