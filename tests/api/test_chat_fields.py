"""Bodies in: the fields about tools and reasoning."""

import json

import pytest
from api_client import USER
from bodies import refused

from minisgl_fast.api.chat_fields import MAX_TOOLS
from minisgl_fast.api.openai_request import parse_chat, parse_completion, parse_generate
from minisgl_fast.errors import RequestError

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def allowed(mode, names):
    """The fields of a request that allows these tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
    return {"tools": TOOLS, "tool_choice": choice}


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", TOOLS), ("tool_choice", "required"), ("reasoning_effort", "low")],
)
@pytest.mark.parametrize("parse", [parse_completion, parse_generate])
def test_fields_of_chat_are_refused_elsewhere(parse, field, value):
    assert refused(parse, {"prompt": "Hi", field: value}).param == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [*TOOLS, {"type": "function"}]}, "tools[1].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": TOOLS * (MAX_TOOLS + 1)}, "tools"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (allowed("none", ["f"]), "tool_choice.allowed_tools.mode"),
        (allowed("auto", []), "tool_choice.allowed_tools.tools"),
        (allowed("auto", ["g"]), "tool_choice.allowed_tools.tools"),
        (allowed("auto", [5]), "tool_choice.allowed_tools.tools.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"reasoning_effort": []}, "reasoning_effort"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": "high"}, "reasoning"),
        ({"separate_reasoning": 1}, "separate_reasoning"),
        ({"stream_reasoning": "no"}, "stream_reasoning"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]},
            "messages[0].tool_calls[0].function",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
    ],
)
def test_an_error_of_tools_or_reasoning_names_the_place(fields, param):
    body = {"messages": USER, **fields}
    with pytest.raises(RequestError) as caught:
        _ = parse_chat(json.dumps(body).encode())[0].template_kwargs
    assert caught.value.param == param


def test_tools_of_a_raw_prompt_are_refused():
    assert refused(parse_chat, {"prompt": "Hi", "tools": TOOLS}).param == "tools"


def test_tool_choice_none_hides_the_tools():
    def offered(**fields):
        return parse_chat(json.dumps({"messages": USER, **fields}).encode())[0].offered_tools

    assert offered(tools=TOOLS) == offered(tools=TOOLS, tool_choice="auto") == TOOLS
    assert offered(tools=TOOLS, tool_choice="none") == offered(tools=[]) == offered() == []


OFF = {"enable_thinking": False, "thinking": False}
ON = {"enable_thinking": True, "thinking": True}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"chat_template_kwargs": {"x": 1}}, {"x": 1}),
        ({"reasoning_effort": "none"}, OFF),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": 0.5}, {"reasoning_effort": 0.5}),
        ({"reasoning": {"enabled": False}}, OFF),
        ({"reasoning": {"enabled": True}}, ON),
        ({"reasoning": {"effort": "high", "enabled": True}}, {"reasoning_effort": "high", **ON}),
        ({"reasoning": {"effort": "none"}}, OFF),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"enable_thinking": True, "thinking": False},
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            {"reasoning_effort": "high"},
        ),
    ],
)
def test_effort_becomes_variables_of_the_template(fields, expected):
    request, _ = parse_chat(json.dumps({"messages": USER, **fields}).encode())
    assert request.template_kwargs == expected
