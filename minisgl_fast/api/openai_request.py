"""Request bodies of the generation routes: JSON in, checked structs out.

Rules: body.py's; a field of the public API that this server does not act upon is refused by name
when it asks for something (never silence). Nothing here knows the model: its limits are checked
in pipeline.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from minisgl_fast.api.body import Body, check_fields, doc, parse_body, parse_json, type_error
from minisgl_fast.api.chat_fields import (
    ReasoningOptions,
    ToolCall,
    allowed_tools,
    check_tools,
    template_kwargs,
)
from minisgl_fast.api.logprobs import MAX_TOP_LOGPROBS, LogprobOptions
from minisgl_fast.api.plain_body import Integer, PlainBody, PlainMessage
from minisgl_fast.api.refused import check_refused, unsupported
from minisgl_fast.api.sampling_fields import MAX_N, SamplingFields
from minisgl_fast.api.sampling_params import check_common, check_num_top
from minisgl_fast.errors import RequestError
from minisgl_fast.params import MAX_INT32

MAX_MESSAGES = 4096
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


class Prediction(msgspec.Struct):
    """Text that the answer is expected to have."""

    content: str | list[ContentPart]
    type: Literal["content"] = "content"


class ChatRequest(SamplingFields, kw_only=True):
    """``prompt`` is Mini-SGLang's: a raw text in place of messages."""

    messages: Annotated[
        list[Message] | None, doc("The conversation.", minItems=1, maxItems=MAX_MESSAGES)
    ] = None
    prompt: Annotated[str | None, doc("A raw text, in place of messages.")] = None
    input_ids: Annotated[
        list[int] | None, doc("The prompt's token ids; the template is not used.", minItems=1)
    ] = None
    max_completion_tokens: Annotated[
        int | None, doc("Most tokens to generate; wins over `max_tokens`.", minimum=1)
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, doc("Variables of the template, such as `enable_thinking`.")
    ] = None
    documents: Annotated[
        list[dict[str, Any]] | None, doc("Documents, for templates that have a place for them.")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, doc("End the prompt with the header of an answer (default true).")
    ] = None
    continue_final_message: Annotated[
        bool | None, doc("Go on with the text of the last message, which is the assistant's.")
    ] = None
    echo: Annotated[
        bool | None, doc("Begin the answer with the last message, if it is the assistant's.")
    ] = None
    tools: Annotated[list[dict[str, Any]] | None, doc("Functions that the model may call.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        doc(
            "Whether and what the model calls: `none`, `auto`, `required`, an object of type "
            "`function`, or of type `allowed_tools`, which leaves the model those tools alone."
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, doc("With false, at most one call is answered (default true).")
    ] = None
    separate_reasoning: Annotated[
        bool | None, doc("With false, reasoning stays in the content, tags and all.")
    ] = None
    stream_reasoning: Annotated[
        bool | None, doc("With false, reasoning comes in one event, at its end.")
    ] = None
    include_reasoning: Annotated[bool | None, doc("With false, reasoning is left out.")] = None
    reasoning_effort: Annotated[
        str | float | None,
        doc("`none` turns thinking off; any other is a variable of the template."),
    ] = None
    reasoning: Annotated[ReasoningOptions | None, doc("The same, in OpenRouter's form.")] = None
    thinking_token_budget: Annotated[
        int | None,
        doc(
            "Most tokens of reasoning, the marks around it not counted: then its end comes, and "
            "the answer. -1: no limit. For models whose reasoning ends with one token.",
            minimum=-1,
            maximum=MAX_INT32,
        ),
    ] = None
    verbosity: Annotated[
        Literal["low", "medium", "high"] | None, doc("A variable of the template.")
    ] = None
    prediction: Annotated[
        Prediction | None,
        doc("Defined by OpenAI as a hint for speed; no part of the answer."),
    ] = None
    safety_identifier: Annotated[
        str | None, doc("Defined by OpenAI as a label of the end user; no part of the answer.")
    ] = None
    prompt_cache_key: Annotated[
        str | None,
        doc("Defined by OpenAI as a hint to find a cache; here every request uses the one cache."),
    ] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory", "in-memory", "24h"] | None,
        doc("Defined by OpenAI as a hint for its cache; no part of the answer."),
    ] = None
    logprobs: Annotated[bool | None, doc("Give the log-probability of every generated token.")] = (
        None
    )
    top_logprobs: Annotated[
        int | None,
        doc("List so many of the likeliest tokens too.", minimum=0, maximum=MAX_TOP_LOGPROBS),
    ] = None

    @property
    def logprob_options(self) -> LogprobOptions:
        return self.logprobs_with((self.top_logprobs or 0) if self.logprobs else -1)

    @property
    def logprobs_param(self) -> str:
        """The field that asks for most of them."""
        if not self.logprobs:
            return "prompt_logprobs"
        return "top_logprobs" if self.top_logprobs else "logprobs"

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model gets to see."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def template_kwargs(self) -> dict[str, Any]:
        kwargs = template_kwargs(self.chat_template_kwargs, self.reasoning_effort, self.reasoning)
        if self.verbosity is not None:
            kwargs.setdefault("verbosity", self.verbosity)
        return kwargs


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: Annotated[
        str | list[str | int | list[int]],
        doc("A text, texts, token ids, or lists of token ids."),
    ]
    suffix: Annotated[
        str | None,
        doc("Text behind the completion, for models with tokens for filling in the middle."),
    ] = None
    max_completion_tokens: Annotated[
        int | None, doc("Most tokens to generate; wins over `max_tokens`.", minimum=1)
    ] = None
    echo: Annotated[bool | None, doc("Begin the answer with the prompt.")] = None
    best_of: Annotated[
        int | None, doc("Generate so many, answer the `n` likeliest.", minimum=1, maximum=MAX_N)
    ] = None
    logprobs: Annotated[
        int | Literal[False] | None,
        doc(
            "Give the log-probability of every token and list so many of the likeliest; with "
            "`echo` of the prompt too.",
            minimum=0,
            maximum=MAX_TOP_LOGPROBS,
        ),
    ] = None

    @property
    def num_generated(self) -> int:
        return self.num_choices if self.best_of is None else self.best_of

    @property
    def num_listed(self) -> int:
        """How many of the likeliest are listed; -1 without log-probabilities."""
        return -1 if self.logprobs is None or self.logprobs is False else self.logprobs

    @property
    def logprob_options(self) -> LogprobOptions:
        return self.logprobs_with(self.num_listed, of_prompt=bool(self.echo))


