"""How an error looks on the wire.

One body serves two families of clients: the OpenAI shape (nested under ``error``) and SGLang's flat
twin (``object``, ``message``, ``type``, ``param``, ``code`` at top level). OpenAI's ``code`` is a
string or null, SGLang's is the number of the HTTP status: each family finds its own.
"""

from __future__ import annotations

import orjson

from minisgl_fast.errors import (
    MethodNotAllowedError,
    MinisglError,
    OverloadedError,
    UnauthorizedError,
)


def error_body(error: MinisglError, request_id: str) -> bytes:
    """The JSON body of an error answer; ``request_id`` repeats the ``x-request-id`` header."""
    detail = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    flat = {**detail, "code": error.http_status}
    return orjson.dumps({"error": detail, "object": "error", **flat, "request_id": request_id})


def error_headers(error: MinisglError) -> tuple[tuple[bytes, bytes], ...]:
    """The header fields that belong to an error.

    ``www-authenticate`` (401), ``allow`` (405), ``retry-after`` (503).
    """
    if isinstance(error, UnauthorizedError):
        return ((b"www-authenticate", b"Bearer"),)
    if isinstance(error, MethodNotAllowedError):
        return ((b"allow", error.allow.encode("ascii")),)
    if isinstance(error, OverloadedError):
        return ((b"retry-after", b"%d" % error.retry_after_s),)
    return ()
