"""The client against scripted servers: what is sent and when, and how every failure is counted."""

import asyncio
import resource
import socket
import time

import pytest
import uvloop
from sse_server import (
    CUT,
    END,
    KEEP,
    STREAM_HEAD,
    SseServer,
    chat_event,
    event,
    plain,
    talk,
    usage_event,
)

from minisgl_fast.bench.client import Client, Load
from minisgl_fast.bench.datasets import Lengths, Sample, multi_turn
from minisgl_fast.bench.endpoint import Endpoint
from minisgl_fast.bench.results import Results
from minisgl_fast.bench.vocabulary import common_words
from minisgl_fast.errors import ConfigError


def samples(num, arrivals=None, num_output=3, prompt="hi"):
    return [(Sample(prompt, 1, num_output), at) for at in (arrivals or [0.0] * num)]


def run(script, timed, *, api="chat", during=None, endpoint=None, **load):
    """Run a client against a scripted server; (server, client, results, duration)."""
    server = SseServer(script)
    results = Results(detailed=True)

    async def measure():
        async with server.running():
            target = Endpoint(server.url, api, "m", **(endpoint or {}))
            client = Client(target, Load(timed, len(timed), **load), results)
            watcher = asyncio.create_task(during(client)) if during else None
            duration_s = await asyncio.wait_for(client.run(), 20)
            if watcher:
                await watcher
            return client, duration_s

    client, duration_s = uvloop.run(measure())
    assert client.num_running == 0
    assert results.completed + results.failed == len(results.is_done) == client.num_ended
    return server, client, results, duration_s


@pytest.mark.parametrize("api", ["chat", "completions", "generate"])
def test_all_requests_of_an_api_are_answered_and_counted(api):
    server, _, results, _ = run(talk, samples(20), api=api)
    assert results.completed == 20
    assert results.total_output == 60
    assert results.num_events == 60
    from_usage = 0 if api == "generate" else 20
    assert results.num_from_usage == results.num_prompts_from_usage == from_usage
    assert results.total_input == (20 * 7 if from_usage else 20)
    assert results.itl.count == 40
    assert results.errors == {}
    path = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
    assert {request.path for request in server.requests} == {path.get(api, "/generate")}


def test_bodies_say_what_was_asked():
    options = {"headers": {"X-Test": "yes", "Authorization": "Bearer k"}}
    options["extra_body"] = {"temperature": 0, "model": "other"}
    server, *_ = run(talk, samples(1, num_output=5), endpoint=options)
    (request,) = server.requests
    assert request.body == {
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "model": "other",
    }
    assert request.headers["x-test"] == "yes"
    assert request.headers["authorization"] == "Bearer k"
    server, *_ = run(
        talk, samples(1, prompt=[1, 2, 3]), api="completions", endpoint={"ignore_eos": False}
    )
    assert server.requests[0].body["prompt"] == [1, 2, 3]
    assert "ignore_eos" not in server.requests[0].body


def cut_in_the_middle(request):
    yield STREAM_HEAD
    yield chat_event("a")
    yield CUT


def say(*parts):
    return lambda request: parts


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (cut_in_the_middle, "cut", "closed by the server after 1 events"),
        (say(CUT), "cut", "closed by the server after 0 events"),
        (say(STREAM_HEAD + chat_event("a")[:-9], CUT), "cut", "after 0 events"),
        (say(STREAM_HEAD, chat_event("a"), b"0\r\n\r\n"), "cut", "without [DONE]"),
        (
            say(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", CUT),
            "cut",
            "without [DONE], after 0 events",
        ),
        (say(plain(b"503 Busy", b'{"error":{"message":"full"}}')), "HTTP 503", "full"),
        (say(plain(b"400 Bad", b"{}", b"Connection: close\r\n"), CUT), "HTTP 400", "{}"),
        (say(plain(b"429 Slow", b"")), "HTTP 429", ""),
        (say(plain(b"200 OK", b"<html>", b"")), "no stream", "<html>"),
        (
            say(STREAM_HEAD, chat_event("a"), event({"error": {"message": "died"}}), END),
            "stream error",
            "died",
        ),
        (say(STREAM_HEAD, chat_event(""), END), "empty", "no event with text"),
        (say(STREAM_HEAD, b"zz\r\n"), "protocol", "bad chunk size"),
        (say(b"hello\r\n\r\n"), "protocol", "not an HTTP response"),
    ],
)
def test_every_failure_is_counted_by_its_kind(script, kind, message):
    _, _, results, _ = run(script, samples(4), max_concurrency=2)
    assert dict(results.errors) == {kind: 4}
    assert message in results.messages[kind]
    assert len(results.error_of) == 4
    assert results.completed == 0
    assert (results.itl.count, results.total_output, results.num_events) == (0, 0, 0)


