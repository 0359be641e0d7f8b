"""The shapes of answers, for ``/openapi.json``. Answers are written as bytes (openai_response.py)
and never pass through these; that they have these shapes is tested.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from minisgl_fast.api.body import doc

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class PromptTokens(msgspec.Struct):
    cached_tokens: Annotated[int, doc("Of the prompt, taken from the prefix cache.")]


class CompletionTokens(msgspec.Struct):
    reasoning_tokens: int


class UsageAnswer(msgspec.Struct, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens | msgspec.UnsetType = msgspec.UNSET


class FunctionAnswer(msgspec.Struct):
    name: str
    arguments: Annotated[str, doc("JSON, as the model wrote it.")]


class ToolCallAnswer(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: FunctionAnswer


class MessageAnswer(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallAnswer] | msgspec.UnsetType = msgspec.UNSET


class ChoiceFields(msgspec.Struct, kw_only=True):
    index: int
    finish_reason: FinishReason
    matched_stop: Annotated[
        str | int | None, doc("The stop string, pattern or token that ended the text.")
    ]
    stop_reason: Annotated[
        str | int | None, doc("The same, by vLLM's name; null where the model ended by itself.")
    ]
    logprobs: dict[str, Any] | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(ChoiceFields, kw_only=True):
    message: MessageAnswer


class TextChoice(ChoiceFields, kw_only=True):
    text: str
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class CompletionFields(msgspec.Struct, kw_only=True):
    id: str
    created: Annotated[int, doc("Unix time in seconds.")]
    model: str
    usage: UsageAnswer
    service_tier: Literal["default"] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(CompletionFields, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextCompletion(CompletionFields, kw_only=True):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[ModelCard]


class State(msgspec.Struct):
    state: str
    stage: str | msgspec.UnsetType = msgspec.UNSET
    progress: float | msgspec.UnsetType = msgspec.UNSET


class Status(msgspec.Struct):
    status: Literal["ok"]


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: Annotated[str | None, doc("The field at fault.")]
    code: str | None


class ErrorAnswer(msgspec.Struct):
    """The detail stands under ``error`` and, as SGLang has it, at the top too."""

    error: ErrorDetail
    object: Literal["error"]
    message: str
    type: str
    param: str | None
    code: Annotated[int | str | None, doc("The HTTP status.")]
    request_id: str


class AnthropicDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct):
    type: Literal["error"]
    error: AnthropicDetail
    request_id: str


class OllamaError(msgspec.Struct):
    error: str
