"""How an error looks on the wire.

One body serves two families of clients: the OpenAI shape (nested under ``error``) and SGLang's flat
twin (``object``, ``message``, ``type``, ``param``, ``code`` at top level). ``code`` is a string or
null, never a number; the number is the HTTP status.
"""

from __future__ import annotations

import orjson

from minisgl_fast.errors import MethodNotAllowedError, MinisglError, OverloadedError


def error_body(error: MinisglError, request_id: str) -> bytes:
    """The JSON body of an error answer; ``request_id`` repeats the ``x-request-id`` header."""
    detail = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return orjson.dumps({"error": detail, "object": "error", **detail, "request_id": request_id})


def error_headers(error: MinisglError) -> tuple[tuple[bytes, bytes], ...]:
    """The header fields that belong to an error: ``allow`` (405), ``retry-after`` (503)."""
    if isinstance(error, MethodNotAllowedError):
        return ((b"allow", error.allow.encode("ascii")),)
    if isinstance(error, OverloadedError):
        return ((b"retry-after", b"%d" % error.retry_after_s),)
    return ()
