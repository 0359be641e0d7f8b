"""Keys: who is let in, by the head of a request alone."""

from __future__ import annotations

import hmac
import itertools
import json

import pytest
from access_driver import head, status
from http_driver import connect, make_server, read_answers

from minisgl_fast.config import Config
from minisgl_fast.errors import ConfigError, ForbiddenError
from minisgl_fast.server import access as access_module
from minisgl_fast.server.access import Access, check_admin
from minisgl_fast.server.http import Exchange, HttpRequest

# Keys

KEYS = [
    ({}, 401),
    ({"authorization": b"Bearer first"}, 200),
    ({"authorization": b"Bearer second"}, 200),
    ({"authorization": b"bearer   first "}, 200),
    ({"authorization": b"BEARER\tfirst"}, 401),
    ({"x_api_key": b"first"}, 200),
    ({"x_api_key": b" second "}, 200),
    ({"x_api_key": b"wrong", "authorization": b"Bearer first"}, 200),
    ({"x_api_key": b"first", "authorization": b"Bearer wrong"}, 200),
    ({"authorization": b"Bearer"}, 401),
    ({"authorization": b"Bearer "}, 401),
    ({"authorization": b"first"}, 401),
    ({"authorization": b"Basic first"}, 401),
    ({"authorization": b"Basic Bearer first"}, 401),
    ({"authorization": b"Bearer firs"}, 401),
    ({"authorization": b"Bearer firstx"}, 401),
    ({"authorization": b"Bearer First"}, 401),
    ({"authorization": b"Bearer first, Bearer first"}, 401),  # as a repeated field arrives
    ({"authorization": b"Bearer first\xff"}, 401),
    ({"x_api_key": b""}, 401),
    ({"x_api_key": b"Bearer first"}, 401),
    ({"api_key": b"first"}, 401),
    ({"cookie": b"x-api-key=first"}, 401),
]


@pytest.mark.parametrize(("headers", "expected"), KEYS)
def test_a_key_is_known_or_the_answer_is_401(headers, expected):
    assert status(Access(["first", "second"]), head(**headers)) == expected


@pytest.mark.parametrize("headers", [headers for headers, _ in KEYS])
def test_without_keys_everybody_is_an_admin(headers):
    request = head("/flush_cache", **headers)
    assert Access().admit(request) is None
    check_admin(request)


PATHS = [
    ("/health", 200),
    ("/ready", 200),
    ("/metrics", 401),
    ("/", 401),
    ("/v1", 401),
    ("/v1/models", 401),
    ("/nowhere", 401),
    ("/health/", 401),
    ("/health/../v1/models", 401),
    ("/health%2f..%2fv1/models", 401),
    ("/Health", 401),
    ("/health_generate", 401),
    ("//health", 401),
    ("*", 401),
]


@pytest.mark.parametrize(("path", "expected"), PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "TRACE"])
def test_all_but_the_public_paths_need_a_key(path, expected, method):
    assert status(Access(["k"]), head(path, method)) == expected
    assert status(Access(["k"]), head(path, method, authorization=b"Bearer k")) == 200


def test_metrics_are_public_on_request():
    access = Access(["k"], public_metrics=True)
    assert status(access, head("/metrics")) == 200
    assert status(access, head("/metrics/")) == 401


def test_the_path_of_an_absolute_target_is_what_is_judged():
    seen = []

    def handler(request: HttpRequest, exchange: Exchange) -> None:
        seen.append(request.path)
        exchange.respond(200, b"")

    access = Access(["k"])
    connection, transport = connect(make_server(handler, admit=access.admit))
    for target, host in (
        (b"http://x/health", b"x"),
        (b"http://x/v1/models?/health", b"x"),
        (b"http://x/v1/models", b"/health"),
        (b"/v1/models", b"x/health"),
    ):
        connection.data_received(b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, host))
        if b"/" in host:
            connection, transport = connect(make_server(handler, admit=access.admit))
    assert seen == ["/health"]


def test_a_refused_request_is_not_read_and_the_connection_stays_usable():
    access = Access(["k"])
    seen = []

    def handler(request: HttpRequest, exchange: Exchange) -> None:
        seen.append(request.body)
        exchange.respond(200, b"")

    connection, transport = connect(make_server(handler, admit=access.admit))
    connection.data_received(
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
        b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Api-Key: k\r\nContent-Length: 5\r\n\r\nworld"
    )
    refused, answered = read_answers(bytes(transport.written), ["POST"] * 2)
    assert (refused.status, answered.status) == (401, 200)
    assert refused.headers[b"www-authenticate"] == b"Bearer"
    error = json.loads(refused.body)
    assert error["error"]["code"] == "invalid_api_key"
    assert (error["code"], error["object"]) == (401, "error")
    assert seen == [b"world"]


