"""Bodies of Ollama's ``/api/chat`` and ``/api/generate``, translated into chat requests.

Rules: sampling options are honoured, those that say how Ollama loads a model (``num_ctx``,
``num_gpu``, ``keep_alive`` ...) ask for nothing of a server that has loaded its model, and what
the sampler does not have (mirostat, typical_p, tfs_z) is refused by name. Penalties look at the
whole text; ``repeat_last_n`` 0 turns the repeat penalty off. Calls have no ids here, templates may
want one: each result belongs to the first call of its tool that has none yet.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from minisgl_fast.api.body import Body, doc
from minisgl_fast.api.logprobs import MAX_TOP_LOGPROBS
from minisgl_fast.errors import RequestError

# Options of samplers that are not there, with the values that turn them off.
_OFF: dict[str, tuple[float, ...]] = {"mirostat": (0,), "typical_p": (0, 1), "tfs_z": (0, 1)}
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}


class Options(msgspec.Struct):
    num_predict: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    typical_p: float | None = None
    tfs_z: float | None = None


class OllamaFields(msgspec.Struct, kw_only=True):
    """What chat and generate share."""

    model: Annotated[str | None, doc("The served model's name, maybe with `:latest`.")] = None
    stream: Annotated[bool | None, doc("Send JSON lines as they come (default true).")] = None
    format: Annotated[str | dict[str, Any] | None, doc("`json`, or a JSON schema.")] = None
    options: Annotated[
        Options | None,
        doc(
            "num_predict, temperature, top_p, top_k, min_p, seed, stop, repeat_penalty, "
            "presence_penalty, frequency_penalty. Those about loading ask for nothing, "
            "other samplers are refused."
        ),
    ] = None
    think: Annotated[
        bool | str | None,
        doc("Turns the reasoning on or off where the template can, or says how much."),
    ] = None
    logprobs: Annotated[bool | None, doc("Give the log-probability of every token.")] = None
    top_logprobs: Annotated[
        int | None,
        doc(
            "List so many of the likeliest tokens too; with `logprobs`.",
            minimum=0,
            maximum=MAX_TOP_LOGPROBS,
        ),
    ] = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | None = None


class ToolCall(msgspec.Struct):
    function: CalledFunction


class OllamaMessage(msgspec.Struct):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None


class OllamaChatRequest(OllamaFields, kw_only=True):
    messages: Annotated[
        list[OllamaMessage] | None, doc("As in a chat, with `thinking` and `tool_name`; no images.")
    ] = None
    tools: Annotated[list[dict[str, Any]] | None, doc("Functions, as in a chat.")] = None


class OllamaGenerateRequest(OllamaFields, kw_only=True):
    prompt: Annotated[
        str | None,
        doc("A text for the template, as a user's message. None: the model is loaded already."),
    ] = None
    system: Annotated[str | None, doc("A system message before it.")] = None
    raw: Annotated[bool | None, doc("The prompt goes to the model without the template.")] = None
    suffix: Annotated[str | None, doc("Refused.")] = None
    template: Annotated[str | None, doc("Refused.")] = None
    images: Annotated[list[Any] | None, doc("Refused.")] = None
    context: Annotated[list[int] | None, doc("Refused: nothing is kept.")] = None


def chat_fields(request: OllamaChatRequest) -> Body:
    """The body of the chat request that asks for the same."""
    fields = common_fields(request)
    fields["messages"] = _messages(request.messages or [])
    if request.tools:
        fields["tools"] = request.tools
    return fields


def generate_fields(request: OllamaGenerateRequest, *, has_template: bool) -> Body:
    """The same for a prompt, which the model gets as it is where it has no template."""
    for name in ("suffix", "template", "images", "context"):
        if getattr(request, name):
            raise RequestError(f"This server does not support {name} here.", param=name)
    fields = common_fields(request)
    if request.raw or not has_template:
        if request.system:
            raise RequestError("A raw prompt has no place for system.", param="system")
        return fields | {"prompt": request.prompt}
    system = [{"role": "system", "content": request.system}] if request.system else []
    fields["messages"] = [*system, {"role": "user", "content": request.prompt}]
    return fields


def served_name(name: str | None) -> str | None:
    """The name without the tag that Ollama's clients add."""
    return name.removesuffix(":latest") if name else None


def common_fields(request: OllamaFields) -> Body:
    """What a chat and a prompt say alike, as fields of a chat request. RequestError."""
    fields: Body = {
        "model": served_name(request.model),
        "stream": request.stream is not False,
        "logprobs": request.logprobs,
        "top_logprobs": request.top_logprobs,
    }
    options = request.options or Options()
    for name, off in _OFF.items():
        value = getattr(options, name)
        if value is not None and value not in off:
            where = f"options.{name}"
            raise RequestError(f"This server does not support {where}.", param=where)
    fields |= {ours: getattr(options, theirs) for theirs, ours in _SAMPLING.items()}
    # Negative numbers and 0 mean no limit there, a negative seed a fresh one.
    if options.num_predict is not None and options.num_predict > 0:
        fields["max_tokens"] = options.num_predict
    if options.seed is not None and options.seed >= 0:
        fields["seed"] = options.seed
    if options.repeat_last_n != 0:
        fields["repetition_penalty"] = options.repeat_penalty
    if isinstance(request.think, bool):
        fields["reasoning"] = {"enabled": request.think}
    elif request.think is not None:
        fields["reasoning_effort"] = request.think
    if request.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif isinstance(request.format, dict):
        schema = {"name": "format", "schema": request.format, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif request.format:
        raise RequestError("format must be json or a JSON schema.", param="format")
    return fields


def _messages(messages: list[OllamaMessage]) -> list[Body]:
    converted = []
    waiting: list[tuple[str, str]] = []  # (name, id) of calls without a result
    num_calls = 0
    for i, message in enumerate(messages):
        if message.images:
            where = f"messages[{i}].images"
            raise RequestError(f"This server does not support {where}.", param=where)
        fields: Body = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            fields["reasoning_content"] = message.thinking
        if message.tool_calls:
            fields["tool_calls"] = []
            for call in message.tool_calls:
                num_calls += 1
                call_id = f"call{num_calls:05}"  # as long as Mistral's templates demand
                name = call.function.name
                waiting.append((name, call_id))
                function = {"name": name, "arguments": call.function.arguments or {}}
                fields["tool_calls"].append(
                    {"id": call_id, "type": "function", "function": function}
                )
        if message.role == "tool":
            answered = [entry for entry in waiting if message.tool_name in (None, entry[0])]
            if answered:
                waiting.remove(answered[0])
                fields["name"], fields["tool_call_id"] = answered[0]
            elif message.tool_name is not None:
                fields["name"] = message.tool_name
        converted.append(fields)
    return converted
