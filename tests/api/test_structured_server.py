"""Grammars over the wire: checked before the first byte, kept, and sent with the ADD."""

import http.client
import json
import os
import signal
import threading
import time

import openai
import pytest
from api_client import CHAT, COMPLETIONS, USER, request
from fake_engine import EOS, MODEL, eventually

from minisgl_fast.server import grammar_checker
from minisgl_fast.wire import FinishReason

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def ask(server, path=CHAT, **fields):
    """(status, error or answer) of one request."""
    body = {"messages": USER} if path == CHAT else {"prompt": "Hi"}
    status, _, data = request(server, "POST", path, body | {"max_tokens": 8} | fields)
    answer = json.loads(data)
    return status, answer["error"] if status != 200 else answer


def test_the_engine_gets_the_grammar_and_a_known_one_is_not_compiled_again(server):
    for path in (CHAT, COMPLETIONS):
        assert ask(server, path, regex="a+")[0] == 200
    assert ask(server, regex="a+", n=2)[0] == 200
    grammars = {one.grammar for one in server.engine.added}
    # The model of the chat may reason before.
    assert len(server.engine.added) == 4 and len(grammars) == 2
    for grammar in grammars:
        lark = json.loads(grammar)["grammars"][0]["lark_grammar"]
        assert "no_forcing" in lark and "/a+/" in lark
    checker = server.frontend.grammars("regex")
    assert len(checker._known) == 2 and not checker._waiting
    assert sum(one._process is not None for one in checker._processes) == 1
    ask(server)
    assert server.engine.added[-1].grammar == b""


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"regex": "a(?=b)"}, "regex", "look-around"),
        ({"regex": "(a"}, "regex", "unclosed group"),
        ({"ebnf": "root ::= ("}, "ebnf", ""),
        ({"json_schema": {"type": "foo"}}, "json_schema", "Invalid type: foo"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"$ref": "#/x"}},
                }
            },
            "response_format.json_schema.schema",
            "/x",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}]}
            | {"tool_choice": "required"},
            "tool_choice",
            "",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_grammar_is_a_400_that_names_its_field(server, fields, param, words, stream):
    for _ in range(2):  # compiled, and known to be bad
        status, error = ask(server, **fields, stream=stream)
        assert (status, error["param"]) == (400, param)
        assert words in error["message"] and "cannot be followed" in error["message"]
    assert not server.engine.added


def chain(length):
    rules = (f'r{i}: "x{i}" r{(i + 1) % length}?' for i in range(length))
    return "start: " + " | ".join(f"r{i}" for i in range(length)) + "\n" + "\n".join(rules)


NESTED = {"type": "integer"}
for _ in range(28):
    NESTED = {"type": "object", "properties": {"a": NESTED}, "required": ["a"]}
