"""Bodies of OpenAI's ``/v1/responses``: checked, then translated into a chat request.

Rules: nothing is stored, so what would need an earlier response is refused, and the answer says
``store`` false. Neighbouring items that one turn of the assistant wrote (reasoning, a message,
calls) become one message. Tools are functions; whatever else a model cannot have here is refused
by name. ``metadata``, ``user``, ``service_tier``, ``prompt_cache_key`` and what ``include`` names
of tools that are not there ask for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from minisgl_fast.api.body import Body, doc
from minisgl_fast.api.logprobs import MAX_TOP_LOGPROBS
from minisgl_fast.errors import RequestError

# By name, with what asks for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "prompt": (None,),
    "truncation": (None, "disabled"),
}
_STATEFUL = ("previous_response_id", "conversation")
# Fields of a chat request that mean here what they mean there.
_COMMON = (
    "model", "temperature", "top_p", "parallel_tool_calls", "stream", "user", "top_k", "min_p",
    "seed", "stop", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "chat_template_kwargs", "cache_salt", "priority",
)  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text")


class Part(msgspec.Struct):
    """A part of an item's content, output or summary."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct):
    """A message, function_call, function_call_output or reasoning."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None


class Tool(msgspec.Struct):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct):
    format: TextFormat | None = None


class ReasoningConfig(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    model: Annotated[str | None, doc("The served model's name, or `default`.")] = None
    input: Annotated[
        str | list[Item],
        doc(
            "A user's text, or items: messages of text, function_call, "
            "function_call_output, reasoning."
        ),
    ]
    instructions: Annotated[str | None, doc("A system message before the input.")] = None
    max_output_tokens: Annotated[
        int | None,
        doc("Most tokens to generate, reasoning included (default: what the context leaves)."),
    ] = None
    temperature: Annotated[float | None, doc("0 always takes the likeliest token.")] = None
    top_p: Annotated[float | None, doc("Sample from the likeliest tokens of this mass.")] = None
    tools: Annotated[list[Tool] | None, doc("Functions; other types are refused.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        doc("`none`, `auto`, `required`, a function, or `allowed_tools`."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, doc("False: one call at most.")] = None
    text: Annotated[TextConfig | None, doc("`format`: text, json_object or json_schema.")] = None
    reasoning: Annotated[
        ReasoningConfig | None, doc("`effort`, as `reasoning_effort` of a chat.")
    ] = None
    stream: Annotated[bool | None, doc("Send events as they come.")] = None
    store: Annotated[bool | None, doc("Nothing is stored: the answer says false.")] = None
    include: Annotated[
        list[str] | None,
        doc(
            "Names of what to add: `message.output_text.logprobs`, the log-probability of every "
            "token of a message. Reasoning is there in any case."
        ),
    ] = None
    top_logprobs: Annotated[
        int | None,
        doc(
            "List so many of the likeliest tokens too; more than 0 asks for log-probabilities "
            "by itself.",
            minimum=0,
            maximum=MAX_TOP_LOGPROBS,
        ),
    ] = None
    previous_response_id: Annotated[str | None, doc("Refused: nothing is stored.")] = None
    truncation: Annotated[str | None, doc("`disabled`; auto is refused.")] = None
    metadata: Annotated[dict[str, Any] | None, doc("Comes back as it is.")] = None
    user: Annotated[str | None, doc("Comes back as it is.")] = None
    top_k: Annotated[int | None, doc("As in a chat.")] = None
    min_p: Annotated[float | None, doc("As in a chat.")] = None
    seed: Annotated[int | None, doc("As in a chat.")] = None
    stop: Annotated[str | list[str] | None, doc("As in a chat.")] = None
    presence_penalty: Annotated[float | None, doc("As in a chat.")] = None
    frequency_penalty: Annotated[float | None, doc("As in a chat.")] = None
    repetition_penalty: Annotated[float | None, doc("As in a chat.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, doc("As in a chat.")] = None
    cache_salt: Annotated[str | None, doc("As in a chat.")] = None
    priority: Annotated[int | None, doc("As in a chat.")] = None


def chat_fields(request: ResponsesRequest, given: Body) -> Body:
    """The body of the chat request that asks for the same. ``given``: the body as it came."""
    _check(request, given)
    fields: Body = {name: given[name] for name in _COMMON if given.get(name) is not None}
    fields["messages"] = _messages(request)
    if _LOGPROBS in (request.include or ()) or request.top_logprobs:
        fields["logprobs"] = True
        fields["top_logprobs"] = request.top_logprobs
    if request.max_output_tokens is not None:
        fields["max_tokens"] = request.max_output_tokens
    if request.reasoning is not None and request.reasoning.effort is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if request.tools:
        fields["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(request.tools)]
    choice = request.tool_choice
    if isinstance(choice, dict):
        if choice.get("type") == "function":
            choice = _named(choice)
        elif choice.get("type") == "allowed_tools":
            tools = choice.get("tools")
            allowed = [_named(tool) for tool in tools] if isinstance(tools, list) else None
            choice = {
                "type": "allowed_tools",
                "allowed_tools": {"mode": choice.get("mode"), "tools": allowed},
            }
    if choice is not None:
        fields["tool_choice"] = choice
    form = request.text.format if request.text is not None else None
    if form is not None and form.type == "json_schema":
        if form.schema is None:
            where = "text.format.schema"
            raise RequestError(f"Missing required field: {where}.", param=where)
        schema = {"name": form.name or "output", "schema": form.schema, "strict": form.strict}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form is not None and form.type == "json_object":
        fields["response_format"] = {"type": "json_object"}
    return fields


def _check(request: ResponsesRequest, given: Body) -> None:
    for name in _STATEFUL:
        if given.get(name) is not None:
            raise RequestError(
                f"{name}: this server stores no responses. Send the conversation as input.",
                param=name,
            )
    for name, harmless in _REFUSED.items():
        if given.get(name) not in harmless:
            raise RequestError(f"This server does not support {name} here.", param=name)


def _messages(request: ResponsesRequest) -> list[Body]:
    messages: list[Body] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    if not request.input:
        raise RequestError("input must not be empty.", param="input")
    names: dict[str, str] = {}  # of functions, by call_id
    for i, item in enumerate(request.input):
        where = f"input[{i}]"
        if item.type in (None, "message"):
            _add_message(where, item, messages)
        elif item.type == "reasoning":
            texts = [part.text or "" for part in _parts(item.content) or item.summary or ()]
            messages.append(
                {"role": "assistant", "content": "", "reasoning_content": "\n\n".join(texts)}
            )
        elif item.type == "function_call":
            call_id = _required(f"{where}.call_id", item.call_id)
            names[call_id] = _required(f"{where}.name", item.name)
            function = {"name": item.name, "arguments": item.arguments or "{}"}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": call_id, "type": "function", "function": function})
        elif item.type == "function_call_output":
            call_id = _required(f"{where}.call_id", item.call_id)
            output = _text(f"{where}.output", item.output)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            if call_id in names:
                messages[-1]["name"] = names[call_id]
        else:
            raise _unsupported(f"{where}.type", item.type or "")
    return messages


def _add_message(where: str, item: Item, messages: list[Body]) -> None:
    role = _required(f"{where}.role", item.role)
    content = _text(f"{where}.content", item.content)
    last = messages[-1] if messages else {}
    is_reasoning = last.get("reasoning_content") and not last["content"]
    if role == "assistant" and is_reasoning and "tool_calls" not in last:
        last["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _parts(content: str | list[Part] | None) -> list[Part]:
    return content if isinstance(content, list) else []


def _text(where: str, content: str | list[Part] | None) -> str:
    if content is None:
        raise RequestError(f"Missing required field: {where}.", param=where)
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        if part.type == "refusal":
            texts.append(_required(f"{where}[{i}].refusal", part.refusal))
        elif part.type in _TEXT_PARTS:
            texts.append(_required(f"{where}[{i}].text", part.text))
        else:
            raise _unsupported(f"{where}[{i}].type", part.type)
    return "".join(texts)


def _tool(where: str, tool: Tool) -> Body:
    if tool.type != "function":
        raise _unsupported(f"{where}.type", tool.type)
    function: Body = {
        "name": _required(f"{where}.name", tool.name),
        "parameters": tool.parameters or {},
    }
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _named(choice: object) -> Body:
    """A function as a chat request names it."""
    name = choice.get("name") if isinstance(choice, dict) else None
    return {"type": "function", "function": {"name": name}}


def _required(where: str, value: str | None) -> str:
    if value is None:
        raise RequestError(f"Missing required field: {where}.", param=where)
    return value


def _unsupported(where: str, value: str) -> RequestError:
    return RequestError(f"{where}: {value[:40]!r} is not supported here.", param=where)