def test_a_large_body_without_a_key_is_refused_before_it_comes():
    connection, transport = connect(make_server(admit=Access(["k"]).admit))
    connection.data_received(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    (answer,) = read_answers(bytes(transport.written), ["POST"])
    assert answer.status == 401
    assert transport.ended or transport.closed


def test_every_known_key_is_compared_and_in_full(monkeypatch):
    compared = []
    real = hmac.compare_digest

    def compare(a, b):
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(access_module.hmac, "compare_digest", compare)
    access = Access(["first", "second", "third"])
    for key in (b"first", b"third", b"none", b"f", b"f" * 10_000):
        compared.clear()
        access.admit(head(authorization=b"Bearer " + key))
        assert len(compared) == 3
        assert {len(digest) for digest in itertools.chain(*compared)} == {32}


def test_keys_stand_nowhere_in_the_object():
    access = Access(["first-key"], ["admin-key"])
    assert "-key" not in repr(vars(access))


# The admin key


@pytest.mark.parametrize(
    ("keys", "key", "expected", "is_admin"),
    [
        (["k"], b"k", 200, False),
        (["k"], b"a", 200, True),
        (["k"], b"x", 401, False),
        ([], b"a", 200, True),
        ([], b"x", 200, False),
        ([], b"", 200, False),
    ],
)
def test_with_an_admin_key_only_that_one_is_an_admins(keys, key, expected, is_admin):
    access = Access(keys, ["a"])
    request = head("/flush_cache", "POST", authorization=b"Bearer " + key)
    assert status(access, request) == expected
    assert request.is_admin is is_admin
    if not is_admin:
        with pytest.raises(ForbiddenError):
            check_admin(request)


def test_without_an_admin_key_every_key_is_an_admins():
    request = head("/flush_cache", "POST", authorization=b"Bearer k")
    assert Access(["k"]).admit(request) is None
    check_admin(request)


# Settings


def test_keys_come_from_flags_and_files(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"one\r\n\n  two  \nthree")
    admin = tmp_path / "admin"
    admin.write_text("chief\n")
    config = Config(
        "x",
        api_keys=("zero",),
        api_key_file=str(file),
        admin_api_key="boss",
        admin_api_key_file=str(admin),
    )
    access = Access.load(config)
    for key in ("zero", "one", "two", "three", "boss", "chief"):
        request = head(authorization=f"Bearer {key}".encode())
        assert status(access, request) == 200
        assert request.is_admin is (key in ("boss", "chief"))
    assert status(access, head(authorization=b"Bearer four")) == 401


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has no key"),
        (b"\n \n", "has no key"),
        (b"good\nsecret key\n", "line 2: a key must be"),
        (b"k\xc3\xb6y\n", "line 1: a key must be"),
        (b"x" * 513, "line 1: a key must be"),
        (b"k\n" * (1 << 20), "is over"),
    ],
)
def test_a_file_of_keys_that_cannot_work_ends_the_start_and_shows_no_key(tmp_path, data, words):
    file = tmp_path / "keys"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        Access.load(Config("x", api_key_file=str(file)))
    assert words in caught.value.message
    assert "secret" not in caught.value.message


def test_a_file_of_keys_that_is_not_there_ends_the_start(tmp_path):
    for field, flag in (("api_key_file", "--api-key-file"), ("admin_api_key_file", "--admin-api")):
        with pytest.raises(ConfigError, match="No such file") as caught:
            Access.load(Config("x", **{field: str(tmp_path / "none")}))
        assert flag in caught.value.message


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "ä", "x" * 513])
@pytest.mark.parametrize(("field", "wrap"), [("api_keys", True), ("admin_api_key", False)])
def test_a_key_that_fits_no_header_is_refused_and_not_shown(field, wrap, key):
    with pytest.raises(ConfigError) as caught:
        Config("x", **{field: (key,) if wrap else key})
    assert not key.strip() or key not in caught.value.message


def test_keys_are_in_no_text_and_no_frame():
    config = Config("x", api_keys=("secret1",), admin_api_key="secret2")
    assert "secret" not in repr(config)
    assert "secret" not in json.dumps(config.to_dict())
