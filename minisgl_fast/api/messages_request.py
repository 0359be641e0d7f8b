"""Bodies of Anthropic's ``/v1/messages``: checked, then translated into a chat request.

Rules: what the model cannot have (images, server tools) is refused by name. A tool's result is a
message of role ``tool`` with the name of the tool, thinking of earlier turns is the message's
``reasoning_content``, and a last message of the assistant is continued. ``thinking`` turns a
model's reasoning on or off where its template can; its budget is a limit where a token ends the
model's reasoning, and only checked elsewhere. ``cache_control``, ``metadata`` and ``service_tier``
ask for nothing here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from minisgl_fast.api.body import Body, doc
from minisgl_fast.errors import RequestError

MIN_THINKING_BUDGET = 1024
REFUSED = ("container", "context_management", "fallbacks", "mcp_servers")
_IGNORED_BLOCKS = ("redacted_thinking",)


class Block(msgspec.Struct):
    """A block of a message's content: text, thinking, tool_use or tool_result."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class Turn(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(msgspec.Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """The body of ``/v1/messages/count_tokens``."""

    model: Annotated[str, doc("The served model's name, or `default`.")]
    messages: Annotated[
        list[Turn],
        doc(
            "Blocks of text, thinking, tool_use and tool_result. "
            "A last message of the assistant is continued."
        ),
    ]
    system: Annotated[
        str | list[Block] | None, doc("A system message: a text, or text blocks.")
    ] = None
    tools: Annotated[
        list[ToolDefinition] | None, doc("Tools with an input_schema; Anthropic's own are refused.")
    ] = None
    tool_choice: Annotated[
        ToolChoice | None,
        doc("auto, any, tool or none; `disable_parallel_tool_use`: one call at most."),
    ] = None
    thinking: Annotated[
        Thinking | None,
        doc(
            "Turns the reasoning on or off where the template can. `budget_tokens` ends a "
            "reasoning that a single token ends; of other models it is only checked."
        ),
    ] = None
    output_config: Annotated[
        OutputConfig | None,
        doc("`effort`, as `reasoning_effort` of a chat; `format`: a json_schema."),
    ] = None
    output_format: Annotated[OutputFormat | None, doc("The same as `output_config.format`.")] = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Annotated[
        int, doc("Most tokens to generate; what the context leaves, if that is less.")
    ]
    stop_sequences: Annotated[list[str] | None, doc("Texts that end the answer.")] = None
    stream: Annotated[bool | None, doc("Send events as they come.")] = None
    temperature: Annotated[float | None, doc("0 always takes the likeliest token.")] = None
    top_k: Annotated[int | None, doc("Sample from so many of the likeliest.")] = None
    top_p: Annotated[float | None, doc("Sample from the likeliest tokens of this mass.")] = None


def check_messages(request: CountRequest, fields: Body) -> None:
    """RequestError for what the types alone do not say."""
    for name in REFUSED:
        if fields.get(name):
            raise RequestError(f"This server does not support {name}.", param=name)
    if not request.messages:
        raise RequestError("messages must hold at least one message.", param="messages")
    thinking = request.thinking
    if thinking is not None and thinking.type == "enabled":
        name = "thinking.budget_tokens"
        limit = request.max_tokens if isinstance(request, MessagesRequest) else None
        if thinking.budget_tokens is None:
            raise RequestError(f"Missing required field: {name}.", param=name)
        if thinking.budget_tokens < MIN_THINKING_BUDGET:
            raise RequestError(f"{name} must be at least {MIN_THINKING_BUDGET}.", param=name)
        if limit is not None and thinking.budget_tokens >= limit:
            raise RequestError(f"{name} must be less than max_tokens.", param=name)