class GenerateRequest(SamplingFields, kw_only=True):
    """Mini-SGLang's own route."""

    prompt: str


Prompt: TypeAlias = str | list[int]
_ONLY_IDS = {int}

_PLAIN_CHAT = PlainBody(ChatRequest, {"messages": list[PlainMessage]})
_PLAIN_COMPLETION = PlainBody(
    CompletionRequest, {"prompt": str | list[str | Integer | list[Integer]]}
)


def plain_chat(body: bytes) -> ChatRequest | None:
    """The request of a plain body (plain_body.py) with messages; None for any other."""
    plain = _PLAIN_CHAT.read(body)
    if plain is None or not plain.messages or len(plain.messages) > MAX_MESSAGES:
        return None
    return plain


def parse_chat(body: bytes) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """The checked request and its messages as they came, for the template."""
    plain = plain_chat(body)
    if plain is not None and plain.messages is not None:
        return plain, [{"role": m.role, "content": m.content} for m in plain.messages]
    return check_chat(parse_json(body))


def check_chat(fields: Body) -> tuple[ChatRequest, list[dict[str, Any]]]:
    """The same for a body that is read already, or translated from that of another API."""
    request = check_fields(fields, ChatRequest)
    check_refused(fields, is_chat=True)
    check_common(request)
    if request.top_logprobs is not None:
        check_num_top("top_logprobs", request.top_logprobs)
        if request.top_logprobs and not request.logprobs:
            raise RequestError(
                "top_logprobs can only be given when logprobs is true.", param="top_logprobs"
            )
    _check_logprob_ids(request, has_logprobs=bool(request.logprobs))
    try:
        check_tools(request.tools, request.tool_choice)
        request.tools, request.tool_choice = allowed_tools(request.tools, request.tool_choice)
    except msgspec.ValidationError as error:
        raise type_error(str(error)) from None
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true.",
            param="continue_final_message",
        )
    others = [name for name in ("prompt", "input_ids") if getattr(request, name) is not None]
    if request.messages is None:
        return request, _without_messages(request, others)
    if "prompt" in others:
        raise RequestError("Give either messages or prompt, not both.", param="prompt")
    _check_messages(request.messages)
    if request.continue_final_message and request.messages[-1].role != "assistant":
        raise RequestError(
            "continue_final_message needs a last message of the assistant.",
            param="continue_final_message",
        )
    messages: list[dict[str, Any]] = fields["messages"]
    return request, messages


