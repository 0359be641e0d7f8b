"""Abort, flush and probe: what operators and routers do to a running server."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_client import CHAT, COMPLETIONS, USER, request
from fake_engine import eventually

from minisgl_fast.api import control
from minisgl_fast.wire import FinishReason

ENDLESS = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture
def pool():
    with ThreadPoolExecutor(40) as pool:
        yield pool


def post(server, path, body, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, data = request(server, "POST", path, body, names)
    return status, json.loads(data) if data else None


def hold(server):
    """Let nothing end by itself: the engine makes no step."""
    server.engine.hold = True


def reason(answer):
    return answer["choices"][0]["finish_reason"]


# abort_request


@pytest.mark.parametrize("form", ["{}", "cmpl-{}"])
def test_a_request_is_aborted_by_its_id_and_answers_with_what_it_has(server, pool, form):
    running = pool.submit(post, server, COMPLETIONS, ENDLESS, x_request_id="abc-1")
    eventually(lambda: server.frontend.dispatcher.num_generated > 5)
    hold(server)
    assert post(server, "/abort_request", {"rid": form.format("abc-1")}) == (
        200,
        {"num_aborted": 1},
    )
    status, answer = running.result(10)
    assert status == 200
    assert reason(answer) == "abort"
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] > 5
    eventually(lambda: len(server.engine.aborted) == 1)
    assert len(server.frontend.dispatcher) == 0


@pytest.mark.parametrize("rid", ["abc", "abc-", "abc-10", "ABC-1", "bc-1", "chatcmpl-", "*", " "])
def test_no_other_name_aborts_it(server, pool, rid):
    hold(server)
    running = pool.submit(post, server, COMPLETIONS, {"prompt": "Hi"}, x_request_id="abc-1")
    eventually(lambda: server.engine.added)
    assert post(server, "/abort_request", {"rid": rid}) == (200, {"num_aborted": 0})
    server.engine.hold = False
    assert reason(running.result(10)[1]) == "length"


def test_all_choices_of_an_aborted_request_end(server, pool):
    hold(server)
    running = pool.submit(post, server, CHAT, {"messages": USER, "n": 3}, x_request_id="three")
    eventually(lambda: len(server.engine.added) == 3)
    assert post(server, "/abort_request", {"rid": "chatcmpl-three"})[1] == {"num_aborted": 3}
    choices = running.result(10)[1]["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["abort"] * 3


def test_an_aborted_stream_ends_in_order(server, pool):
    body = {**ENDLESS, "stream": True}
    headers = {"X-Request-Id": "flow"}
    running = pool.submit(request, server, "POST", COMPLETIONS, body, headers)
    eventually(lambda: server.frontend.dispatcher.num_generated > 5)
    post(server, "/abort_request", {"rid": "flow"})
    status, _, data = running.result(10)
    events = data.decode().removesuffix("\n\n").split("\n\n")
    assert (status, events[-1]) == (200, "data: [DONE]")
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "abort"


def test_abort_all_ends_everything_and_the_server_lives(server, pool):
    hold(server)
    running = [pool.submit(post, server, COMPLETIONS, ENDLESS) for _ in range(32)]
    eventually(lambda: len(server.engine.added) == 32)
    assert post(server, "/abort_request", {"abort_all": True})[1] == {"num_aborted": 32}
    assert {reason(future.result(10)[1]) for future in running} == {"abort"}
    eventually(lambda: not server.engine.running)
    server.engine.hold = False
    assert reason(post(server, COMPLETIONS, {"prompt": "Hi", "max_tokens": 2})[1]) == "length"
    text = request(server, "GET", "/metrics")[2].decode()
    assert 'minisgl_aborts_total{reason="request"} 32.0' in text


def test_a_request_whose_prompt_is_being_encoded_can_be_aborted(server, pool, monkeypatch):
    is_encoding, go_on = threading.Event(), threading.Event()
    encode = server.frontend.tokenizer.encode_array

    def slow_encode(text, *, add_special_tokens):
        if len(text) > 1000:
            is_encoding.set()
            assert go_on.wait(10)
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(server.frontend.tokenizer, "encode_array", slow_encode)
    body = {"prompt": "word " * 1000}
    running = pool.submit(post, server, COMPLETIONS, body, x_request_id="long")
    assert is_encoding.wait(10)
    assert post(server, "/abort_request", {"rid": "long"})[1] == {"num_aborted": 1}
    go_on.set()
    status, answer = running.result(10)
    assert (status, answer["message"]) == (400, "The request was aborted.")
    assert not server.engine.added


@pytest.mark.parametrize("body", [{}, {"rid": ""}, {"rid": None}, {"abort_all": False}])
def test_an_abort_of_nothing_named_is_refused(server, pool, body):
    hold(server)
    running = pool.submit(post, server, COMPLETIONS, {"prompt": "Hi"})
    eventually(lambda: server.engine.added)
    status, answer = post(server, "/abort_request", body)
    assert (status, answer["error"]["param"]) == (400, "rid")
    server.engine.hold = False
    assert running.result(10)[0] == 200


# flush_cache


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_cache_is_flushed_when_idle(server, method):
    status, headers, data = request(server, method, "/flush_cache")
    assert (status, data) == (200, b"Cache flushed.\n")
    assert headers["content-type"].startswith("text/plain")
    assert server.engine.num_flushes == 1


def test_the_cache_is_not_flushed_under_a_request_but_may_wait_for_it(server, pool):
    hold(server)
    running = pool.submit(post, server, COMPLETIONS, {"prompt": "Hi"})
    eventually(lambda: server.engine.added)
    status, _, data = request(server, "POST", "/flush_cache")
    assert (status, json.loads(data)["code"]) == (400, 400)
    assert server.engine.num_flushes == 0
    waiting = pool.submit(request, server, "POST", "/flush_cache?timeout=10")
    server.engine.hold = False
    assert waiting.result(20)[0] == 200
    assert running.result(10)[0] == 200
    assert server.engine.num_flushes == 1


@pytest.mark.parametrize("timeout", ["-1", "x", "nan", "1e9", "inf"])
def test_a_timeout_that_is_none_is_refused(server, timeout):
    status, _, data = request(server, "POST", f"/flush_cache?timeout={timeout}")
    assert (status, json.loads(data)["param"]) == (400, "timeout")


def test_a_flush_that_waits_for_an_engine_that_dies_is_answered(server, pool):
    hold(server)
    pool.submit(post, server, COMPLETIONS, {"prompt": "Hi"})
    eventually(lambda: server.engine.added)
    waiting = pool.submit(request, server, "POST", "/flush_cache?timeout=100")
    server.call(server.engine.channel.close)
    assert waiting.result(10)[0] == 500


# The admin key


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/abort_request", {"abort_all": True}),
        ("POST", "/flush_cache", None),
        ("GET", "/flush_cache", None),
    ],
)
def test_what_concerns_all_clients_needs_the_admin_key(serve, method, path, body):
    server = serve(api_keys=("user",), admin_api_key="chief")
    for key, expected in (("wrong", 401), ("user", 403), ("chief", 200)):
        headers = {"Authorization": f"Bearer {key}"}
        status, _, data = request(server, method, path, body, headers)
        assert status == expected
        if status == 403:
            assert json.loads(data)["error"]["code"] == "forbidden"


def test_a_single_abort_does_not(serve):
    server = serve(api_keys=("user",), admin_api_key="chief")
    assert post(server, "/abort_request", {"rid": "x"}, authorization="Bearer user")[0] == 200


# health_generate


def test_health_generate_generates_one_token(server):
    status, _, data = request(server, "GET", "/health_generate")
    assert (status, data) == (200, b"")
    (sent,) = server.engine.added
    assert (sent.max_tokens, sent.temperature) == (1, 0.0)
    assert len(server.frontend.dispatcher) == 0


def test_those_who_ask_together_wait_for_one_token(server, pool):
    hold(server)
    asked = [pool.submit(request, server, "GET", "/health_generate") for _ in range(10)]
    eventually(lambda: server.http.num_exchanges == 10)
    server.engine.hold = False
    assert {future.result(10)[0] for future in asked} == {200}
    assert len(server.engine.added) == 1
    assert request(server, "GET", "/health_generate")[0] == 200
    assert len(server.engine.added) == 2


def test_an_engine_that_stands_still_fails_it(server, monkeypatch):
    monkeypatch.setattr(control, "PROBE_TIMEOUT_S", 0.1)
    hold(server)
    status, headers, data = request(server, "GET", "/health_generate")
    assert (status, headers["retry-after"]) == (503, "1")
    assert len(server.frontend.dispatcher) == 0
    eventually(lambda: server.engine.aborted)
    server.engine.hold = False
    assert request(server, "GET", "/health_generate")[0] == 200


def test_abort_all_leaves_the_probe_alone(server, pool):
    hold(server)
    asked = pool.submit(request, server, "GET", "/health_generate")
    eventually(lambda: server.engine.added)
    assert post(server, "/abort_request", {"abort_all": True})[1] == {"num_aborted": 0}
    server.engine.hold = False
    assert asked.result(10)[0] == 200


@pytest.mark.parametrize("end", [FinishReason.ERROR, FinishReason.ABORTED])
def test_an_engine_that_generates_nothing_fails_it(server, end):
    server.engine.end_of_all = end
    assert request(server, "GET", "/health_generate")[0] in (500, 503)


def test_an_engine_that_dies_fails_it(server, pool):
    hold(server)
    asked = pool.submit(request, server, "GET", "/health_generate")
    eventually(lambda: server.engine.added)
    server.call(server.engine.channel.close)
    assert asked.result(10)[0] == 500
