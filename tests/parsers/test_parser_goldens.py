"""Golden events of every format: what is markup, what is text, what a broken call becomes."""

import json

import pytest
from parser_cases import call, events_of

from minisgl_fast.parsers.events import CallArguments, CallEnd, CallStart, Content, Reasoning

R, C = Reasoning, Content
GOLDENS = [
    # Reasoning: the table of SGLang's qwen3 detector
    ("qwen3", "<think>\nA\n</think>\n\nB", [R("\nA\n"), C("\n\nB")]),
    ("qwen3 open", "<think>\nA\n</think>\n\nB", [R("\nA\n"), C("\n\nB")]),
    ("qwen3", "<think>abc</that> more</think>z", [R("abc</that> more"), C("z")]),
    ("qwen3", "<p>hi", [C("<p>hi")]),
    ("qwen3", "<", [C("<")]),
    ("qwen3 open", "abc</think>xyz", [R("abc"), C("xyz")]),
    ("deepseek-r1", "abc</think>xyz", [R("abc"), C("xyz")]),
    ("qwen3", "abc</think>xyz", [C("abc</think>xyz")]),
    ("qwen3 open", "no end", [R("no end")]),
    ("qwen3 open", "ends in</thi", [R("ends in</thi")]),
    ("qwen3", "<think>a</think>b<think>c</think>d", [R("a"), C("b<think>c</think>d")]),
    ("qwen3", "\n <think>a</think>b", [R("a"), C("b")]),
    ("qwen3", "\n b", [C("\n b")]),
    ("qwen3", "B <think>x</think> y", [C("B <think>x</think> y")]),
    ("qwen3", "<think></think>b", [C("b")]),
    ("qwen3", "", []),
    ("kimi", "◁think▷思考◁/think▷答案", [R("思考"), C("答案")]),
    ("kimi", "◁think▷◁/", [R("◁/")]),
    (
        "qwen3 + qwen25",
        '<think>so\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
        [R("so\n"), *call(0, "add", "{}")],
    ),
    (
        "qwen3 + qwen25",
        '<think>\nso\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
        [R("\nso\n"), *call(0, "add", "{}")],
    ),
    ("qwen3 + qwen25", "<think>a</think>\n\nB", [R("a"), C("\n\nB")]),
    # qwen25
    (
        "qwen25",
        'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "n": 3}}\n'
        '</tool_call>\n<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>\n Done. ',
        [
            C("Sure.\n"),
            *call(0, "get_weather", '{"city": "Paris", "n": 3}'),
            *call(1, "add", '{"a":1}'),
            C("\n Done. "),
        ],
    ),
    (
        "qwen25",
        '\n<tool_call>\n{"name": "any", "arguments": {"a": "</tool_call>"}}\n</tool_call>\n',
        call(0, "any", '{"a": "</tool_call>"}'),
    ),
    (
        "qwen25",
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>.',
        [*call(0, "f", '{"a": 1}'), C(".")],
    ),
    (
        "qwen25",
        '<tool_call>{"name": "f", "arguments": {"a": {"b": 1}</tool_call>.',
        [*call(0, "f", '{"a": {"b": 1}', False), C(".")],
    ),
    (
        "qwen25",
        '<tool_call>{"name": "f", "arguments": {"city": "Par',
        call(0, "f", '{"city": "Par', False),
    ),
    ("qwen25", '<tool_call>{"name": "f"}</tool_call>', call(0, "f", "{}")),
    ("qwen25", '<tool_call>{"name": "f", "arguments": null}</tool_call>', call(0, "f", "{}")),
    ("qwen25", '<tool_call>{"arguments": [1], "name": "f"}</tool_call>', call(0, "f", "[1]")),
    (
        "qwen25",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}</tool_call>',
        call(0, "f", '{"a": "é"}'),
    ),
    (
        "qwen25",
        '<tool_call>oops<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        [C("<tool_call>oops"), *call(0, "f", "{}")],
    ),
    # qwen3_coder
    (
        "qwen3_coder",
        "Now:\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\n York\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>",
        [
            C("Now:\n"),
            *call(0, "get_weather", '{"city": "New\\n York", "days": 3, "exact": true}'),
            *call(1, "add", "{}"),
        ],
    ),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=days>three</parameter><parameter=wind>null</parameter>"
        '<parameter=extra>{"a": [1]}</parameter><parameter=other>7</parameter></function>!',
        [
            *call(
                0,
                "get_weather",
                '{"days": "three", "wind": null, "extra": {"a": [1]}, "other": "7"}',
            ),
            C("!"),
        ],
    ),
    (
        "qwen3_coder",
        "<function=get_weather>\n<parameter=city>\nA\n<parameter=days>\n1\n</function>",
        call(0, "get_weather", '{"city": "A", "days": 1}'),
    ),
    (
        "qwen3_coder",
        '<function=f>\n<parameter=q>\n\n"</p>\n\n</parameter></tool_call>',
        call(0, "f", json.dumps({"q": '\n"</p>\n'})),
    ),
    (
        "qwen3_coder",
        "<function=f>\n<parameter=q>\nClose </parameter> with\n </parameter>é\n</parameter>\n"
        "<parameter=r></parameter>x</parameter> <parameter=s>1</parameter>\n</function>",
        [
            *call(
                0,
                "f",
                json.dumps(
                    {
                        "q": "Close </parameter> with\n </parameter>é",
                        "r": "</parameter>x",
                        "s": "1",
                    },
                    ensure_ascii=False,
                ),
            ),
        ],
    ),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=city>Par</parameter> ",
        call(0, "get_weather", '{"city": "Par"', False),
    ),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=city>Par",
        call(0, "get_weather", '{"city": "Par', False),
    ),
    (
        "qwen3_coder",
        '<function=get_weather><parameter=extra>{"a',
        call(0, "get_weather", '{"extra": {"a', False),
    ),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=days>NaN</parameter></function>",
        call(0, "get_weather", '{"days": "NaN"}'),
    ),
    (
        "qwen3_coder",
        "<function=f> stray <b> <parameter=a>1</parameter></function>",
        [
            CallStart(0, "f"),
            C("stray <b> "),
            CallArguments(0, '{"a": "1"}'),
            CallEnd(0),
        ],
    ),
    # llama3
    (
        "llama3",
        '{"name": "add", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": {}}',
        [*call(0, "add", '{"a": 1}'), *call(1, "get_weather", "{}")],
    ),
    (
        "llama3",
        '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": "é"}}',
        call(0, "add", '{"a": "é"}'),
    ),
    (
        "llama3",
        'Hm. <|python_tag|>\n{"name": "add", "arguments": {}} ok',
        [C("Hm. "), *call(0, "add", "{}"), C(" ok")],
    ),
    # pythonic
    (
        "pythonic",
        "[get_weather(city='Zürich', days=-3), add(a=[1.5, {'k': (None, true)}])]",
        [
            *call(0, "get_weather", '{"city": "Zürich", "days": -3}'),
            *call(1, "add", '{"a": [1.5, {"k": [null, true]}]}'),
        ],
    ),
    (
        "pythonic",
        "<|python_start|>[add(a=')]')]<|python_end|>\nok",
        [*call(0, "add", '{"a": ")]"}'), C("\nok")],
    ),
    ("pythonic", "[add(a=1), add(b)]", [*call(0, "add", '{"a": 1}'), C(", add(b)]")]),
    (
        "pythonic",
        "[add(a='\\\\'), add()]",
        [*call(0, "add", '{"a": "\\\\"}'), *call(1, "add", "{}")],
    ),
    # mistral
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]',
        [*call(0, "add", '{"a": 1}'), *call(1, "f", "{}")],
    ),
    (
        "mistral",
        'Ok[TOOL_CALLS]add{"a": 1}[TOOL_CALLS]get-weather[CALL_ID]abc123DEF[ARGS]{"b": "]"}',
        [C("Ok"), *call(0, "add", '{"a": 1}'), *call(1, "get-weather", '{"b": "]"}')],
    ),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": ', call(0, "add", '{"a": ', False)),
    # gpt-oss
    (
        "gpt-oss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
        '<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.add '
        '<|constrain|>json<|message|>{"a": 1}<|call|>',
        [R("Hm."), C("I look."), *call(0, "add", '{"a": 1}')],
    ),
    (
        "gpt-oss",
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B",
        [R("A"), C("B")],
    ),
    (
        "gpt-oss",
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1}',
        call(0, "add", '{"a": 1}'),
    ),
    (
        "gpt-oss",
        '<|channel|>commentary to=functions.add<|message|>{"a": ',
        call(0, "add", '{"a": ', False),
    ),
    ("gpt-oss", "plain text", [C("plain text")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), GOLDENS)
