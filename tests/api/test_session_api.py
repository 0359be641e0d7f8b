"""What a generation request does from outside: what reaches the engine, aborts, metrics, routes."""

import json
import re
import socket
import struct
from types import SimpleNamespace

import pytest
from api_client import CHAT, COMPLETIONS, USER, ok, request
from fake_engine import ANSWER, FACTS, MODEL, eventually

from minisgl_fast.api.app import Api
from minisgl_fast.config import Config
from minisgl_fast.errors import ModelError
from minisgl_fast.server.frontend import Frontend


def metric(server, name):
    """The value of one sample in the metrics' text; 0 if it is not there."""
    text = request(server, "GET", "/metrics")[2].decode()
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(match.group(1)) if match else 0.0


def open_stream(server, receive_buffer=0, **body):
    """A socket that has asked for a stream."""
    data = json.dumps({"messages": USER, "stream": True, "ignore_eos": True, **body}).encode()
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
        % (len(data), data)
    )
    return sock


# What reaches the engine


def test_every_field_reaches_the_engine(server):
    ok(
        server,
        CHAT,
        messages=USER,
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"5": 1, "6": -100},
        stop_token_ids=[9, 10],
        ignore_eos=True,
        cache_salt="mine",
    )
    (sent,) = server.engine.added
    assert (sent.max_tokens, sent.min_tokens, sent.seed) == (7, 2, 2**64 - 1)
    assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p) == (0.5, 0.25, 5, 0.125)
    assert (sent.presence_penalty, sent.frequency_penalty, sent.repetition_penalty) == (
        0.5,
        -0.5,
        1.5,
    )
    assert sent.bias == {5: 1.0, 6: -100.0}
    assert (sent.stop_ids, sent.ignore_eos) == ([9, 10], True)
    assert sent.cache_salt != 0


def test_defaults_are_the_models_and_fill_the_context(server, tokenizer, template):
    ok(server, CHAT, messages=USER)
    (sent,) = server.engine.added
    assert sent.prompt == tokenizer.encode(template.render(USER))
    assert sent.max_tokens == FACTS["max_model_len"] - len(sent.prompt)
    assert (sent.temperature, sent.top_p, sent.top_k) == pytest.approx((0.6, 0.95, 20))
    assert (sent.cache_salt, sent.ignore_eos, sent.stop_ids, sent.bias) == (0, False, [], {})


def test_the_operators_default_max_tokens_is_for_chat_only(serve):
    server = serve(default_max_tokens=5)
    ok(server, CHAT, messages=USER)
    ok(server, COMPLETIONS, prompt="Hi")
    ok(server, CHAT, messages=USER, max_tokens=20)
    assert [sent.max_tokens for sent in server.engine.added] == [5, 16, 20]


def test_a_default_is_cut_to_the_context_where_a_wish_would_be_refused(server):
    prompt = [5] * (FACTS["max_model_len"] - 3)
    ok(server, COMPLETIONS, prompt=prompt)
    assert server.engine.added[0].max_tokens == 3
    assert request(server, "POST", COMPLETIONS, {"prompt": prompt, "max_tokens": 4})[0] == 400
    ok(server, COMPLETIONS, prompt=prompt, max_tokens=3)


def test_seeds_are_fresh_unless_given(server):
    for _ in range(3):
        ok(server, CHAT, messages=USER, max_tokens=1)
    assert len({sent.seed for sent in server.engine.added}) == 3


def test_template_variables_reach_the_template(server, tokenizer, template):
    kwargs = {"enable_thinking": False}
    ok(server, CHAT, messages=USER, max_tokens=1, chat_template_kwargs=kwargs)
    text = template.render(USER, chat_template_kwargs=kwargs)
    assert text != template.render(USER)
    assert server.engine.added[0].prompt == tokenizer.encode(text)


def test_a_long_prompt_is_encoded_off_the_loop_to_the_same_ids(server, tokenizer):
    text = "Some words, again and again. " * 200
    ok(server, COMPLETIONS, prompt=text, max_tokens=1)
    assert server.engine.added[0].prompt == tokenizer.encode_prompt(text)


