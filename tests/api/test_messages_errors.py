"""Errors of Anthropic's routes have Anthropic's shape and header, whoever refuses the request."""

from __future__ import annotations

import json
import socket

import anthropic
import pytest
from fake_engine import MODEL

PATH = b"/v1/messages"
KEY = b"x-api-key: sesame\r\n"
TYPE = b"content-type: application/json\r\n"


def raw(server, data):
    """(status, headers, body) of what comes back for these bytes on a connection of its own."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    line, *lines = head.decode("ascii").split("\r\n")
    headers = dict(one.lower().split(": ", 1) for one in lines)
    return int(line.split()[1]), headers, json.loads(body)


def ask(method=b"POST", path=PATH, head=KEY + TYPE, body=b"{}", length=None):
    length = len(body) if length is None else length
    return b"%b %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%bcontent-length: %d\r\n\r\n%b" % (
        method, path, head, length, body,
    )  # fmt: skip


CASES = {
    "no key": (ask(head=TYPE), 401, "authentication_error"),
    "a wrong key": (ask(head=TYPE + b"x-api-key: x\r\n"), 401, "authentication_error"),
    "no such route": (ask(path=PATH + b"/batches"), 404, "not_found_error"),
    "no such method": (ask(method=b"GET", body=b""), 405, "invalid_request_error"),
    "no JSON type": (ask(head=KEY), 400, "invalid_request_error"),
    "no JSON": (ask(body=b"{"), 400, "invalid_request_error"),
    "a body too large": (ask(length=10**9, body=b""), 413, "request_too_large"),
    "two hosts": (ask(head=KEY + b"host: y\r\n"), 400, "invalid_request_error"),
    "a bad field": (ask(head=KEY + b"a b: c\r\n"), 400, "invalid_request_error"),
    "two framings": (
        ask(head=KEY + b"transfer-encoding: chunked\r\n"), 400, "invalid_request_error",
    ),
    "too many fields": (ask(head=KEY + b"a: b\r\n" * 101), 431, "invalid_request_error"),
    "another HTTP": (
        ask().replace(b"HTTP/1.1", b"HTTP/2.0"), 505, "api_error",
    ),
    "a part of a bad head": (b"POST %b HTTP/1.1\r\nhost: x\n" % PATH, 400, "invalid_request_error"),
}  # fmt: skip


@pytest.fixture(scope="module")
def guarded(module_serve):
    return module_serve(api_keys=("sesame",))


@pytest.mark.parametrize("name", CASES)
def test_every_refusal_has_the_shape_and_the_header(guarded, name):
    data, expected, kind = CASES[name]
    status, headers, body = raw(guarded, data)
    assert status == expected
    assert body["type"] == "error" and body["error"]["type"] == kind and body["error"]["message"]
    assert headers["request-id"] == headers["x-request-id"] == body["request_id"]
    assert set(body) == {"type", "error", "request_id"}


def test_other_paths_keep_their_own_shape(guarded):
    path = b"/v1/chat/completions"
    for data in (ask(path=path, head=TYPE), ask(path=path, head=KEY + b"host: y\r\n"), b"x\r\n"):
        _, headers, body = raw(guarded, data)
        assert body["object"] == "error" and "request-id" not in headers


def test_the_sdk_knows_the_id_of_a_request_without_a_key(guarded):
    client = anthropic.Anthropic(base_url=guarded.url, api_key="none", max_retries=0)
    with client, pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(model=MODEL, max_tokens=9, messages=[])
    assert caught.value.request_id == caught.value.body["request_id"]


def test_a_server_that_loads_says_so_in_the_same_shape(serve):
    status, headers, body = raw(serve(ready=False), ask())
    assert (status, body["error"]["type"]) == (503, "overloaded_error")
    assert headers["request-id"] == body["request_id"] and headers["retry-after"]
