"""Every situation in which a request fails, on chat and on completions, streamed and not.

Each row: the status, ``code`` and ``param`` of the one JSON body that is the whole answer (no byte
of a stream comes before it), and the header fields that belong to the status.
"""

import json

import pytest
from api_client import request
from fake_engine import FACTS

from minisgl_fast.wire import FinishReason

ROUTES = {
    "/v1/chat/completions": (
        "messages",
        lambda text: {"messages": [{"role": "user", "content": text}]},
    ),
    "/v1/completions": ("prompt", lambda text: {"prompt": text}),
}
LIMIT = FACTS["max_model_len"]
JSON = {"Content-Type": "application/json"}
KEY = "sk-table"
PROMPT = "<the prompt's field>"


def body_with(**fields):
    return lambda ask: {**ask("Hi"), **fields}


def long_prompt(ask):
    return ask("word " * LIMIT)


def raw(data):
    return lambda ask: data


# situation, settings of the server, method, body, headers, status, code, param, header fields
TABLE = [
    ("bad JSON", {}, "POST", raw(b"{"), JSON, 400, "invalid_value", None, {}),
    ("no body", {}, "POST", raw(b""), JSON, 400, "invalid_value", None, {}),
    ("not an object", {}, "POST", raw(b"[1]"), JSON, 400, "invalid_value", None, {}),
    ("wrong type", {}, "POST", body_with(n="1"), JSON, 400, "invalid_value", "n", {}),
    ("missing field", {}, "POST", raw(b"{}"), JSON, 400, "invalid_value", PROMPT, {}),
    (
        "wrong content type",
        {},
        "POST",
        body_with(),
        {"Content-Type": "text/plain"},
        400,
        "invalid_value",
        None,
        {},
    ),
    ("bad value", {}, "POST", body_with(top_p=1.5), JSON, 400, "invalid_value", "top_p", {}),
    (
        "stream options without stream",
        {},
        "POST",
        lambda ask: {**ask("Hi"), "stream": False, "stream_options": {"include_usage": True}},
        JSON,
        400,
        "invalid_value",
        "stream_options",
        {},
    ),
    ("model", {}, "POST", body_with(model="x"), JSON, 404, "model_not_found", "model", {}),
    ("long prompt", {}, "POST", long_prompt, JSON, 400, "context_length_exceeded", PROMPT, {}),
    (
        "prompt and answer too long",
        {},
        "POST",
        body_with(max_tokens=LIMIT),
        JSON,
        400,
        "context_length_exceeded",
        "max_tokens",
        {},
    ),
    (
        "no key",
        {"api_keys": (KEY,)},
        "POST",
        body_with(),
        JSON,
        401,
        "invalid_api_key",
        None,
        {"www-authenticate": "Bearer"},
    ),
    (
        "bad key",
        {"api_keys": (KEY,)},
        "POST",
        body_with(),
        {**JSON, "Authorization": "Bearer sk-tablet"},
        401,
        "invalid_api_key",
        None,
        {"www-authenticate": "Bearer"},
    ),
    (
        "queue full",
        {"max_queued_requests": 1},
        "POST",
        body_with(n=2),
        JSON,
        503,
        "overloaded",
        None,
        {"retry-after": "1"},
    ),
    (
        "body too large",
        {"max_body": 1024},
        "POST",
        lambda ask: ask("x" * 2000),
        JSON,
        413,
        "payload_too_large",
        None,
        {"connection": "close"},
    ),
    ("method", {}, "GET", None, {}, 405, "method_not_allowed", None, {"allow": "POST"}),
    ("refused", {}, "POST", body_with(lora_path="x"), JSON, 400, "invalid_value", "lora_path", {}),
    ("engine failed", {}, "POST", body_with(), JSON, 500, "engine_error", None, {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server_with(module_serve):
    """A server by its settings, each started once."""
    started = {}

    def find(settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in started:
            started[key] = module_serve(**settings)
        return started[key]

    return find


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("situation", "settings", "method", "make", "headers", "status", "code", "param", "extra"),
    TABLE,
    ids=[row[0] for row in TABLE],
)
def test_an_error_is_one_json_body_before_any_event(
    server_with,
    situation,
    settings,
    method,
    make,
    headers,
    status,
    code,
    param,
    extra,
    path,
    stream,
):
    server = server_with(settings)
    prompt, ask = ROUTES[path]
    body = make(ask) if make is not None else None
    if isinstance(body, dict):
        body = json.dumps({"stream": stream, **body}).encode()
    server.engine.end_of_all = FinishReason.ERROR if situation == "engine failed" else None
    before = len(server.engine.added)
    found, fields, data = request(server, method, path, body, headers)
    server.engine.end_of_all = None

    error = json.loads(data)
    detail = error["error"]
    assert found == status
    assert (detail["code"], detail["param"]) == (code, prompt if param is PROMPT else param)
    types = {500: "server_error", 503: "overloaded_error"}
    assert detail["type"] == types.get(status, "invalid_request_error")
    assert (error["object"], error["message"]) == ("error", detail["message"])
    assert 0 < len(detail["message"]) < 500
    if code == "context_length_exceeded":
        assert f"maximum context length is {LIMIT} tokens" in detail["message"]
    assert fields["content-type"] == "application/json"
    assert fields["content-length"] == str(len(data))
    assert fields["x-request-id"] == error["request_id"]
    for name, value in extra.items():
        assert fields[name] == value
    if situation != "engine failed":
        assert len(server.engine.added) == before


def test_an_unknown_route_is_a_404_of_the_same_shape(server_with):
    server = server_with({})
    for method in ("GET", "POST"):
        status, _, data = request(server, method, "/v1/nothing", {} if method == "POST" else None)
        assert (status, json.loads(data)["error"]["code"]) == (404, "not_found")
