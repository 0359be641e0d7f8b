"""Request bodies of the generation routes: JSON in, checked structs out.

Rules: orjson parses, msgspec checks types; unknown fields are ignored, explicit null means the
default, whole floats count as integers; a field of the public API that this server does not act
upon yet is refused by name when it asks for something (never silence). Every error is a
RequestError that names the field in ``param`` the way a client would write it:
``messages[0].content``. Nothing here knows the model: its defaults and limits are arguments.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec
import orjson

from minisgl_fast.api.chat_fields import (
    ReasoningOptions,
    ToolCall,
    check_tools,
    template_kwargs,
)
from minisgl_fast.api.refused import check_refused, unsupported
from minisgl_fast.errors import RequestError
from minisgl_fast.params import SamplingDefaults, SamplingParams

MAX_JSON_DEPTH = 64
MAX_MESSAGES = 4096
MAX_N = 16
MAX_PROMPTS = 1024
DEFAULT_COMPLETION_TOKENS = 16
# Below this a temperature is greedy: logits divided by it would leave the range of float32.
LOWEST_TEMPERATURE = 1e-5
MAX_MESSAGE_CHARACTERS = 300


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What all generation routes share."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None

    @property
    def num_choices(self) -> int:
        """Answers per prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


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
Body: TypeAlias = dict[str, Any]
Request = TypeVar("Request", bound=SamplingFields)


def parse_chat(body: bytes) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """The checked request and its messages as they came, for the template."""
    request, fields = _parse(body, ChatRequest)
    if bool(fields.get("echo")):
        raise unsupported("echo")
    try:
        check_tools(request.tools, request.tool_choice)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from None
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
    request, _ = _parse(body, CompletionRequest)
    prompts = _prompts(request.prompt)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1 unless echo is true.", param="max_tokens")
    return request, prompts


def parse_generate(body: bytes) -> GenerateRequest:
    """The checked request of ``/generate``."""
    request, _ = _parse(body, GenerateRequest)
    if request.num_choices != 1:
        raise RequestError("n must be 1 on this route.", param="n")
    return request


def sampling_params(
    request: SamplingFields, defaults: SamplingDefaults | None, max_tokens: int | None
) -> SamplingParams:
    """The parameters of every choice: the client's values, else the model's, else neutral ones."""
    temperature = _first(request.temperature, defaults and defaults.temperature, 1.0)
    if 0.0 < temperature < LOWEST_TEMPERATURE:
        temperature = 0.0
    stop = request.stop
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=temperature,
        top_p=_first(request.top_p, defaults and defaults.top_p, 1.0),
        top_k=_first(request.top_k, defaults and defaults.top_k, 0),
        min_p=_first(request.min_p, defaults and defaults.min_p, 0.0),
        seed=request.seed,
        presence_penalty=_first(request.presence_penalty, None, 0.0),
        frequency_penalty=_first(request.frequency_penalty, None, 0.0),
        repetition_penalty=_first(
            request.repetition_penalty, defaults and defaults.repetition_penalty, 1.0
        ),
        logit_bias=request.logit_bias or {},
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
    )


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """RequestError if ``logit_bias`` or ``stop_token_ids`` names an id outside the vocabulary."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if ids and max(ids) >= vocab_size:
            raise RequestError(
                f"{name} has token id {max(ids)}, but the vocabulary ends at {vocab_size - 1}.",
                param=name,
            )


def cache_salt(request: SamplingFields) -> int:
    """The number that keeps this client's cached prefixes apart; 0 is the common cache."""
    if not request.cache_salt:
        return 0
    digest = hashlib.blake2b(request.cache_salt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _parse(body: bytes, shape: type[Request]) -> tuple[Request, Body]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error.msg}.") from None
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object.")
    # A body without that many brackets cannot be nested that deep.
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH:
        _check_depth(fields)
    try:
        request = msgspec.convert(fields, shape, str_keys=True)
    except msgspec.ValidationError:
        try:
            request = msgspec.convert(_whole_floats_as_ints(fields), shape, str_keys=True)
        except msgspec.ValidationError as error:
            raise _type_error(str(error)) from None
    _check_common(request, fields)
    return request, fields


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


def _first(given: Any, default: Any, neutral: Any) -> Any:
    if given is not None:
        return given
    return neutral if default is None else default


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        deeper: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            deeper += [child for child in children if isinstance(child, (dict, list))]
        if not deeper:
            return
        level = deeper
    raise RequestError(f"The body is nested deeper than {MAX_JSON_DEPTH} levels.")


def _whole_floats_as_ints(fields: Body) -> Body:
    """The fields with 5.0 made 5 wherever an integer may stand (float fields take both)."""
    return {name: value if name == "messages" else _whole(value) for name, value in fields.items()}


def _whole(value: Any) -> Any:
    # Past 2^53 a float no longer says which integer was meant.
    if type(value) is float and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if type(value) is list:
        return [_whole(item) for item in value]
    return value


def _type_error(text: str) -> RequestError:
    """A RequestError from msgspec's text, such as "Expected `int`, got `str` - at `$.n`"."""
    what, _, where = text.partition(" - at ")
    match = re.search(r"`\$([^`]*)`", where)
    param = match.group(1).lstrip(".") if match else ""
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return RequestError(f"Missing required field: {param}.", param=param)
    what = what.replace("`", "")[:MAX_MESSAGE_CHARACTERS]
    return RequestError(f"{param}: {what}.", param=param or None)