def test_a_long_prompt_that_does_not_fit_is_refused_after_encoding(server):
    text = "word " * (FACTS["max_model_len"] + 10)
    status, _, data = request(server, "POST", COMPLETIONS, {"prompt": text, "stream": True})
    assert status == 400
    assert json.loads(data)["error"]["code"] == "context_length_exceeded"


def test_prompt_tokens_count_once_for_all_choices(server):
    usage = ok(server, COMPLETIONS, prompt=[[5, 6], [7]], n=3, max_tokens=2)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 12)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 8}


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_shown_only_on_request(server, tokenizer, include):
    (paris,) = tokenizer.encode(" Paris")
    answer = ok(
        server,
        CHAT,
        messages=USER,
        seed=0,
        stop_token_ids=[paris],
        include_stop_str_in_output=include,
    )
    choice = answer["choices"][0]
    text = "0. The capital of France is" + (" Paris" if include else "")
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert choice["matched_stop"] == paris


@pytest.mark.parametrize(
    ("include", "text"), [(False, "0. The capital of "), (True, "0. The capital of Fr")]
)
def test_a_stop_string_may_be_kept(server, include, text):
    answer = ok(server, CHAT, messages=USER, seed=0, stop="Fr", include_stop_str_in_output=include)
    assert answer["choices"][0]["message"]["content"] == text


def test_special_tokens_are_shown_on_request(server):
    body = {"messages": USER, "seed": 0, "ignore_eos": True, "max_tokens": 60}
    plain = ok(server, CHAT, **body)
    shown = ok(server, CHAT, **body, skip_special_tokens=False)
    assert "<|im_end|>" not in plain["choices"][0]["message"]["content"]
    assert "<|im_end|>" in shown["choices"][0]["message"]["content"]


def test_bad_sampling_defaults_of_a_model_are_found_at_the_start(tokenizer, template):
    defaults = SimpleNamespace(
        temperature=-1.0, top_p=None, top_k=None, min_p=None, repetition_penalty=None
    )
    config = Config(model=MODEL)
    with pytest.raises(ModelError, match="temperature"):
        Api(config, Frontend(config, tokenizer, template, defaults))


# Clients that go, clients that do not read


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_a_stream_aborts_every_choice_and_frees_its_pages(server, reset):
    with open_stream(server, n=3) as sock:
        sock.recv(100)
        assert metric(server, "minisgl_generations_open") == 3
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rids = sorted(sent.rid for sent in server.engine.added)
    eventually(lambda: sorted(server.engine.aborted) == rids)
    eventually(lambda: metric(server, 'minisgl_kv_pages{state="used"}') == 0)
    assert metric(server, "minisgl_generations_open") == 0
    assert metric(server, "minisgl_requests_running") == 0
    assert metric(server, 'minisgl_aborts_total{reason="client"}') == 3


def test_a_client_that_leaves_before_the_first_token_aborts(server):
    server.engine.hold = True
    for stream in (True, False):
        with open_stream(server, stream=stream):
            eventually(lambda: len(server.frontend.dispatcher) == 1)
        eventually(lambda: len(server.frontend.dispatcher) == 0)
    assert len(server.engine.aborted) == 2


