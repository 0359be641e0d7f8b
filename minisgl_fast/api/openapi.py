"""The document at ``/openapi.json``: OpenAPI 3.1, made of the table of routes and its Structs.

Rules: what a body may be comes from the Struct that checks it, so the document says no more and no
less than the server does about types; ranges and rules between fields that code behind the Struct
checks stand beside it as the Struct's own documentation (body.doc).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from minisgl_fast import __version__
from minisgl_fast.api.answers import AnthropicError, ErrorAnswer, OllamaError
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.server.error_shapes import MESSAGES, OLLAMA
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest

OPENAPI = "/openapi.json"
_REFERENCE = "#/components/schemas/{name}"
# The variable that stands for what a path ends in.
_ENDINGS = {"/v1/models/*": "model"}


class OpenApi:
    """Serves the document of a whole server."""

    def __init__(self) -> None:
        self._body = b""

    @property
    def routes(self) -> Routes:
        return {("GET", OPENAPI): Route(self.show, "This document")}

    def describe(self, routes: Mapping[tuple[str, str], Route]) -> None:
        """Take the server's routes, this one among them."""
        self._body = orjson.dumps(document(routes))

    def show(self, request: HttpRequest, exchange: Exchange) -> None:
        exchange.respond(200, self._body)


def document(routes: Mapping[tuple[str, str], Route]) -> dict[str, Any]:
    """The document of these routes."""
    shapes: list[Any] = [ErrorAnswer, AnthropicError, OllamaError]
    for route in routes.values():
        shapes += [shape for shape in (route.body, route.answer) if shape is not None]
    shapes = list(dict.fromkeys(shapes))
    schemas, components = msgspec.json.schema_components(shapes, ref_template=_REFERENCE)
    schema_of = dict(zip(shapes, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), route in routes.items():
        variable = _ENDINGS.get(path, "rest") if path.endswith("/*") else ""
        name = f"{path[:-1]}{{{variable}}}" if variable else path
        operation = _operation(method, name, route, schema_of)
        if variable:
            operation["parameters"] = [
                {"name": variable, "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths.setdefault(name, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "minisgl_fast",
            "version": __version__,
            "description": "A small, fast LLM inference server with an OpenAI-compatible API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": {name: _clean(schema) for name, schema in components.items()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(
    method: str, path: str, route: Route, schema_of: Mapping[Any, dict[str, Any]]
) -> dict[str, Any]:
    answer = {} if route.answer is None else {"schema": schema_of[route.answer]}
    content = {route.media_type: answer}
    if route.streams:
        content[route.stream_type] = {}
    error = {"application/json": {"schema": schema_of[_error_shape(path)]}}
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub('[^a-zA-Z0-9]+', '_', path).rstrip('_')}",
        "summary": route.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "4XX": {"description": "The request is at fault.", "content": error},
            "5XX": {"description": "Not ready, overloaded, or failed.", "content": error},
        },
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": route.needs_body,
            "content": {"application/json": {"schema": schema_of[route.body]}},
        }
    return operation


def _error_shape(path: str) -> type[msgspec.Struct]:
    """As error_shapes.py has it."""
    if path.startswith(MESSAGES):
        return AnthropicError
    return OllamaError if path.startswith(OLLAMA) else ErrorAnswer


def _clean(schema: Any) -> Any:
    """Without defaults of null, which say nothing, and titles that repeat a name."""
    if isinstance(schema, dict):
        return {
            key: _clean(value)
            for key, value in schema.items()
            if not (key == "default" and value is None)
            and not (key == "title" and isinstance(value, str))
        }
    return [_clean(item) for item in schema] if isinstance(schema, list) else schema
