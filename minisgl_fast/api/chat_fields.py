"""The chat fields about tools and reasoning: what they may be, and what the template gets of them.

Rules: a tool is a function with a name; what a client offers reaches the template as it came.
``tool_choice`` none hides the tools from the model, allowed_tools those that it does not name;
required, or the name of a function, binds it (chat_grammar.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from minisgl_fast.errors import RequestError

MAX_TOOLS = 512
MAX_TOOL_NAME = 256
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max")


class Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: str
    function: Function | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct):
    """A call of an earlier turn, in an assistant's message."""

    function: CalledFunction
    id: str | None = None
    type: str | None = None


class ReasoningOptions(msgspec.Struct):
    """``reasoning``, the form of ``reasoning_effort`` that OpenRouter has."""

    effort: str | float | None = None
    enabled: bool | None = None


class _Tools(msgspec.Struct):
    tools: list[Tool]


def check_tools(tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None) -> None:
    """RequestError if a tool, or ``tool_choice``, is malformed or cannot be honoured.

    msgspec.ValidationError if a field of a tool has the wrong type.
    """
    names = set()
    if tools is not None:
        if len(tools) > MAX_TOOLS:
            raise RequestError(
                f"tools must hold at most {MAX_TOOLS} tools, got {len(tools)}.", param="tools"
            )
        for i, tool in enumerate(msgspec.convert({"tools": tools}, _Tools).tools):
            where = f"tools[{i}]"
            if tool.type != "function":
                raise RequestError(
                    f"{where}.type: {tool.type[:40]!r} is not supported, only function.",
                    param=f"{where}.type",
                )
            if tool.function is None:
                where += ".function"
                raise RequestError(f"Missing required field: {where}.", param=where)
            if not 1 <= len(tool.function.name) <= MAX_TOOL_NAME:
                where += ".function.name"
                raise RequestError(
                    f"{where} must have 1 to {MAX_TOOL_NAME} characters.", param=where
                )
            names.add(tool.function.name)
    if choice not in (None, "none", "auto"):
        _check_choice(choice, names)


def allowed_tools(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None
) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    """Tools and choice, checked ones, where a choice of allowed_tools has left its tools alone."""
    if not isinstance(choice, dict) or choice["type"] != "allowed_tools":
        return tools, choice
    allowed = choice["allowed_tools"]
    names = {tool["function"]["name"] for tool in allowed["tools"]}
    return [tool for tool in tools or () if tool["function"]["name"] in names], allowed["mode"]


def bound_tools(
    tools: list[dict[str, Any]], choice: str | dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Those of which an answer must call one; empty if it need not call any. A checked choice."""
    if choice == "required":
        return tools
    if not isinstance(choice, dict):
        return []
    name = choice["function"]["name"]
    return [tool for tool in tools if tool["function"]["name"] == name][:1]


def _check_choice(choice: str | dict[str, Any], names: set[str]) -> None:
    """A choice that binds the model."""
    param = "tool_choice"
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and kind == "function":
        _check_name(choice, names, "tool_choice.function.name", param)
    elif isinstance(choice, dict) and kind == "allowed_tools":
        _check_allowed(choice.get("allowed_tools"), names)
    elif choice != "required":
        raise RequestError(
            "tool_choice must be none, auto, required, or an object of type function or "
            "allowed_tools.",
            param=param,
        )
    elif not names:
        raise RequestError("tool_choice required needs tools.", param=param)


def _check_allowed(allowed: object, names: set[str]) -> None:
    where = "tool_choice.allowed_tools"
    if not isinstance(allowed, dict):
        raise RequestError(f"Missing required field: {where}.", param=where)
    if allowed.get("mode") not in ("auto", "required"):
        raise RequestError(f"{where}.mode must be auto or required.", param=f"{where}.mode")
    tools = allowed.get("tools")
    where += ".tools"
    if not isinstance(tools, list) or not tools:
        raise RequestError(f"{where} must be a list of tools, and not empty.", param=where)
    for tool in tools:
        _check_name(tool, names, f"{where}[].function.name", where)


def _check_name(tool: object, names: set[str], where: str, param: str) -> None:
    """That ``tool`` names a function of ``names``; it misses ``where``, or is at fault by
    ``param``."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(f"Missing required field: {where}.", param=where.replace("[]", ""))
    if name not in names:
        raise RequestError(f"Tool {name[:200]!r} not found in tools list.", param=param)


def template_kwargs(
    given: Mapping[str, Any] | None,
    effort: str | float | None,
    reasoning: ReasoningOptions | None,
) -> dict[str, Any]:
    """The template's variables: the client's own, then what the effort means for templates.

    Effort none turns thinking off, by both names that templates have for it; any other is the
    variable ``reasoning_effort``, for templates that know one.
    """
    param = "reasoning_effort"
    thinks = None
    if reasoning is not None:
        thinks = reasoning.enabled
        if effort is None and reasoning.effort is not None:
            effort, param = reasoning.effort, "reasoning.effort"
    kwargs = dict(given or {})
    if effort == "none":
        thinks = False
    elif effort is not None:
        _check_effort(effort, param)
        kwargs.setdefault("reasoning_effort", effort)
    if thinks is not None:
        kwargs.setdefault("enable_thinking", thinks)
        kwargs.setdefault("thinking", thinks)
    return kwargs


def _check_effort(effort: str | float, param: str) -> None:
    known = effort in REASONING_EFFORTS if isinstance(effort, str) else 0 <= effort <= 0.99
    if not known:
        raise RequestError(
            f"{param} must be one of {', '.join(REASONING_EFFORTS)}, or a number in [0, 0.99].",
            param=param,
        )
