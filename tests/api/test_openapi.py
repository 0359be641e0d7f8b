"""The document of the API: every route, true to what the server takes, gives and refuses."""

import json

import msgspec
import pytest
from api_client import USER, request

from minisgl_fast.api.answers import (
    AnthropicError,
    ChatCompletion,
    ErrorAnswer,
    ModelList,
    OllamaError,
    State,
    TextCompletion,
)


@pytest.fixture(scope="module")
def server(module_serve):
    return module_serve()


@pytest.fixture(scope="module")
def document(server):
    return json.loads(request(server, "GET", "/openapi.json")[2])


def test_the_document_has_every_route_and_no_other(server, document):
    described = {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }
    served = {(method, path.replace("/*", "/{model}")) for method, path in server.api.routes}
    assert described == served
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["summary"]
    names = [o["operationId"] for item in document["paths"].values() for o in item.values()]
    assert len(set(names)) == len(names)


def test_every_reference_leads_somewhere(document):
    def references(value):
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for child in value.values():
                yield from references(child)
        elif isinstance(value, list):
            for child in value:
                yield from references(child)

    found = set(references(document))
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert found <= schemas
    assert len(found) > 20


def test_a_body_that_a_route_checks_is_in_the_document(server, document):
    for (method, path), route in server.api.routes.items():
        operation = document["paths"][path.replace("/*", "/{model}")][method.lower()]
        assert ("requestBody" in operation) == (route.body is not None)


def test_the_fields_of_chat_have_words_and_ranges(document):
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert all(field.get("description") for field in fields.values())
    assert (fields["temperature"]["minimum"], fields["temperature"]["maximum"]) == (0, 100)
    assert fields["n"]["maximum"] == 128
    assert "default" not in fields["n"]


ANSWERS = [
    ("POST", "/v1/chat/completions", {"messages": USER, "return_token_ids": True}, ChatCompletion),
    ("POST", "/v1/completions", {"prompt": ["Hi", "Ho"], "service_tier": "auto"}, TextCompletion),
    ("GET", "/v1/models", None, ModelList),
    ("GET", "/health", None, State),
    ("POST", "/v1/chat/completions", {}, ErrorAnswer),
    ("GET", "/nowhere", None, ErrorAnswer),
    ("POST", "/v1/messages", {}, AnthropicError),
    ("POST", "/api/chat", {"messages": 5}, OllamaError),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "shape"), ANSWERS)
def test_answers_have_the_shape_of_the_document(server, method, path, body, shape):
    data = request(server, method, path, body)[2]
    read = msgspec.json.decode(data, type=shape)
    # Nothing is there that the shape does not know.
    assert json.loads(msgspec.json.encode(read)) == json.loads(data)


# Errors that are the same on every route that reads a body

BROKEN = [b"{", b"[]", b'"text"', b"5", b"null", b"\xff", b'{"a":NaN}']


def routes_with_bodies(server):
    found = [path for (method, path), route in server.api.routes.items()
             if method == "POST" and route.body is not None]  # fmt: skip
    assert len(found) > 5
    return found


@pytest.mark.parametrize("body", BROKEN)
def test_what_is_no_json_object_is_a_400_on_every_route(server, body):
    for path in routes_with_bodies(server):
        status, _, data = request(server, "POST", path, body)
        assert (status, "JSON" in data.decode()) == (400, True), path
        assert len(data) < 2000


def test_another_content_type_is_a_400_on_every_route(server):
    for path in routes_with_bodies(server):
        if path.startswith("/api/"):  # Ollama takes what curl sends by itself
            continue
        status, _, data = request(server, "POST", path, b"{}", {"Content-Type": "text/plain"})
        assert (status, b"application/json" in data) == (400, True), path


@pytest.mark.parametrize("value", [5, "x", True, [5], {"x": {"x": 5}}])
def test_a_wrong_type_is_a_400_on_every_route(server, document, value):
    """Each field of each route gets a value; where its schema has no such type, it is refused."""
    types = {5: "integer", "x": "string", True: "boolean"}
    wanted = types[value] if isinstance(value, (int, str)) else type(value).__name__
    wanted = {"list": "array", "dict": "object"}.get(wanted, wanted)
    num_refused = 0
    for path in routes_with_bodies(server):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = resolve(document, schema["schema"])
        required = dict.fromkeys(schema.get("required", ()))
        for name, field in schema["properties"].items():
            if wanted in allowed_types(document, field):
                continue
            body = json.dumps({**required, name: value}).encode()
            status, _, data = request(server, "POST", path, body)
            assert status == 400, (path, name, data)
            num_refused += 1
    assert num_refused > 100


def resolve(document, schema):
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def allowed_types(document, schema):
    schema = resolve(document, schema)
    if not schema or not {"anyOf", "type", "enum"} & schema.keys():
        return {"integer", "string", "boolean", "array", "object"}
    if "anyOf" in schema:
        return set().union(*(allowed_types(document, option) for option in schema["anyOf"]))
    if "enum" in schema:
        return set()
    return {"number": {"integer"}}.get(schema["type"], {schema["type"]})
