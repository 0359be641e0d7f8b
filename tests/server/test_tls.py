"""HTTPS: real clients over TLS, and files that cannot work."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import time

import httpx2
import openai
import pytest
from certificates import make_certificate
from fake_engine import MODEL, eventually

from minisgl_fast.config import Config
from minisgl_fast.errors import ConfigError
from minisgl_fast.server.tls import server_context

USER = [{"role": "user", "content": "Hi"}]
TEXT = "0. The capital of France is Paris"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(serve, certificate):
    certfile, keyfile = map(str, certificate)
    return serve(ssl_certfile=certfile, ssl_keyfile=keyfile, api_keys=("k",), max_body=1 << 20)


@pytest.fixture
def client(certificate):
    return ssl.create_default_context(cafile=certificate[0])


def connect(server, context, **options):
    sock = socket.create_connection(("127.0.0.1", server.port), 10)
    return context.wrap_socket(sock, server_hostname="localhost", **options)


def ask_for_stream(sock, **body):
    data = json.dumps({"messages": USER, "stream": True, "seed": 0, **body}).encode()
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Api-Key: k\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
    )


def test_the_openai_sdk_streams_over_tls(server, client):
    with (
        httpx2.Client(verify=client) as http_client,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="k", http_client=http_client, max_retries=0
        ) as sdk,
    ):
        assert sdk.models.list().data[0].id == MODEL
        chunks = sdk.chat.completions.create(model=MODEL, messages=USER, stream=True, seed=0)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text.startswith(TEXT)
        whole = sdk.chat.completions.create(model=MODEL, messages=USER, seed=0)
        assert whole.choices[0].message.content == text
        with pytest.raises(openai.AuthenticationError) as caught:
            sdk.with_options(api_key="wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"


def test_curl_speaks_to_it(server, certificate):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("there is no curl")
    command = [curl, "-sS", "--cacert", certificate[0], "-H", "Authorization: Bearer k"]
    done = subprocess.run(
        [*command, f"{server.url}/v1/models"], capture_output=True, timeout=30, check=True
    )
    assert json.loads(done.stdout)["data"][0]["id"] == MODEL
    done = subprocess.run(
        [*command, "--tls-max", "1.1", f"{server.url}/health"], capture_output=True, timeout=30
    )
    assert done.returncode != 0


def test_tls_1_2_and_1_3_are_spoken_and_http_1_1_is_agreed_on(server, client):
    client.set_alpn_protocols(["h2", "http/1.1"])
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        client.maximum_version = version
        with connect(server, client) as sock:
            assert sock.selected_alpn_protocol() == "http/1.1"
            ask_for_stream(sock)
            answer = b""
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                answer += sock.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 OK") and b"[DONE]" in answer


def test_a_client_that_leaves_aborts_its_generation(server, client):
    with connect(server, client) as sock:
        ask_for_stream(sock, ignore_eos=True)
        assert sock.recv(1 << 16)
        eventually(lambda: len(server.frontend.dispatcher) == 1)
    eventually(lambda: len(server.frontend.dispatcher) == 0)
    assert len(server.engine.aborted) == 1
    eventually(lambda: server.http.num_connections == 0)


def test_a_client_that_ends_tls_in_order_is_gone_too(server, client):
    with connect(server, client) as sock:
        ask_for_stream(sock, ignore_eos=True)
        assert sock.recv(1 << 16)
        sock.settimeout(0.2)
        with pytest.raises((TimeoutError, ssl.SSLError, OSError)):
            sock.unwrap()
            raise OSError
        eventually(lambda: len(server.frontend.dispatcher) == 0)


def test_a_client_that_does_not_read_pauses_its_stream_and_gets_all_of_it(server, client):
    with connect(server, client) as sock:
        ask_for_stream(sock, ignore_eos=True, max_tokens=4000)
        eventually(lambda: server.frontend.dispatcher.num_generated > 3000, 30)
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            piece = sock.recv(1 << 16)
            assert piece, answer[-500:]
            answer += piece
    assert b'"finish_reason":"length"' in answer[-500:], answer[-500:]
    assert b"[DONE]" in answer


def test_a_body_in_many_records_arrives_whole(server, client):
    data = json.dumps({"messages": USER, "max_tokens": 1, "user": "x" * 500_000}).encode()
    with connect(server, client) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Api-Key: k\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(data)
        )
        for start in range(0, len(data), 10_000):
            sock.sendall(data[start : start + 10_000])
        answer = b""
        while piece := sock.recv(1 << 16):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200 OK")


def test_an_error_of_the_framing_is_answered_and_ends_the_connection(server, client):
    with connect(server, client) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        answer = b""
        while piece := sock.recv(1 << 16):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400 ")
    eventually(lambda: server.http.num_connections == 0)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff", b""])
def test_what_is_no_tls_harms_nobody(server, client, data):
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        started = time.monotonic()
        while sock.recv(1 << 16):
            pass
        assert time.monotonic() - started < 5
    with connect(server, client) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
    assert server.http.num_exchanges == 0


# Files


def test_the_key_may_stand_in_the_file_of_the_certificate(certificate, tmp_path):
    both = tmp_path / "both.pem"
    both.write_bytes(certificate[1].read_bytes() + certificate[0].read_bytes())
    context = server_context(str(both), None)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_files_that_cannot_work_end_the_start_with_one_line(certificate, tmp_path):
    certfile, keyfile = map(str, certificate)
    (tmp_path / "other").mkdir()
    (tmp_path / "locked").mkdir()
    _, other_key = map(str, make_certificate(tmp_path / "other"))
    _, locked_key = map(str, make_certificate(tmp_path / "locked", b"password"))
    broken = tmp_path / "broken.pem"
    text = certificate[0].read_bytes()
    broken.write_bytes(text[:100] + text[140:])
    no_file = str(tmp_path / "none.pem")
    for files, words in (
        ((no_file, keyfile), f"Cannot read --ssl-certfile {no_file}: No such file or directory."),
        ((certfile, no_file), f"Cannot read --ssl-keyfile {no_file}: No such file or directory."),
        ((str(tmp_path), keyfile), "Is a directory"),
        ((keyfile, keyfile), "has no certificate in PEM form"),
        ((certfile, certfile), "has no private key in PEM form"),
        ((certfile, None), "has no private key in PEM form"),
        ((certfile, other_key), "does not belong to the certificate"),
        ((certfile, locked_key), "is encrypted; a key without a password is needed"),
        ((str(broken), keyfile), "is damaged"),
    ):
        with pytest.raises(ConfigError) as caught:
            server_context(*files)
        assert words in caught.value.message
        assert "\n" not in caught.value.message


def test_a_key_without_a_certificate_is_refused():
    with pytest.raises(ConfigError, match="--ssl-keyfile needs --ssl-certfile"):
        Config("x", ssl_keyfile="key.pem")