def test_a_failure_does_not_harm_other_requests():
    def every_third(request):
        return cut_in_the_middle(request) if request.body["max_tokens"] % 3 == 0 else talk(request)

    timed = [(Sample("hi", 1, 1 + i), 0.0) for i in range(12)]
    _, _, results, _ = run(every_third, timed)
    assert results.completed == 8
    assert results.errors == {"cut": 4}
    assert results.output_lens.tolist() == [1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0]


def test_requests_that_take_too_long_are_given_up():
    _, _, results, duration_s = run(say(STREAM_HEAD, KEEP), samples(3), timeout_s=0.3)
    assert results.errors == {"timeout": 3}
    assert 0.3 <= duration_s < 5


def test_a_server_that_is_not_there_is_an_error_for_each_request():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    results = Results()
    client = Client(Endpoint(f"http://127.0.0.1:{port}"), Load(samples(3), 3), results)
    uvloop.run(client.run())
    assert results.errors == {"connect": 3}


def test_an_interrupt_ends_what_is_under_way_and_sends_nothing_more():
    async def interrupt(client):
        while client.num_running < 2:
            await asyncio.sleep(0.01)
        client.interrupt()

    script = say(STREAM_HEAD, KEEP)
    _, client, results, _ = run(script, samples(50), max_concurrency=2, during=interrupt)
    assert client.is_interrupted
    assert results.errors == {"cancelled": 2}


def test_an_interrupt_reaches_connections_that_are_being_opened():
    async def interrupt(client):
        while not client.num_running:
            await asyncio.sleep(0)
        client.interrupt()

    _, _, results, _ = run(talk, samples(5), during=interrupt)
    assert set(results.errors) <= {"cancelled"}


def test_max_concurrency_is_never_exceeded_and_connections_are_used_again():
    def slow(request):
        yield STREAM_HEAD
        yield 0.005
        yield from list(talk(request))[1:]

    server, client, results, _ = run(slow, samples(40), max_concurrency=4)
    assert server.peak == 4
    assert server.num_connections == 4
    assert results.peak_concurrency() <= 4
    assert client.cost.num_resent == 0
    assert min(results.queue_times_s) >= 0
    assert results.queue_times_s[39] >= 0.04  # nine turns of 5 ms came before


def test_requests_are_sent_at_their_times():
    arrivals = [0.0, 0.05, 0.06, 0.2, 0.21]
    server, _, results, duration_s = run(talk, samples(5, arrivals))
    sent = [start - results.starts_s[0] for start in results.starts_s]
    assert all(late - due >= -0.002 for late, due in zip(sent, arrivals, strict=True))
    assert sent == pytest.approx(arrivals, abs=0.15)
    assert duration_s >= 0.208  # timers may be early by a tick


def test_times_are_measured_from_send_to_events():
    times = []  # the server's

    def paced(request):
        times.append(time.perf_counter())
        yield STREAM_HEAD
        yield 0.1
        times.append(time.perf_counter())
        yield chat_event("a")
        yield 0.05
        times.append(time.perf_counter())
        yield chat_event("b")
        yield 0.3
        yield usage_event(request, 4) + END

    _, _, results, duration_s = run(paced, samples(1))
    begun, first, second = times
    (gap_s,) = results.gaps_s[0]
    # The client sends before the server sees it, and reads after the server has written.
    assert results.ttfts_s[0] >= first - begun
    assert results.latencies_s[0] >= second - begun
    assert results.latencies_s[0] < duration_s - 0.2  # not up to [DONE]
    assert gap_s == pytest.approx(second - first, abs=0.04)
    assert results.ttfts_s[0] + gap_s == pytest.approx(results.latencies_s[0], abs=1e-6)
    assert results.output_lens[0] == 4
    (tpot,) = results.tpot.percentiles([50])
    assert tpot == pytest.approx((results.latencies_s[0] - results.ttfts_s[0]) / 3)


