"""Tool calls of earlier turns, in the form that a chat template can write.

Clients send arguments as JSON text, and templates differ: some write the text as it is, some write
any value as JSON (and would put a text in quotes), some go through the object's items. A template
that writes text as it is gets text, also because that is what the model once wrote and so what the
prefix cache knows; any other gets the object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minisgl_fast.errors import RequestError

PROBE_ARGUMENTS = '{"probe_key": "probe_value"}'
# A template that writes PROBE_ARGUMENTS as it is takes text. The id is as long as Mistral's are.
PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "probe1234",
                "type": "function",
                "function": {"name": "probe", "arguments": PROBE_ARGUMENTS},
            }
        ],
    },
]


def with_arguments(index: int, message: dict[str, Any], as_text: bool) -> dict[str, Any]:
    """The message with the arguments of its calls as text, or as objects.

    RequestError if text has to become an object and is none.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {
        **message,
        "tool_calls": [_call(f"messages[{index}].tool_calls[{i}]", call, as_text)
                       for i, call in enumerate(calls)],
    }  # fmt: skip


def _call(where: str, call: Any, as_text: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(f"{where}.function", call["function"], as_text)}
    arguments = call.get("arguments")
    if as_text:
        if not isinstance(arguments, str):
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    elif arguments is None or isinstance(arguments, str):
        arguments = _object(f"{where}.arguments", arguments or "{}")
    return {**call, "arguments": arguments}


def _object(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be a JSON object.", param=where)
    return value