def test_a_stalled_client_is_paused_and_gets_the_rest_merged(server, tokenizer):
    server.engine.script = lambda request: tokenizer.encode(" word")
    server.engine.hold = True
    with open_stream(server, max_tokens=4000, receive_buffer=4096) as sock:
        eventually(lambda: server.engine.running)
        (connection,) = server.http.connections
        theirs = connection._transport.get_extra_info("socket")
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.engine.hold = False
        eventually(lambda: any(exchange.paused for exchange in server.http.exchanges()))
        eventually(lambda: len(server.frontend.dispatcher) == 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            received = sock.recv(1 << 20)
            assert received
            data += received
    assert data.count(b" word") == 4000
    assert data.count(b"data: {") < 4000
    assert b'"finish_reason":"length"' in data


def test_other_requests_go_on_while_one_fails_to_be_written(server, monkeypatch):
    with open_stream(server, max_tokens=2000) as sock:
        sock.recv(100)
        session = server.call(server.frontend.dispatcher.choices)[0].response
        close_choice = type(session).close_choice

        def broken(self, choice, text):
            if self is session:
                raise ValueError("a bug")
            return close_choice(self, choice, text)

        monkeypatch.setattr(type(session), "close_choice", broken)
        ok(server, CHAT, messages=USER)
        data = b""
        while received := sock.recv(65536):
            data += received
            if data.endswith(b"0\r\n\r\n"):
                break
        assert b'"error"' in data


# Other routes


def test_the_mini_sglang_documentations_calls_work_as_printed(server):
    status, _, data = request(server, "GET", "/v1/models")
    (card,) = json.loads(data)["data"]
    assert status == 200
    assert {key: card[key] for key in ("id", "object", "owned_by", "root")} == {
        "id": MODEL,
        "object": "model",
        "owned_by": "mini-sglang",
        "root": MODEL,
    }
    body = b"""{
        "model": "Qwen/Qwen3-0.6B",
        "messages": [
          {"role": "user", "content": "What is the capital of France?"}
        ],
        "max_tokens": 100,
        "temperature": 0.7,
        "stream": true
      }"""
    status, headers, data = request(server, "POST", CHAT, body)
    assert headers["content-type"].startswith("text/event-stream")
    chunks = [json.loads(event[6:]) for event in data.split(b"\n\n")[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text[3:] == ANSWER
    assert data.endswith(b"data: [DONE]\n\n")
    assert ok(server, CHAT, model=MODEL, prompt="Once", max_tokens=16)["choices"]
    for method in ("GET", "POST"):
        assert request(server, method, "/v1")[::2] == (200, b'{"status":"ok"}')


def test_generate_streams_plain_text_in_whole_frames(server):
    body = {"prompt": "Hi", "max_tokens": 100, "seed": 0}
    data = request(server, "POST", "/generate", body)[2]
    events = data.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    pieces = [
        b"\n".join(line.removeprefix(b"data: ") for line in event.split(b"\n"))
        for event in events[:-2]
    ]
    assert b"".join(pieces).decode() == "0. " + ANSWER
    assert len(pieces) > 10


def test_generate_answers_in_one_piece_on_request(server):
    answer = ok(server, "/generate", prompt="Hi", max_tokens=5, seed=0, stream=False)
    assert answer["text"] == "0. The capital of"[: len(answer["text"])]
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5
    ok(server, "/generate", prompt="Hi", ignore_eos=True, max_tokens=100, stream=False)
    assert server.engine.added[-1].ignore_eos


@pytest.mark.parametrize("name", [None, "", "default", MODEL])
def test_the_model_may_be_left_out_or_called_default(server, name):
    answer = ok(server, CHAT, messages=USER, model=name, max_tokens=1)
    assert answer["model"] == MODEL


def test_a_served_name_replaces_the_models_own(serve):
    server = serve(served_model_name="mine")
    assert request(server, "POST", CHAT, {"messages": USER, "model": MODEL})[0] == 404
    assert ok(server, CHAT, messages=USER, model="mine", max_tokens=1)
    (card,) = json.loads(request(server, "GET", "/v1/models")[2])["data"]
    assert (card["id"], card["root"]) == ("mine", MODEL)


def test_metrics_count_requests_tokens_and_times(server):
    ok(server, CHAT, messages=USER, max_tokens=5)
    ok(server, CHAT, messages=USER, max_tokens=5, stream=True)
    request(server, "POST", CHAT, {"messages": USER, "top_p": 5})
    request(server, "POST", "/nowhere/else", {})
    prompt = sum(len(sent.prompt) for sent in server.engine.added)
    route = f'route="{CHAT}"'
    assert (
        metric(server, 'minisgl_requests_total{code="200",finish_reason="length",' + route + "}")
        == 2
    )
    assert metric(server, 'minisgl_requests_total{code="400",finish_reason="",' + route + "}") == 1
    assert metric(server, 'minisgl_requests_total{code="404",finish_reason="",route="other"}') == 1
    assert metric(server, "minisgl_prompt_tokens_total") == prompt
    assert metric(server, "minisgl_cached_tokens_total") == 8
    assert metric(server, "minisgl_generated_tokens_total") == 10
    assert metric(server, "minisgl_time_to_first_token_seconds_count") == 2
    assert metric(server, "minisgl_inter_token_seconds_count") == 8
    assert metric(server, "minisgl_request_seconds_count") == 2
    assert metric(server, 'minisgl_kv_pages{state="free"}') == 1000
    assert metric(server, "minisgl_ready") == 1