def _without_messages(request: ChatRequest, others: list[str]) -> list[dict[str, Any]]:
    if not others:
        raise RequestError("Missing required field: messages.", param="messages")
    if len(others) > 1:
        raise RequestError("Give either prompt or input_ids, not both.", param="input_ids")
    for name in ("tools", "continue_final_message"):
        if getattr(request, name):
            raise RequestError(f"{name} needs messages, a prompt cannot have it.", param=name)
    return []


def plain_completion(body: bytes) -> CompletionRequest | None:
    """The request of a plain body with a prompt; None for any other."""
    plain = _PLAIN_COMPLETION.read(body)
    return None if plain is None or plain.prompt is None else plain


def parse_completion(body: bytes) -> tuple[CompletionRequest, list[Prompt]]:
    """The checked request and its prompts, one or more."""
    plain = plain_completion(body)
    if plain is not None:
        return plain, read_prompts(plain.prompt, param="prompt")
    request, fields = parse_body(body, CompletionRequest)
    check_refused(fields, is_chat=False)
    check_common(request)
    prompts = read_prompts(request.prompt, param="prompt")
    _check_best_of(request)
    check_num_top("logprobs", request.logprobs or 0)
    _check_logprob_ids(request, has_logprobs=request.num_listed >= 0)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1 unless echo is true.", param="max_tokens")
    return request, prompts


def _check_logprob_ids(request: SamplingFields, *, has_logprobs: bool) -> None:
    if request.logprob_token_ids and not has_logprobs:
        name = "logprob_token_ids"
        raise RequestError(f"{name} can only be given with logprobs.", param=name)


def _check_best_of(request: CompletionRequest) -> None:
    if request.best_of is None or request.best_of == request.num_choices:
        return
    if not request.num_choices <= request.best_of <= MAX_N:
        raise RequestError(
            f"best_of must be in [n, {MAX_N}], got {request.best_of}.", param="best_of"
        )
    if request.stream:
        raise RequestError("best_of cannot be streamed.", param="best_of")
    if request.wants_prompt_ids:
        raise RequestError("best_of cannot return token ids.", param="best_of")


def parse_generate(body: bytes) -> GenerateRequest:
    """The checked request of ``/generate``."""
    request, fields = parse_body(body, GenerateRequest)
    check_refused(fields, is_chat=False)
    check_common(request)
    if request.num_choices != 1:
        raise RequestError("n must be 1 on this route.", param="n")
    for name in ("logprobs", "prompt_logprobs", "logprob_token_ids"):
        if fields.get(name) not in (None, False, []):
            raise unsupported(name, "/generate with text, SGLang's form, has return_logprob")
    return request


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


def read_prompts(prompt: str | list[str | int | list[int]], *, param: str) -> list[Prompt]:
    """A string, several strings, token ids, or several lists of token ids; ``param`` names it."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == _ONLY_IDS:
        return [prompt]  # type: ignore[list-item]
    if len(kinds) != 1:
        raise RequestError(
            f"{param} must be a string, a list of strings, a list of token ids, "
            "or a list of lists of token ids, and not empty.",
            param=param,
        )
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"{param} must hold at most {MAX_PROMPTS} prompts, got {len(prompt)}.", param=param
        )
    return prompt  # type: ignore[return-value]
