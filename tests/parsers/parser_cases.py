"""Formats under test, and texts made of their markup, whole and broken, in many scripts."""

import random

from minisgl_fast.parsers.events import CallArguments, CallEnd, CallStart, join
from minisgl_fast.parsers.select import Formats

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "wind": {"type": ["number", "null"]},
                    "exact": {"type": "boolean"},
                    "extra": {"anyOf": [{"type": "object"}, {"type": "array"}]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "add"}},
]

# name -> (reasoning, tools, prompt)
FORMATS = {
    "qwen3": ("qwen3", None, ""),
    "qwen3 open": ("qwen3", None, "x<think>\n"),
    "deepseek-r1": ("deepseek-r1", None, ""),
    "kimi": ("kimi", None, ""),
    "qwen25": (None, "qwen25", ""),
    "qwen3 + qwen25": ("qwen3", "qwen25", ""),
    "qwen3 open + qwen3_coder": ("qwen3", "qwen3_coder", "<think>"),
    "qwen3_coder": (None, "qwen3_coder", ""),
    "llama3": (None, "llama3", ""),
    "pythonic": (None, "pythonic", ""),
    "mistral": (None, "mistral", ""),
    "gpt-oss": ("gpt-oss", "gpt-oss", ""),
}


def make(name, **options):
    reasoning, tools, prompt = FORMATS[name]
    return Formats(reasoning, tools).parser(prompt, TOOLS, **options)


def run(parser, pieces):
    events = []
    for piece in pieces:
        events += parser.feed(piece)
    return events + parser.finish()


def events_of(name, text, **options):
    return join(run(make(name, **options), [text]))


def call(index, name, arguments, complete=True):
    events = [CallStart(index, name), CallArguments(index, arguments)]
    return [*events, CallEnd(index)] if complete else events


_WORDS = [
    "Hello", " world.", "\n", "\n\n", " ", "你好，世界", "Übergröße", "👩‍👩‍👧‍👦", "🇫🇷🥐", "ไทย",
    "e\u0301", "1 < 2", "a</b>", "{", "}", "[", "]", '"', "\\", ";", "=", "don't",
]  # fmt: skip
_JSON = [
    '{"name": "get_weather", "arguments": {"city": "Zürich 🏔", "n": [1, {"a": "}"}]}}',
    '{"name": "add", "parameters": {"a": 1, "b": "\\"<\\\\"}}',
    '{"arguments": {"城市": "北京"}, "name": "add"}',
    '{"type": "function", "name": "add", "arguments": "{\\"a\\": 1}"}',
    '{"name": "add", "arguments": null}',
    '{"name": "add"}',
    '{"name": "unknown", "arguments": {}}',
    '{"name": "add", "arguments": {"a": 1}',
    '{"name": "add", "arguments": {"a": "cut 雪',
    '{"name" "add"}',
    '{"n": 1}',
]
_THINK = ["<think>", "</think>", "<th", "</thi", "◁think▷", "◁/think▷", "◁/"]
_PARTS = {
    "qwen3": _THINK,
    "qwen25": ["<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>", "<tool", *_JSON],
    "qwen3_coder": [
        "<tool_call>\n<function=get_weather>\n",
        "<function=add>",
        "<function=bad\n",
        "<parameter=city>\nNew York 🗽\n二行\n</parameter>\n",
        "<parameter=days>\n5\n</parameter>\n",
        "<parameter=days>five</parameter>",
        "<parameter=city>\nThe </parameter> tag\n</parameter>\n",
        "<parameter=wind>None</parameter>",
        '<parameter=extra>\n{"a": [1, 2]}\n</parameter>',
        "<parameter=other>\n\nx\n\n\n</parameter>",
        "<parameter=city>\nno end\n",
        "</function>\n</tool_call>",
        "</function>",
        "</tool_call>",
        "</param",
    ],
    "llama3": ["<|python_tag|>", "<|python", "; ", *_JSON, *_JSON],
    "pythonic": [
        "[",
        "]",
        ", ",
        "get_weather(city='München 🍺', days=3)",
        'add(a=[1, {"k": (None, true)}], b=-2.5)',
        "add()",
        'add(a=")]\\"")',
        "add(1)",
        "unknown(a=1)",
        "[add(a=1), add(a='二')]",
        "<|python_start|>",
        "<|python_end|>",
        "<|python_st",
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS] [",
        "]",
        ", ",
        "[TOOL_CALLS]add[ARGS]{",
        '[TOOL_CALLS]add{"a": "日本"}',
        '[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{"a": {"b": "<"}}',
        "[TOOL_",
        *_JSON,
    ],
    "gpt-oss": [
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>",
        "<|start|>assistant to=functions.get_weather<|channel|>commentary<|message|>",
        "<|channel|>commentary<|message|>",
        "<|end|>",
        "<|call|>",
        "<|return|>",
        "<|mess",
        '{"a": "雪"}',
        "<|start|>",
    ],
}


def texts(name, number=200):
    """Seeded texts of at most 150 characters for one format."""
    generator = random.Random(name)
    parts = [part for key, parts in _PARTS.items() if key in name for part in parts]
    parts = parts or _THINK
    made = []
    for _ in range(number):
        text = ""
        for _ in range(generator.randint(1, 7)):
            text += generator.choice(parts if generator.random() < 0.6 else _WORDS)
        made.append(text[:150])
    return made
