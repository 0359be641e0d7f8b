"""Golden events of every format: what is markup, what is text, what a broken call becomes."""

import json

import pytest
from parser_cases import FORMATS, TOOLS, make, run

from minisgl_fast.parsers.events import (
    PLAIN,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Reasoning,
    Steady,
    join,
)
from minisgl_fast.parsers.select import Formats


def events_of(name, text, **options):
    return join(run(make(name, **options), [text]))


def call(index, name, arguments, complete=True):
    events = [CallStart(index, name), CallArguments(index, arguments)]
    return [*events, CallEnd(index)] if complete else events


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


def test_reasoning_in_one_piece_comes_with_its_end():
    parser = make("qwen3", stream_reasoning=False)
    assert run(parser, ["<think>a", "b", "</think>", "c"]) == [R("ab"), C("c")]
    parser = make("qwen3", stream_reasoning=False)
    assert parser.feed("<think>abc") == []
    assert parser.finish() == [R("abc")]
    parser = make("gpt-oss", stream_reasoning=False)
    text = "<|channel|>analysis<|message|>ab<|end|><|start|>assistant<|channel|>final<|message|>c"
    assert [e for e in run(parser, text) if isinstance(e, Reasoning)] == [R("ab")]


def test_reasoning_that_is_not_separated_stays_in_the_text():
    assert make("qwen3", separate_reasoning=False) is None
    text = "<think>a</think>b"
    assert events_of("qwen3 + qwen25", text, separate_reasoning=False) == [C(text)]
    text = "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B"
    assert events_of("gpt-oss", text, separate_reasoning=False) == [C("AB")]


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_thinking_that_the_prompt_ended_is_off(name):
    formats = Formats(*FORMATS[name][:2]) if name else Formats(None, None)
    if formats.reasoning in ("qwen3", "deepseek-r1"):
        assert formats.parser("x<think>\n\n</think>\n\n") is None
    elif formats.reasoning == "kimi":
        assert formats.parser("x◁think▷◁/think▷") is None
    elif formats.reasoning is None:
        assert formats.parser("x") is None


def test_without_tools_a_call_is_text():
    text = '<think>a <tool_call></think><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = Formats("qwen3", "qwen25").parser("")
    assert join(run(parser, text)) == [R("a <tool_call>"), C(text[text.index("</think>") + 8 :])]
    parser = Formats("gpt-oss", "gpt-oss").parser("")
    assert join(run(parser, "<|channel|>commentary to=functions.f<|message|>{}")) == [C("{}")]


def test_a_parser_is_plain_once_only_content_can_follow():
    parser = make("qwen3")
    assert parser.steady is None
    parser.feed("<think>a")
    assert parser.steady == Steady(Reasoning, "<")
    parser.feed("</think>")
    assert parser.steady == PLAIN
    parser = make("qwen3")
    parser.feed("Hi")
    assert parser.steady == PLAIN
    parser = make("qwen3 + qwen25")
    parser.feed("Hi")
    assert parser.steady == Steady(Content, "<")
    parser = make("pythonic")
    parser.feed("[add()] Done")
    assert parser.steady == PLAIN


def test_arguments_go_out_as_they_come():
    parser = make("qwen25")
    pieces = ['<tool_call>{"name": "f"', ', "arguments": {"a', '": 1', "}}", "</tool_call>"]
    assert [parser.feed(piece) for piece in pieces] == [
        [],
        [CallStart(0, "f"), CallArguments(0, '{"a')],
        [CallArguments(0, '": 1')],
        [CallArguments(0, "}"), CallEnd(0)],
        [],
    ]
    parser = make("qwen3_coder")
    parser.feed("<function=get_weather><parameter=city>")
    assert parser.feed("New ") == [CallArguments(0, "New ")]
    assert parser.feed("York<") == [CallArguments(0, "York")]


TEMPLATES = {
    "{{ '<tool_call>' }} {% for tool in tools %} </think>": ("qwen3", "qwen25"),
    "<tool_call> <function= <parameter= tools </think>": ("qwen3", "qwen3_coder"),
    "<｜Assistant｜><think> </think>": ("deepseek-r1", None),
    "◁think▷◁/think▷": ("kimi", None),
    "[TOOL_CALLS] tools": (None, "mistral"),
    '<|python_tag|> {"name": function name, "parameters": dictionary} tools': (None, "llama3"),
    "<|python_start|> tools": (None, "pythonic"),
    "<|start|><|channel|>analysis functions.": ("gpt-oss", "gpt-oss"),
    "<|im_start|>{{ message.content }}": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_auto_finds_the_formats_in_the_template(template):
    reasoning, tools = TEMPLATES[template]
    assert Formats.choose("auto", "auto", template) == Formats(reasoning, tools)
    assert Formats.choose("none", "none", template) == Formats(None, None)
    assert Formats.choose("qwen3", "llama3", template) == Formats("qwen3", "llama3")


def test_tools_without_a_schema_are_tools():
    parser = Formats(None, "qwen3_coder").parser("", TOOLS)
    text = "<function=add><parameter=a>\n1\n</parameter></function>"
    assert join(run(parser, text)) == call(0, "add", '{"a": "1"}')


@pytest.mark.parametrize("reasoning", [None, "qwen3", "deepseek-r1", "kimi", "gpt-oss"])
@pytest.mark.parametrize("tools", [None, "qwen25", "gpt-oss"])
@pytest.mark.parametrize(
    "prompt", ["", "x", "<think>\n", "x</think>\n\n", "◁think▷", "◁/think▷ ", "</think>x"]
)
def test_a_whole_answer_without_watched_bytes_is_its_content(reasoning, tools, prompt):
    formats = Formats(reasoning, tools)
    watched = formats.watched(prompt)
    parser = formats.parser(prompt)
    assert (watched is None) == (parser is None)
    if watched:
        for text in ("", " \n", "plain", " a > b", "think>"):
            parser = formats.parser(prompt)
            assert watched not in text.encode()
            assert join(parser.feed(text) + parser.finish()) == ([Content(text)] if text else [])