def test_a_connection_that_had_timed_out_is_replaced():
    clients = []

    async def note(client):
        clients.append(client)

    def once(request):
        yield from talk(request)
        while len(clients[0].results.starts_s) < 2:
            yield 0.001
        yield 0.05  # the second request is on its way as the server closes the connection unread
        yield CUT

    server, client, results, _ = run(once, samples(2), during=note, max_concurrency=1)
    assert results.completed == 2
    assert client.cost.num_resent == 1
    assert results.latencies_s[1] >= 0.04  # its clock went on
    assert [request.connection for request in server.requests] == [0, 1]


def test_turns_follow_the_answers_one_by_one():
    conversations = multi_turn(common_words(), Lengths(3, 2), 0, num_turns=3)
    timed = [(next(conversations), 0.0) for _ in range(4)]
    server, client, results, _ = run(talk, timed, max_concurrency=2, think_time_s=0.01)
    assert results.completed == client.total == 12
    by_length = {}
    for request in server.requests:
        by_length.setdefault(len(request.body["messages"]), []).append(request.body["messages"])
    assert {length: len(found) for length, found in by_length.items()} == {1: 4, 3: 4, 5: 4}
    for messages in by_length[5]:
        assert [message["role"] for message in messages] == [*["user", "assistant"] * 2, "user"]
        assert messages[1]["content"] == messages[3]["content"] == "t0 t1 "
        assert messages[:3] in by_length[3]


def test_turns_of_a_completion_are_one_text():
    timed = [(next(iter(multi_turn(common_words(), Lengths(3, 2), 0, num_turns=2))), 0.0)]
    server, *_ = run(talk, timed, api="completions")
    first, second = (request.body["prompt"] for request in server.requests)
    assert second.startswith(f"{first}t0 t1  ")


def test_a_conversation_ends_with_a_failed_turn():
    def second_fails(request):
        return talk(request) if len(request.body["messages"]) == 1 else cut_in_the_middle(request)

    timed = [(next(iter(multi_turn(common_words(), Lengths(3, 2), 0, num_turns=4))), 0.0)]
    _, _, results, _ = run(second_fails, timed)
    assert (results.completed, results.failed) == (1, 1)


def test_a_data_set_that_goes_wrong_in_its_middle_ends_the_run(monkeypatch):
    monkeypatch.setattr("minisgl_fast.bench.client.PREPARED_BYTES", 100)

    def broken():
        yield from samples(3)
        raise ConfigError("line 4")

    server = SseServer()

    async def measure():
        async with server.running():
            load = Load(broken(), 10, max_concurrency=1)
            await asyncio.wait_for(Client(Endpoint(server.url), load, Results()).run(), 20)

    with pytest.raises(ConfigError, match="line 4"):
        uvloop.run(measure())
    assert len(server.requests) == 3


def test_an_empty_load_ends_at_once():
    _, client, results, _ = run(talk, [])
    assert results.completed == results.failed == 0
    assert client.total == 0


@pytest.mark.parametrize(
    ("base_url", "target"),
    [
        ("http://h:1", "/v1/chat/completions"),
        ("http://h:1/", "/v1/chat/completions"),
        ("http://h:1/v1", "/v1/chat/completions"),
        ("https://h/proxy/v1/", "/proxy/v1/chat/completions"),
    ],
)
def test_a_base_url_may_end_in_v1(base_url, target):
    assert Endpoint(base_url).target == target
    assert Endpoint(base_url, path="/other").target == "/other"


@pytest.mark.parametrize("url", ["h:1", "ftp://h", "http://", "http://h:99999", "http://u:p@h"])
def test_urls_that_cannot_be_used_are_refused(url):
    with pytest.raises(ConfigError, match="--base-url"):
        Endpoint(url)


def test_headers_cannot_smuggle_others():
    with pytest.raises(ConfigError):
        Endpoint("http://h", headers={"X": "a\r\nY: b"})


def test_more_connections_than_files_are_refused_before_anything_is_sent():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    timed = samples(hard)
    with pytest.raises(ConfigError, match=f"allows a process {hard}.*ulimit"):
        run(talk, timed, max_concurrency=hard)


def test_the_client_knows_what_it_cost():
    _, client, results, duration_s = run(talk, samples(200, num_output=20))
    assert results.completed == 200
    cpu_s = client.cost.cpu_share * duration_s
    assert 0 < client.cost.user_s <= cpu_s + 0.05  # the kernel counts user time in ticks
    assert client.cost.num_reads >= 200
