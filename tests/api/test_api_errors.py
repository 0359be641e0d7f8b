"""Errors over the wire: status, body, headers, and never a byte of a stream before them."""

import http.client
import json

import pytest
from api_client import CHAT, COMPLETIONS, USER, request
from fake_engine import FACTS, eventually

from minisgl_fast.wire import FinishReason, FrameKind

TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 503: "overloaded_error"}


LONG = FACTS["max_model_len"]
# Beside those of test_error_table.py: path, body, status, param, code, words of the message.
TABLE = [
    (CHAT, {"messages": []}, 400, "messages", "invalid_value", "messages"),
    (CHAT, {"messages": USER, "temperature": "hot"}, 400, "temperature", "invalid_value", "float"),
    (CHAT, {"messages": USER, "top_p": 1.5}, 400, "top_p", "invalid_value", "(0, 1]"),
    (CHAT, {"messages": USER, "tools": [{}]}, 400, "tools[0].type", "invalid_value", "tools"),
    (CHAT, {"messages": USER, "max_tokens": 0}, 400, "max_tokens", "invalid_value", "at least 1"),
    (
        CHAT,
        {"messages": USER, "max_completion_tokens": 0},
        400,
        "max_completion_tokens",
        "invalid_value",
        "max_completion_tokens must be at least 1",
    ),
    (CHAT, {"messages": USER, "model": "gpt-4"}, 404, "model", "model_not_found", "gpt-4"),
    (
        CHAT,
        {"messages": USER, "model": "gpt-4", "top_p": 2},
        400,
        "top_p",
        "invalid_value",
        "top_p",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x" * 2_000_000}]},
        400,
        "messages",
        "context_length_exceeded",
        f"maximum context length is {LONG} tokens",
    ),
    (
        CHAT,
        {"messages": USER, "logit_bias": {"151936": 1}},
        400,
        "logit_bias",
        "invalid_value",
        "id",
    ),
    (CHAT, {"prompt": ""}, 400, "prompt", "invalid_value", "must not be empty"),
    (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"messages": []}},
        400,
        "chat_template_kwargs",
        "invalid_value",
        "messages",
    ),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "invalid_value", "must not be empty"),
    (COMPLETIONS, {"prompt": [5, -1]}, 400, "prompt", "invalid_value", "token ids"),
    (COMPLETIONS, {"prompt": [[5], [151936]]}, 400, "prompt", "invalid_value", "token ids"),
    (
        COMPLETIONS,
        {"prompt": [5] * LONG},
        400,
        "prompt",
        "context_length_exceeded",
        f"maximum context length is {LONG} tokens",
    ),
    (COMPLETIONS, {"prompt": [5], "suffix": "x"}, 400, "suffix", "invalid_value", "suffix"),
    (COMPLETIONS, {"prompt": "Hi", "n": 129}, 400, "n", "invalid_value", "[1, 128]"),
    ("/generate", {"max_tokens": 5}, 400, "text", "invalid_value", "input_ids"),
    ("/nowhere", {}, 404, None, "not_found", "/nowhere"),
]


@pytest.fixture(scope="module")
def shared(module_serve):
    return module_serve()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "param", "code", "words"), TABLE)
def test_an_error_is_one_json_body_that_names_the_field(
    shared, path, body, status, param, code, words, stream
):
    if isinstance(body, dict):
        body = {**body, "stream": stream}
    found, headers, data = request(shared, "POST", path, body)
    error = json.loads(data)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert headers["content-length"] == str(len(data))
    assert headers["x-request-id"]
    detail = error["error"]
    assert (detail["param"], detail["code"]) == (param, code)
    assert detail["type"] == TYPES[status]
    assert words in detail["message"]
    assert len(data) < 2000
    assert error["object"] == "error"
    assert error["message"] == detail["message"]
    assert error["code"] == status  # SGLang's clients read a number
    assert not shared.engine.added


def test_a_wrong_content_type_is_refused_and_a_missing_one_is_not(server):
    body = json.dumps({"prompt": "Hi", "max_tokens": 1}).encode()
    for value, status in (
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
    ):
        assert request(server, "POST", COMPLETIONS, body, {"Content-Type": value})[0] == status
    assert request(server, "POST", COMPLETIONS, body, {})[0] == 200


