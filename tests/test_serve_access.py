"""A server with keys and TLS, as a person starts it."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx2
import pytest
from certificates import make_certificate
from server_process import CPU, ServerProcess
from tiny_folder import make_tiny_model

from minisgl_fast import cli
from minisgl_fast.server.access import is_loopback


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("access") / "model")


def test_keys_and_tls_hold_from_the_first_moment_to_the_last(model: Path, tmp_path: Path) -> None:
    certfile, keyfile = make_certificate(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("client-secret\n")
    files = ("--ssl-certfile", certfile, "--ssl-keyfile", keyfile, "--api-key-file", keys)
    server = ServerProcess("--model", model, *files, "--admin-api-key", "chief-secret")
    context = ssl.create_default_context(cafile=certfile)
    known = {"Authorization": "Bearer client-secret"}
    try:
        url = f"https://127.0.0.1:{server.port}"
        with httpx2.Client(base_url=url, verify=context, timeout=90) as client:
            assert client.get("/v1/models").status_code == 401  # it is still loading
            assert client.get("/health").status_code in (200, 503)
            server.wait_ready()
            assert client.get("/health").status_code == 200
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers=known).status_code == 200
            body = {"prompt": "Once", "max_tokens": 3, "stream": True}
            with client.stream("POST", "/v1/completions", json=body, headers=known) as answer:
                text = "".join(answer.iter_text())
            assert text.endswith("data: [DONE]\n\n")
        advice = next(line for line in server.printed if line.startswith("Try: "))
        assert f"curl {url}/" in advice and '-H "Authorization: Bearer $KEY"' in advice
        engine = Path(f"/proc/{server.engine_pid}")
        assert b"secret" not in (engine / "cmdline").read_bytes()
        server.signal()
        assert server.wait() == 0
        assert "secret" not in "".join(server.printed + server.errors)
    finally:
        server.end()


def test_every_frontend_asks_for_the_key(model: Path, tmp_path: Path) -> None:
    certfile, keyfile = make_certificate(tmp_path)
    tls = ("--ssl-certfile", certfile, "--ssl-keyfile", keyfile)
    server = ServerProcess(
        "--model", model, "--frontends", 2, "--api-key", "secret", "--cors-origin", "http://a", *tls
    )
    context = ssl.create_default_context(cafile=certfile)
    origin = {"Origin": "http://a"}
    try:
        url = f"https://127.0.0.1:{server.wait_ready().port}/v1/models"
        for _ in range(20):  # the kernel spreads connections over the processes
            with httpx2.Client(verify=context, timeout=90) as client:
                refused = client.get(url, headers=origin)
                assert refused.status_code == 401
                assert refused.headers["access-control-allow-origin"] == "http://a"
                known = {"Authorization": "Bearer secret"}
                assert client.get(url, headers=known).status_code == 200
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        for child in children.read_text().split():
            assert b"secret" not in Path(f"/proc/{child}/cmdline").read_bytes()
        server.signal()
        assert server.wait() == 0
    finally:
        server.end()


@pytest.mark.parametrize("flags", [(), ("--api-key", "k")])
def test_a_server_open_to_the_network_without_a_key_is_warned_about(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    server = ServerProcess("--model", tmp_path / "none", "--host", "0.0.0.0", *flags)
    try:
        assert server.wait() == 1  # there is no such model, but the port is bound before
        warnings = [line for line in server.errors if "warning: whoever reaches" in line]
        assert len(warnings) == (not flags)
    finally:
        server.end()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [("0.0.0.0", False), ("::", False), ("10.127.0.1", False), ("example.com", False)],
)
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_files_that_cannot_work_end_the_start_before_the_port_is_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for flags, words in (
        (("--api-key-file", str(empty)), "has no key in it"),
        (("--ssl-certfile", str(empty)), "has no certificate"),
    ):
        assert cli.main(["--model", "x", *CPU, *flags]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