DOUBLING = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
TOO_LONG_OR_DEEP = [
    {"ebnf": chain(9000)},
    {"ebnf": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    {"regex": "(" * 5000 + "a" + ")" * 5000},
]
# Whether these are done within the time of a compilation depends on the machine.
SLOW = [
    {"regex": "((((a{1,900}){1,900}){1,900}){1,900}|b){1,900}"},
    {"regex": "(x+x+)+y" * 2000},
    {"regex": "|".join(f"w{i}(a|b)*c{{{i}}}" for i in range(3000))},
    {"json_schema": NESTED},
    {"json_schema": {"$ref": "#/$defs/a0", "$defs": DOUBLING | {"a40": {"type": "integer"}}}},
    {"json_schema": {"enum": [f"value {i}" for i in range(15_000)]}},
    {"json_schema": {"type": "string", "minLength": 10**9}},
    {"json_schema": {"type": "array", "items": {"type": "array", "minItems": 10**6}}},
    {"json_schema": {"properties": {f"p{i}": {"maxLength": 500} for i in range(2000)}}},
    {"structured_outputs": {"choice": ["x" * 1000 + str(i) for i in range(200)]}},
]


def test_hostile_grammars_are_answered_soon_while_a_stream_goes_on(server, tokenizer):
    server.engine.script = lambda request: tokenizer.encode("word " * 50) * 50
    gaps = []
    is_done = threading.Event()

    def read_stream():
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            stream = client.chat.completions.create(
                model=MODEL, messages=USER, stream=True, max_tokens=4000
            )
            last = time.perf_counter()
            for _ in stream:
                gaps.append(time.perf_counter() - last)
                last = time.perf_counter()
                time.sleep(0.001)
                if is_done.is_set():
                    return

    reader = threading.Thread(target=read_stream)
    reader.start()
    eventually(lambda: gaps)
    num_before = len(gaps)
    for fields in TOO_LONG_OR_DEEP + SLOW:
        start = time.perf_counter()
        status, error = ask(server, **fields)
        name = next(iter(fields))
        assert status == 400 or fields in SLOW
        assert status == 200 or (status == 400 and error["param"].partition(".")[0] == name)
        assert time.perf_counter() - start < 10
    is_done.set()
    reader.join(20)
    assert len(gaps) > num_before
    # A good one is served as if nothing had been.
    assert ask(server, regex="ab")[0] == 200


def test_a_process_that_hangs_is_killed_and_replaced(server, monkeypatch):
    assert ask(server, regex="a1")[0] == 200
    checker = server.frontend.grammars("regex")
    (process,) = [one for one in checker._processes if one._process is not None]
    first = process._process.pid
    monkeypatch.setattr(grammar_checker, "COMPILE_TIMEOUT_S", 0.1)
    os.kill(first, signal.SIGSTOP)
    status, error = ask(server, regex="a2")
    assert status == 400 and "too long" in error["message"]
    monkeypatch.undo()
    assert ask(server, regex="a3")[0] == 200
    assert process._process.pid != first


def test_a_grammar_without_a_next_token_is_an_error_of_its_request_alone(server):
    server.engine.end_of_all = FinishReason.GRAMMAR
    status, error = ask(server, regex="a+")
    assert (status, error["param"]) == (400, "regex")
    assert "no token" in error["message"]
    server.engine.end_of_all = None
    assert ask(server, regex="a+")[0] == 200


def test_an_engine_without_grammars_names_the_extra(serve, monkeypatch):
    monkeypatch.setitem(__import__("fake_engine").FACTS, "grammars", False)
    server = serve()
    for fields, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ):
        status, error = ask(server, **fields)
        assert (status, error["param"]) == (400, param)
        assert "minisgl_fast[structured]" in error["message"]
    assert ask(server, tools=TOOLS, tool_choice="auto")[0] == 200


def test_a_client_that_leaves_while_its_grammar_compiles_starts_nothing(server):
    assert ask(server, regex="first")[0] == 200
    checker = server.frontend.grammars("regex")
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps({"messages": USER, "ebnf": chain(3000)})
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    eventually(lambda: checker._waiting)
    connection.close()
    eventually(lambda: not checker._waiting)
    assert ask(server)[0] == 200
    assert [bool(one.grammar) for one in server.engine.added] == [True, False]


def test_the_sdk_gets_a_bound_call(server, tokenizer):
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    server.engine.script = lambda request: [*tokenizer.encode(text), EOS]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, tools=TOOLS, tool_choice="required"
        )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("f", '{"a": 1}')
    assert answer.choices[0].finish_reason == "tool_calls"
    assert b"<tool_call>" in server.engine.added[-1].grammar


def test_the_native_route_binds_each_prompt_of_a_batch(server):
    sampling = [{"regex": "a+"}, {"json_schema": '{"type": "integer"}'}, {}]
    sampling = [one | {"max_new_tokens": 4} for one in sampling]
    body = {"text": ["1", "2", "3"], "sampling_params": sampling}
    status, _, data = request(server, "POST", "/generate", body)
    assert status == 200 and len(json.loads(data)) == 3
    first, second, third = (one.grammar for one in server.engine.added)
    assert b"/a+/" in first and b'"integer"' in second and third == b""
    body["sampling_params"][1] = {"ebnf": "root ::= ("}
    status, _, data = request(server, "POST", "/generate", body)
    assert status == 400
    assert json.loads(data)["error"]["param"] == "sampling_params[1].ebnf"
    status, _, data = request(
        server, "POST", "/generate", {"text": "1", "sampling_params": {"regex": "a", "ebnf": "b"}}
    )
    assert (status, json.loads(data)["error"]["param"]) == (400, "sampling_params.ebnf")
