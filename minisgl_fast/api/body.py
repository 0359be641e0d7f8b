"""Body: the JSON object of a request into a checked Struct.

Rules: orjson parses, msgspec checks types; unknown fields are ignored, explicit null means the
default where a field may be null, whole floats count as integers. Every error is a RequestError
that names the field in ``param`` the way a client would write it: ``messages[0].content``.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias, TypeVar

import msgspec
import orjson

from minisgl_fast.errors import RequestError
from minisgl_fast.server.http_rules import HttpRequest

MAX_JSON_DEPTH = 64
MAX_MESSAGE_CHARACTERS = 300

Body: TypeAlias = dict[str, Any]
Shape = TypeVar("Shape", bound=msgspec.Struct)


def doc(description: str, **schema: Any) -> msgspec.Meta:
    """What ``/openapi.json`` says of a field. ``schema``: its range, in JSON Schema's words, where
    code behind the Struct checks it with a message of its own."""
    return msgspec.Meta(description=description, extra_json_schema=schema or None)


def read_body(request: HttpRequest, shape: type[Shape]) -> Shape:
    """The checked Struct of a request, for the routes that do not go through pipeline.py."""
    check_content_type(request)
    return parse_body(request.body, shape)[0]


def check_content_type(request: HttpRequest) -> None:
    """RequestError if the body says that it is something else than JSON."""
    content_type = request.field(b"content-type")
    if content_type is not None and content_type != b"application/json":
        media_type = content_type.split(b";")[0].strip().lower()
        if media_type != b"application/json" and not media_type.endswith(b"+json"):
            raise RequestError("The content type must be application/json.")


def parse_body(body: bytes, shape: type[Shape]) -> tuple[Shape, Body]:
    """The checked Struct, and the fields as they came."""
    fields = parse_json(body)
    return check_fields(fields, shape), fields


def parse_json(body: bytes) -> Body:
    """The fields of an object that is not nested too deep."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error.msg}.") from None
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object.")
    # A body without that many brackets cannot be nested that deep.
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH:
        check_depth(fields)
    return fields


def check_fields(fields: Body, shape: type[Shape]) -> Shape:
    """The checked Struct of these fields."""
    try:
        return msgspec.convert(fields, shape, str_keys=True)
    except msgspec.ValidationError:
        try:
            return msgspec.convert(_whole_floats_as_ints(fields), shape, str_keys=True)
        except msgspec.ValidationError as error:
            raise type_error(str(error)) from None


def check_depth(value: Any, param: str | None = None) -> None:
    """RequestError if the value, that of field ``param`` or the body, is nested too deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_JSON_DEPTH):
        deeper: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            deeper += [child for child in children if isinstance(child, (dict, list))]
        if not deeper:
            return
        level = deeper
    name = param or "The body"
    raise RequestError(f"{name} is nested deeper than {MAX_JSON_DEPTH} levels.", param=param)


def _whole_floats_as_ints(fields: Body) -> Body:
    """The fields with 5.0 made 5 wherever an integer may stand (float fields take both)."""
    return {name: value if name == "messages" else _whole(value) for name, value in fields.items()}


def _whole(value: Any) -> Any:
    # Past 2^53 a float no longer says which integer was meant.
    if type(value) is float and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if type(value) is list:
        return [_whole(item) for item in value]
    return value


def type_error(text: str) -> RequestError:
    """A RequestError from msgspec's text, such as "Expected `int`, got `str` - at `$.n`"."""
    what, _, where = text.partition(" - at ")
    match = re.search(r"`\$([^`]*)`", where)
    param = match.group(1).lstrip(".") if match else ""
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return RequestError(f"Missing required field: {param}.", param=param)
    what = what.replace("`", "")[:MAX_MESSAGE_CHARACTERS]
    return RequestError(f"{param}: {what}.", param=param or None)
