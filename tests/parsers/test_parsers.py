"""What a parser does beside its format: options, prompts, pieces, and which format is chosen."""

import pytest
from parser_cases import FORMATS, TOOLS, call, events_of, make, run

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

R, C = Reasoning, Content


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
