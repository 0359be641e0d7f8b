"""Errors in the shape of the API that the path belongs to.

The default is errors_json's. Rules: the HTTP status is the same in every shape; a field is called
as the path's API calls it, in the message and in ``param``; Ollama's and Anthropic's shapes have
no ``param``, there the message alone names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import orjson

from minisgl_fast.errors import MinisglError
from minisgl_fast.server.errors_json import error_body
from minisgl_fast.server.http_request import HttpRequest

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
OLLAMA = "/api/"

# Fields of a chat request as the other APIs call them.
_RESPONSES_NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "tool_choice.allowed_tools.mode": "tool_choice.mode",
    "tool_choice.allowed_tools.tools": "tool_choice.tools",
    "tool_choice.function.name": "tool_choice.name",
}
_MESSAGES_NAMES = {
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}
_OLLAMA_NAMES = {
    "max_tokens": "options.num_predict",
    "reasoning_effort": "think",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
    **{
        name: f"options.{name}"
        for name in (
            "temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty",
            "frequency_penalty",
        )
    },
}  # fmt: skip
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def shaped_error(error: MinisglError, request_id: str, path: str) -> bytes:
    """The JSON body of an error answer to a request for this path."""
    if path.startswith(MESSAGES):
        return messages_error(error, request_id)
    if path.startswith(OLLAMA):
        return ollama_error(error)
    if path.startswith(RESPONSES):
        return error_body(responses_error(error), request_id)
    return error_body(error, request_id)


def name_request(request: HttpRequest) -> None:
    """On Anthropic's routes every answer has the request's id by the name of Anthropic's header,
    too."""
    if request.path.startswith(MESSAGES):
        line = b"request-id: %b\r\n" % request.request_id.encode("ascii")
        if line not in request.extra_head:
            request.extra_head += line


def messages_error(error: MinisglError, request_id: str) -> bytes:
    """Anthropic's shape."""
    default = "invalid_request_error" if error.http_status < 500 else "api_error"
    detail = {
        "type": _ANTHROPIC_TYPES.get(error.http_status, default),
        "message": _renamed(error, _MESSAGES_NAMES).message,
    }
    return orjson.dumps({"type": "error", "error": detail, "request_id": request_id})


def ollama_error(error: MinisglError) -> bytes:
    """Ollama's shape."""
    return orjson.dumps({"error": _renamed(error, _OLLAMA_NAMES).message})


def responses_error(error: MinisglError) -> MinisglError:
    """The error in the words of OpenAI's Responses."""
    return _renamed(error, _RESPONSES_NAMES)


def _renamed(error: MinisglError, names: Mapping[str, str]) -> MinisglError:
    old = error.param or ""
    new = names.get(old)
    if new is None:
        return error
    renamed = error.__class__.__new__(error.__class__)
    renamed.__dict__.update(error.__dict__)
    renamed.param = new
    renamed.message = re.sub(rf"(?<![\w.]){old}\b", new, error.message)
    return renamed