def chat_fields(request: CountRequest, *, bounds_thinking: bool = False) -> Body:
    """The body of the chat request that asks for the same. ``bounds_thinking``: the model can
    keep a budget of its reasoning."""
    fields: Body = {"model": request.model, "messages": _messages(request)}
    if isinstance(request, MessagesRequest):
        fields |= {
            "max_tokens": request.max_tokens,
            "stop": request.stop_sequences,
            "stream": request.stream,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
        }
    last = fields["messages"][-1]
    if last["role"] == "assistant" and "tool_calls" not in last:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.tools:
        fields["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(request.tools)]
    choice = request.tool_choice
    if choice is not None:
        fields["tool_choice"] = _tool_choice(choice)
        fields["parallel_tool_calls"] = choice.disable_parallel_tool_use is not True
    if request.thinking is not None and request.thinking.type != "adaptive":
        fields["reasoning"] = {"enabled": request.thinking.type == "enabled"}
        if bounds_thinking and request.thinking.type == "enabled":
            fields["thinking_token_budget"] = request.thinking.budget_tokens
    config = request.output_config
    if config is not None and config.effort is not None:
        fields["reasoning_effort"] = config.effort
    output_format = request.output_format or (config and config.format)
    if output_format:
        schema = {"name": "output", "schema": output_format.schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _messages(request: CountRequest) -> list[Body]:
    messages: list[Body] = []
    if request.system:
        messages.append({"role": "system", "content": _text("system", request.system)})
    tool_names: dict[str, str | None] = {}
    for i, turn in enumerate(request.messages):
        where = f"messages[{i}].content"
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        elif turn.role == "assistant":
            messages.append(_assistant(where, turn.content))
            tool_names |= {b.id: b.name for b in turn.content if b.id is not None}
        else:
            messages += _user(where, turn.role, turn.content, tool_names)
    return messages


def _assistant(where: str, blocks: list[Block]) -> Body:
    texts, thoughts, calls = [], [], []
    for j, block in enumerate(blocks):
        if block.type == "text":
            texts.append(_required(f"{where}[{j}].text", block.text))
        elif block.type == "thinking":
            thoughts.append(_required(f"{where}[{j}].thinking", block.thinking))
        elif block.type == "tool_use":
            function = {
                "name": _required(f"{where}[{j}].name", block.name),
                "arguments": block.input or {},
            }
            call_id = _required(f"{where}[{j}].id", block.id)
            calls.append({"id": call_id, "type": "function", "function": function})
        elif block.type not in _IGNORED_BLOCKS:
            raise _unknown_block(f"{where}[{j}]", block)
    message: Body = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(
    where: str, role: str, blocks: list[Block], tool_names: dict[str, str | None]
) -> list[Body]:
    """The results of tools as messages of their own; text between them is one message."""
    messages: list[Body] = []
    for j, block in enumerate(blocks):
        if block.type == "text":
            part = {"type": "text", "text": _required(f"{where}[{j}].text", block.text)}
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"].append(part)
            else:
                messages.append({"role": role, "content": [part]})
        elif block.type == "tool_result" and role == "user":
            call_id = _required(f"{where}[{j}].tool_use_id", block.tool_use_id)
            message: Body = {
                "role": "tool",
                "tool_call_id": call_id,
                "content": _text(f"{where}[{j}].content", block.content or ""),
            }
            name = tool_names.get(call_id)
            if name is not None:
                message["name"] = name
            messages.append(message)
        else:
            raise _unknown_block(f"{where}[{j}]", block)
    return messages or [{"role": role, "content": ""}]


def _text(where: str, content: str | list[Block]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, block in enumerate(content):
        if block.type != "text":
            raise _unknown_block(f"{where}[{i}]", block)
        texts.append(_required(f"{where}[{i}].text", block.text))
    return "".join(texts)


def _required(where: str, value: str | None) -> str:
    if value is None:
        raise RequestError(f"Missing required field: {where}.", param=where)
    return value


def _unknown_block(where: str, block: Block) -> RequestError:
    where += ".type"
    return RequestError(f"{where}: {block.type[:40]!r} is not supported here.", param=where)


def _tool(where: str, tool: ToolDefinition) -> Body:
    if tool.type not in (None, "custom"):
        where += ".type"
        raise RequestError(
            f"{where}: {tool.type[:40]!r} is not supported, only custom.", param=where
        )
    if tool.input_schema is None:
        where += ".input_schema"
        raise RequestError(f"Missing required field: {where}.", param=where)
    function: Body = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> str | Body:
    if choice.type == "tool":
        name = _required("tool_choice.name", choice.name)
        return {"type": "function", "function": {"name": name}}
    return "required" if choice.type == "any" else choice.type