def test_a_known_path_with_another_method_lists_what_it_allows(server):
    status, headers, _ = request(server, "GET", CHAT)
    assert (status, headers["allow"]) == (405, "POST")


def test_while_loading_requests_are_refused_and_health_shows_progress(serve):
    server = serve(ready=False)
    report = json.dumps({"stage": "weights", "done": 2, "total": 5}).encode()
    server.call(server.engine.channel.send, FrameKind.PROGRESS, report)
    eventually(lambda: server.frontend.progress)
    status, _, data = request(server, "GET", "/health")
    assert (status, json.loads(data)) == (
        503,
        {"state": "loading", "stage": "weights", "progress": 0.4},
    )
    assert request(server, "GET", "/ready")[0] == 503
    status, headers, data = request(server, "POST", CHAT, {"messages": USER})
    assert (status, headers["retry-after"]) == (503, "5")
    assert json.loads(data)["error"]["type"] == "overloaded_error"
    server.call(server.engine.ready)
    eventually(lambda: server.frontend.state == "ready")
    assert request(server, "GET", "/health")[0] == 200
    assert request(server, "GET", "/ready")[0] == 200


def test_while_draining_health_is_good_and_new_requests_are_refused(server):
    server.call(server.frontend.drain)
    assert request(server, "GET", "/health")[0] == 200
    assert request(server, "GET", "/ready")[0] == 503
    assert request(server, "POST", CHAT, {"messages": USER})[0] == 503


def test_a_full_queue_refuses_all_choices_of_a_request_and_says_when_to_retry(serve):
    server = serve(max_queued_requests=3)
    status, headers, data = request(server, "POST", CHAT, {"messages": USER, "n": 4})
    assert (status, headers["retry-after"]) == (503, "1")
    assert "queue is full" in json.loads(data)["error"]["message"]
    assert not server.engine.added
    assert request(server, "POST", CHAT, {"messages": USER, "n": 3})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_error_before_the_first_token_is_a_plain_500(server, stream):
    server.engine.end_of_all = FinishReason.ERROR
    status, _, data = request(server, "POST", CHAT, {"messages": USER, "stream": stream})
    assert status == 500
    assert json.loads(data)["error"]["code"] == "engine_error"


def test_an_engine_abort_is_a_finish_reason(server):
    server.engine.end_of_all = FinishReason.ABORTED
    status, _, data = request(server, "POST", CHAT, {"messages": USER})
    assert status == 200
    assert json.loads(data)["choices"][0]["finish_reason"] == "abort"


def stream_until(server, condition, cause):
    """Everything of a stream that is interrupted by ``cause`` once ``condition`` holds."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = {"messages": USER, "stream": True, "ignore_eos": True, "n": 2}
    connection.request(
        "POST", CHAT, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200
    eventually(condition)
    cause()
    data = response.read()
    assert connection.sock.recv(1) == b"", "the connection stays open behind an error"
    connection.close()
    return data


def test_an_error_in_a_stream_is_an_event_then_done(server):
    def break_one():
        server.engine.end_of_all = FinishReason.ERROR

    data = stream_until(server, lambda: server.frontend.dispatcher.num_generated > 5, break_one)
    events = data.removesuffix(b"\n\n").split(b"\n\n")
    assert events[-1] == b"data: [DONE]"
    error = json.loads(events[-2].removeprefix(b"data: "))["error"]
    assert error["code"] == "engine_error"
    assert all(b'"error"' not in event for event in events[:-2])
    eventually(lambda: len(server.frontend.dispatcher) == 0)


def test_the_death_of_the_engine_ends_every_stream_with_an_error(server):
    data = stream_until(
        server,
        lambda: server.frontend.dispatcher.num_generated > 5,
        lambda: server.call(server.engine.channel.close),
    )
    assert data.endswith(b"data: [DONE]\n\n")
    assert b'"engine_error"' in data
    assert server.frontend.state == "failed"
    assert request(server, "GET", "/health")[0] == 503
    assert request(server, "POST", CHAT, {"messages": USER})[0] == 500
