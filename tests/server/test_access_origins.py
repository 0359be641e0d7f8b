"""Which pages and which names of this server are let in, by the head of a request alone."""

from __future__ import annotations

import pytest
from access_driver import PAGE, head, status
from http_driver import connect, make_server, read_answers

from minisgl_fast.config import Config
from minisgl_fast.errors import ConfigError
from minisgl_fast.server import access as access_module
from minisgl_fast.server.access import Access
from minisgl_fast.server.http import Exchange, HttpRequest

# Origins


@pytest.mark.parametrize(
    ("origin", "good"),
    [
        ("*", True),
        ("https://app.example.com", True),
        ("http://localhost:3000", True),
        ("http://[::1]:3000", True),
        ("chrome-extension://abcdef", True),
        ("", False),
        ("null", False),
        ("app.example.com", False),
        ("https://app.example.com/", False),
        ("https://App.example.com", False),
        ("https://*.example.com/x", False),
        ("https://a b", False),
        ("https://a\r\nx: y", False),
    ],
)
def test_an_origin_is_written_as_browsers_send_it(origin, good):
    if good:
        assert Config("x", cors_origins=(origin,)).cors_origins == (origin,)
    else:
        with pytest.raises(ConfigError, match="--cors-origin"):
            Config("x", cors_origins=(origin,))


def ask(access, request):
    """The answer of a server with these rules, as (status, headers)."""

    def handler(request: HttpRequest, exchange: Exchange) -> None:
        exchange.respond(200, b"hello")

    connection, transport = connect(make_server(access.guard(handler), admit=access.admit))
    lines = b"".join(b"%b: %b\r\n" % field for field in request.headers.items())
    connection.data_received(
        b"%b %b HTTP/1.1\r\nHost: x\r\n%b\r\n"
        % (request.method.encode(), request.path.encode(), lines)
    )
    (answer,) = read_answers(bytes(transport.written), [request.method])
    return answer.status, {
        name: value
        for name, value in answer.headers.items()
        if name.startswith(b"access-control") or name == b"vary"
    }


EXPOSED = b"x-request-id, request-id, retry-after"


def test_without_a_list_no_answer_speaks_of_origins():
    assert ask(Access(), head(origin=PAGE)) == (200, {})
    preflight = head(method="OPTIONS", origin=PAGE, access_control_request_method=b"POST")
    assert ask(Access(["k"]), preflight) == (401, {})


def test_a_page_on_the_list_may_read_answers_and_errors():
    access = Access(["k"], cors_origins=["http://other", PAGE.decode()])
    allowed = {
        b"access-control-allow-origin": PAGE,
        b"access-control-expose-headers": EXPOSED,
        b"vary": b"origin",
    }
    assert ask(access, head(origin=PAGE, x_api_key=b"k")) == (200, allowed)
    assert ask(access, head(origin=PAGE)) == (401, allowed)


@pytest.mark.parametrize(
    "origin",
    [b"https://evil.example.com", PAGE + b".evil.com", PAGE + b"/", b"null", b"*", PAGE.upper()],
)
def test_another_page_may_not(origin):
    access = Access(cors_origins=[PAGE.decode()])
    assert ask(access, head(origin=origin)) == (200, {b"vary": b"origin"})
    assert ask(access, head()) == (200, {b"vary": b"origin"})


def test_with_a_star_every_page_may_and_no_cache_needs_to_care():
    access = Access(cors_origins=["*"])
    allowed = {b"access-control-allow-origin": b"*", b"access-control-expose-headers": EXPOSED}
    assert ask(access, head(origin=b"https://anything")) == (200, allowed)
    assert ask(access, head()) == (200, allowed)


def test_a_preflight_needs_no_key_and_names_what_may_be_sent():
    access = Access(["k"], cors_origins=[PAGE.decode()])
    preflight = head(
        "/v1/chat/completions",
        "OPTIONS",
        origin=PAGE,
        access_control_request_method=b"POST",
        access_control_request_headers=b"authorization,content-type,x-stainless-os",
    )
    answer_status, headers = ask(access, preflight)
    assert answer_status == 204
    assert headers[b"access-control-allow-origin"] == PAGE
    assert b"POST" in headers[b"access-control-allow-methods"]
    assert {b"authorization", b"content-type", b"x-api-key", b"*"} == set(
        headers[b"access-control-allow-headers"].split(b", ")
    )
    assert b"access-control-allow-credentials" not in headers


@pytest.mark.parametrize(
    "fields",
    [
        {"origin": b"https://evil", "access_control_request_method": b"POST"},
        {"origin": PAGE},
        {"access_control_request_method": b"POST"},
    ],
)
def test_what_only_looks_like_a_preflight_needs_a_key(fields):
    access = Access(["k"], cors_origins=[PAGE.decode()])
    assert ask(access, head(method="OPTIONS", **fields))[0] == 401


# Hosts

HOSTS = [
    (b"127.0.0.1:1919", True),
    (b"localhost", True),
    (b"LOCALHOST:80", True),
    (b"[::1]:1919", True),
    (b"0.0.0.0", True),
    (b"x", True),
    (b"my-machine:1919", True),
    (b"host.docker.internal:1919", True),
    (b"printer.local", True),
    (b"app.localhost.", True),
    (b"api.example.com", True),  # the operator's
    (b"API.example.com:443", True),
    (b"evil.example.com", False),
    (b"example.com", False),
    (b"127.0.0.1.evil.com", False),
    (b"localhost.evil.com:1919", False),
    (b"evil.com.", False),
    (b"not.notlocal", False),
    (b"api.example.com.evil.com", False),
]


@pytest.mark.parametrize(("host", "good"), HOSTS)
def test_a_server_of_this_machine_without_a_key_answers_to_no_foreign_name(host, good):
    access = Access.load(Config("x", allowed_hosts=("Api.Example.com",)))
    for _ in range(2):
        assert status(access, head(host=host)) == (200 if good else 403)
    assert status(access, head("/health", host=host)) == 200
    assert status(access, head()) == 200


@pytest.mark.parametrize("settings", [{"api_keys": ("k",)}, {"host": "0.0.0.0"}])
def test_with_a_key_or_on_a_network_any_name_will_do(settings):
    access = Access.load(Config("x", **settings))
    assert status(access, head(host=b"evil.com", x_api_key=b"k")) == 200


def test_hosts_that_clients_think_up_take_no_memory():
    access = Access.load(Config("x"))
    for i in range(1000):
        assert status(access, head(host=b"h%d" % i)) == 200
    assert len(access._known_hosts) <= access_module.MAX_KNOWN_HOSTS


@pytest.mark.parametrize("host", ["", "a.com:80", "http://a.com", "a com", "*"])
def test_an_allowed_host_is_a_name(host):
    with pytest.raises(ConfigError, match="--allowed-host"):
        Config("x", allowed_hosts=(host,))
