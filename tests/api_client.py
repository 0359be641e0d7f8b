"""What tests of the API share: a request on a connection of its own, and what a model may say."""

import http.client
import json

USER = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

# Emoji and Chinese are cut inside characters by their tokens.
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🏔"}}\n</tool_call>'
THOUGHT = "<think>\nLet me 想想 🤔\n</think>\n\n"


def request(server, method, path, body=None, headers=None):
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    if headers is None:
        headers = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, response.headers, data


def events_of(data):
    """The events of a stream that ended in order."""
    *events, done = data.decode().removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def ok(server, path, **body):
    """The answer to a good request; of a stream its events."""
    status, headers, data = request(server, "POST", path, body)
    assert status == 200, data
    is_stream = headers["content-type"].startswith("text/event-stream")
    return events_of(data) if is_stream else json.loads(data)


def error(server, path, **body):
    """The error of a bad request."""
    status, _, data = request(server, "POST", path, body)
    assert status == 400, data
    return json.loads(data)["error"]
