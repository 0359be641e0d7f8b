"""The TLS context of a server from its certificate files.

Rules: TLS 1.2 and newer, as Python's ``ssl`` configures it for servers; files that cannot work end
the start with one line that says which and why, and never with a question on the terminal.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from minisgl_fast.errors import ConfigError

HANDSHAKE_TIMEOUT_S = 10.0
SHUTDOWN_TIMEOUT_S = 2.0


def server_context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """For ``loop.create_server(ssl=...)``. ``keyfile`` None: the key is in the ``certfile``."""
    _check_readable("--ssl-certfile", certfile)
    key_flag, key_path = "--ssl-certfile", certfile
    if keyfile is not None:
        key_flag, key_path = "--ssl-keyfile", keyfile
        _check_readable(key_flag, keyfile)
    if b"-----BEGIN CERTIFICATE-----" not in Path(certfile).read_bytes():
        raise ConfigError(f"--ssl-certfile {certfile} has no certificate in PEM form.")
    if b"PRIVATE KEY-----" not in Path(key_path).read_bytes():
        raise ConfigError(f"{key_flag} {key_path} has no private key in PEM form.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    asked = False

    def no_password() -> str:
        nonlocal asked
        asked = True
        return ""

    try:
        context.load_cert_chain(certfile, keyfile, no_password)
    except (ssl.SSLError, ValueError) as error:
        if asked:
            reason = f"{key_flag} {key_path} is encrypted; a key without a password is needed"
        elif getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            reason = f"the key in {key_path} does not belong to the certificate in {certfile}"
        else:
            reason = f"{certfile} or {key_path} is damaged"
        raise ConfigError(f"Cannot serve HTTPS: {reason}.") from error
    return context


def _check_readable(flag: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"Cannot read {flag} {path}: {error.strerror}.") from None
