"""Request bodies of the generation routes: JSON in, checked structs out.

Rules: body.py's; a field of the public API that this server does not act upon is refused by name
when it asks for something (never silence). Nothing here knows the model: its limits are checked
in pipeline.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from minisgl_fast.api.body import Body, check_fields, parse_body, parse_json, type_error
from minisgl_fast.api.chat_fields import (
    ReasoningOptions,
    ToolCall,
    check_tools,
    template_kwargs,
)
from minisgl_fast.api.refused import check_refused, unsupported
from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.errors import RequestError

MAX_MESSAGES = 4096
MAX_N = 16
MAX_PROMPTS = 1024
DEFAULT_COMPLETION_TOKENS = 16


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatRequest(SamplingFields, kw_only=True):
    """``prompt`` is Mini-SGLang's: a raw text in place of messages."""

    messages: list[Message] | None = None
    prompt: str | None = None
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: str | float | None = None
    reasoning: ReasoningOptions | None = None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model gets to see."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def template_kwargs(self) -> dict[str, Any]:
        return template_kwargs(self.chat_template_kwargs, self.reasoning_effort, self.reasoning)


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    max_completion_tokens: int | None = None
    echo: bool | None = None


class GenerateRequest(SamplingFields, kw_only=True):
    """Mini-SGLang's own route."""

    prompt: str


Prompt: TypeAlias = str | list[int]


def parse_chat(body: bytes) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """The checked request and its messages as they came, for the template."""
    return check_chat(parse_json(body))


def check_chat(fields: Body) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """The same for a body that is read already, or translated from that of another API."""
    request = check_fields(fields, ChatRequest)
    _check_common(request, fields)
    if bool(fields.get("echo")):
        raise unsupported("echo")
    try:
        check_tools(request.tools, request.tool_choice)
    except msgspec.ValidationError as error:
        raise type_error(str(error)) from None
    if request.messages is None:
        if request.prompt is None:
            raise RequestError("Missing required field: messages.", param="messages")
        if request.tools:
            raise RequestError("tools need messages, a prompt cannot have them.", param="tools")
        return request, []
    if request.prompt is not None:
        raise RequestError("Give either messages or prompt, not both.", param="prompt")
    _check_messages(request.messages)
    messages: list[dict[str, Any]] = fields["messages"]
    return request, messages


def parse_completion(body: bytes) -> tuple[CompletionRequest, list[Prompt]]:
    """The checked request and its prompts, one or more."""
    request, fields = parse_body(body, CompletionRequest)
    _check_common(request, fields)
    prompts = _prompts(request.prompt)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1 unless echo is true.", param="max_tokens")
    return request, prompts


def parse_generate(body: bytes) -> GenerateRequest:
    """The checked request of ``/generate``."""
    request, fields = parse_body(body, GenerateRequest)
    _check_common(request, fields)
    if request.num_choices != 1:
        raise RequestError("n must be 1 on this route.", param="n")
    return request


def _check_common(request: SamplingFields, fields: Body) -> None:
    check_refused(fields, is_chat=isinstance(request, ChatRequest))
    if not 1 <= request.num_choices <= MAX_N:
        raise RequestError(f"n must be in [1, {MAX_N}], got {request.n}.", param="n")
    if request.stream_options is not None and not request.stream:
        raise RequestError(
            "stream_options can only be given when stream is true.", param="stream_options"
        )


def _check_messages(messages: Sequence[Message]) -> None:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(
            f"messages must hold 1 to {MAX_MESSAGES} messages, got {len(messages)}.",
            param="messages",
        )
    for i, message in enumerate(messages):
        if isinstance(message.content, list):
            for j, part in enumerate(message.content):
                if part.type not in ("text", "refusal"):
                    where = f"messages[{i}].content[{j}].type"
                    kind = part.type[:40]
                    raise RequestError(
                        f"{where}: {kind!r} is not supported, only text.", param=where
                    )
                if part.text is None and part.refusal is None:
                    where = f"messages[{i}].content[{j}].text"
                    raise RequestError(f"Missing required field: {where}.", param=where)


def _prompts(prompt: str | list[str | int | list[int]] | None) -> list[Prompt]:
    """A string, several strings, token ids, or several lists of token ids."""
    if prompt is None:
        raise RequestError("Missing required field: prompt.", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if len(kinds) != 1:
        raise RequestError(
            "prompt must be a string, a list of strings, a list of token ids, "
            "or a list of lists of token ids, and not empty.",
            param="prompt",
        )
    if kinds == {int}:
        return [prompt]  # type: ignore[list-item]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"prompt must hold at most {MAX_PROMPTS} prompts, got {len(prompt)}.", param="prompt"
        )
    return prompt  # type: ignore[return-value]