def test_golden(name, text, expected):
    assert events_of(name, text) == expected


NO_CALLS = {
    "qwen25": [
        "<tool_call>",
        "<tool_call>\n",
        "a <tool_call>{} b",
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", arguments: {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": }</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "f", ',
        "</tool_call>",
        "<tool_call",
    ],
    "qwen3_coder": [
        "<tool_call>\n",
        "<tool_call>\n <func",
        '<tool_call>{"name": "f"}</tool_call>',
        "<function=",
        "<function=>",
        "<function=a\n>",
        "<function=" + "a" * 600 + ">",
        "<parameter=a>1</parameter>",
    ],
    "llama3": [
        '{"name": "Paris", "parameters": {}}',
        '{"name": "add"}',
        '{"name": "add", "parameters": ',
        '{"answer": {"name": "add", "parameters": {}}}',
        'See {"name": "add", "parameters": {}}',
        "<|python_tag|>print(1)",
        "<|python_tag|>",
        "; {}",
    ],
    "pythonic": [
        "[]",
        "[1, 2]",
        "[add]",
        "[add(1)]",
        "[add(a=b)]",
        "[add(a=1+1)]",
        "[add(a=1, a=2)]",
        "[add(**{})]",
        "[add(a=f'x')]",
        "[add(a=1e999)]",
        "[add(a=__import__('os'))]",
        "[unknown(a=1)]",
        "[add(a=1",
        "x [add(a=1)]",
        "[add(a=" + "[" * 300 + "]" * 300 + ")]",
        "<|python_start|>hm",
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS] []",
        "[TOOL_CALLS] [{}]",
        "[TOOL_CALLS]two words {}",
        "[TOOL_CALLS]" + "a" * 600 + "{}",
        "[TOOL_",
    ],
    "gpt-oss": ["<|channel|>final", "<|mess", "<|channel|>" + "a" * 2000 + "<|message|>x"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in NO_CALLS.items() for text in texts]
)
def test_what_is_no_call_comes_out_as_it_was(name, text):
    text = f"{text} 完\n" if not text.endswith(("<tool_call", "[TOOL_", "<|mess")) else text
    assert events_of(name, text) == [C(text)]
