"""The table of raw requests, whole and cut at every byte: the answer never depends on the cut."""

import random

import orjson
import pytest
from http_cases import CASES, Case
from http_driver import (
    SMALL_LIMITS,
    FakeTransport,
    connect,
    feed,
    fix_request_ids,
    make_server,
    read_answers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def test_the_table_is_large_and_its_names_are_unique():
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whole(case: Case):
    server = make_server()
    transport = feed([case.raw], server)
    methods = list(case.methods) or ["GET"] * (len(case.statuses) + 1)
    answers = read_answers(bytes(transport.written), methods)
    assert tuple(answer.status for answer in answers) == case.statuses
    assert all(answer.complete for answer in answers)
    assert (transport.closed or transport.ended) == case.closes
    assert server.num_exchanges == 0
    assert server.num_buffered_body_bytes == 0 or case.name in (
        "half a body",
        "half a chunk",
        "chunks without an end",
    )
    for answer, method in zip(answers, methods, strict=False):
        assert b"x-request-id" in answer.headers
        if answer.status >= 400:
            error = orjson.loads(answer.body)
            assert int(answer.headers[b"content-length"]) == len(answer.body)
            assert error["error"]["message"] == error["message"]
            assert error["object"] == "error"
            assert isinstance(error["error"]["code"], str)
            assert error["code"] == answer.status
            assert error["error"]["type"] == error["type"] == "invalid_request_error"
        if method == "HEAD":
            assert answer.body == b""
        if answer.status == 405:
            assert answer.headers[b"allow"]
    if answers and case.closes:
        assert answers[-1].headers[b"connection"] == b"close"
    elif answers:
        assert answers[-1].headers.get(b"connection", b"keep-alive") == b"keep-alive"
    if case.seen is not None:
        seen = orjson.loads(answers[-1].body)
        assert {name: seen[name] for name in case.seen} == case.seen


def _outcome(transport: FakeTransport) -> tuple[bytes, bool, bool, bool]:
    raw = bytes(transport.written).replace(CONTINUE, b"")
    return raw, transport.closed, transport.ended, transport.aborted


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cut_at_every_byte(case: Case, monkeypatch: pytest.MonkeyPatch):
    fix_request_ids(monkeypatch)
    raw = case.raw
    whole = _outcome(feed([raw]))
    for cut in range(1, len(raw)):
        assert _outcome(feed([raw[:cut], raw[cut:]])) == whole, cut
    assert _outcome(feed([raw[i : i + 1] for i in range(len(raw))])) == whole


_GOOD = [case for case in CASES if case.statuses and not case.closes]
_ENDS = [case for case in CASES if case.closes]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    requests=st.lists(st.sampled_from(_GOOD), min_size=1, max_size=6),
    end=st.none() | st.sampled_from(_ENDS),
    seed=st.integers(0, 2**32),
)
def test_random_cuts_of_a_pipelined_stream(requests: list[Case], end: Case | None, seed: int):
    """Any sequence of cases on one connection gives the answers of each, in order, for any cuts."""
    cases = requests if end is None else [*requests, end]
    raw = b"".join(case.raw for case in cases)
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.choice((0, 1, 3, 10, 40))))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        fix_request_ids(monkeypatch)
        expected = b"".join(_outcome(feed([case.raw]))[0] for case in cases)
        transport = feed(pieces)
    assert _outcome(transport)[0] == expected
    assert (transport.closed or transport.ended) == (end is not None)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=4),
)
def test_damaged_requests_never_raise_and_never_depend_on_cuts(case: Case, edits):
    raw = bytearray(case.raw)
    for where, patch in edits:
        at = int(where * len(raw))
        raw[at : at + max(1, len(patch))] = patch
    damaged = bytes(raw)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fix_request_ids(monkeypatch)
        whole = feed([damaged])
        single = feed([damaged[i : i + 1] for i in range(len(damaged))])
    assert _outcome(single) == _outcome(whole)


def test_every_case_leaves_nothing_behind():
    server = make_server()
    for case in CASES:
        connection, _ = connect(server)
        connection.data_received(case.raw)
        connection.connection_lost(None)
        assert server.num_connections == 0, case.name
        assert server.num_exchanges == 0, case.name
        assert server.num_buffered_body_bytes == 0, case.name


def test_small_limits_are_the_ones_of_the_table():
    assert SMALL_LIMITS.max_body == 32
