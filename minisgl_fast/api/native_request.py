"""The body of SGLang's ``/generate``: one prompt or a batch, each with parameters of its own.

Rules: names are SGLang's, and so is what is meant where nothing is given: 128 tokens, and no
sampling defaults of the model. What belongs to each prompt may be given once for all, or in a list
with one entry per prompt. Unknown fields are ignored; a field that asks for what this server does
not do is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from minisgl_fast.api.body import Body, check_fields, doc
from minisgl_fast.api.native_logprobs import NativeLogprobs
from minisgl_fast.api.openai_request import MAX_PROMPTS, Prompt
from minisgl_fast.api.refused import REFUSED, Refusal, unsupported
from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.api.sampling_params import (
    IDENTIFIER,
    check_common,
    check_token_ids,
    sampling_params,
)
from minisgl_fast.api.structured import Constraint, constraint_of
from minisgl_fast.errors import RequestError
from minisgl_fast.params import SamplingParams

DEFAULT_NEW_TOKENS = 128

_NO_IMAGES = Refusal("it serves text alone", ([],))
_REFUSED = {
    "image_data": _NO_IMAGES,
    "video_data": _NO_IMAGES,
    "audio_data": _NO_IMAGES,
    **{
        name: REFUSED[name]
        for name in (
            "custom_logit_processor",
            "input_embeds",
            "lora_path",
            "return_hidden_states",
            "return_routed_experts",
            "routed_experts_start_len",
            "session_params",
        )
    },
}
_REFUSED_SAMPLING = {"custom_params": REFUSED["custom_params"]}
# What SamplingFields calls otherwise.
_NATIVE_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",
}


class NativeSampling(msgspec.Struct, kw_only=True):
    """``sampling_params`` of ``/generate``."""

    max_new_tokens: Annotated[
        int | None, doc("Most tokens to generate; 0 computes the prompt alone.", minimum=0)
    ] = None
    min_new_tokens: Annotated[
        int | None, doc("Fewest tokens before an end or a stop counts.", minimum=0)
    ] = None
    n: Annotated[int | None, doc("Answers per prompt; the same for all prompts.", minimum=1)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    sampling_seed: Annotated[int | None, doc("The same seed and request give the same text.")] = (
        None
    )
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None


class NativeRequest(msgspec.Struct, kw_only=True):
    """A body of ``/generate``. Mini-SGLang's has ``prompt`` and its parameters beside it."""

    text: Annotated[str | list[str] | None, doc("The prompt, or several.")] = None
    input_ids: Annotated[
        list[int | list[int]] | None, doc("The prompt as token ids, or several.")
    ] = None
    sampling_params: Annotated[
        NativeSampling | list[NativeSampling] | None,
        doc("For all prompts, or a list with an entry per prompt."),
    ] = None
    rid: Annotated[
        str | list[str] | None,
        doc("The `id` in `meta_info`, and the name for `/abort_request`; a list for a batch."),
    ] = None
    stream: Annotated[bool | None, doc("Answer in server-sent events.")] = None
    return_logprob: Annotated[
        bool | list[bool] | None, doc("Give log-probabilities of tokens in `meta_info`.")
    ] = None
    logprob_start_len: Annotated[
        int | list[int] | None,
        doc("First token of the prompt to give them for; -1 (default): none."),
    ] = None
    top_logprobs_num: Annotated[
        int | list[int] | None, doc("How many of the largest to give at each position.")
    ] = None
    token_ids_logprob: Annotated[
        list[int | list[int] | None] | None,
        doc("Token ids whose log-probability to give at each position."),
    ] = None
    return_text_in_logprobs: Annotated[
        bool | None, doc("Give the text of each such token, too.")
    ] = None
    priority: Annotated[int | None, doc("Higher runs first.")] = None
    cache_salt: Annotated[
        str | None, doc("Cached prefixes are shared only among requests with the same salt.")
    ] = None
    extra_key: Annotated[str | None, doc("The same; with both, both must be equal.")] = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One ``sampling_params``, checked. ``max_tokens``: the client's own, None if it gave none.
    ``constraint`` binds the answers."""

    fields: SamplingFields
    params: SamplingParams
    max_tokens: int | None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class NativePrompt:
    """One prompt of a request. ``param``: its field; ``rid``: the client's own name for it."""

    prompt: Prompt
    param: str
    asked: Asked
    rid: str | None
    logprobs: NativeLogprobs


def parse_native(fields: Body, vocab_size: int) -> tuple[NativeRequest, list[NativePrompt], bool]:
    """The request, its prompts, and whether they came as a batch."""
    given = fields.pop("sampling_params", None)  # checked one by one
    body = check_fields(fields, NativeRequest)
    _check_refused(fields, _REFUSED)
    prompts, param, is_batch = _prompts(body)
    rids = _rids(body.rid, len(prompts), is_batch)
    if not isinstance(given, list):
        asked = _sampling(given, body, "sampling_params", vocab_size)
        sampling = [asked] * len(prompts)
    elif is_batch and len(given) == len(prompts):
        sampling = [
            _sampling(one, body, f"sampling_params[{i}]", vocab_size) for i, one in enumerate(given)
        ]
    else:
        raise RequestError(
            "sampling_params must be an object, or a list with one per prompt.",
            param="sampling_params",
        )
    if len({asked.fields.num_choices for asked in sampling}) > 1:
        raise RequestError("n must be the same for all prompts.", param="sampling_params")
    logprobs = _logprobs(body, len(prompts) if is_batch else None)
    for one in logprobs:
        one.check(vocab_size)
    parsed = [
        NativePrompt(prompt, f"{param}[{i}]" if is_batch else param, sampling[i], rids[i], one)
        for i, (prompt, one) in enumerate(zip(prompts, logprobs, strict=True))
    ]
    return body, parsed, is_batch


def _prompts(body: NativeRequest) -> tuple[Sequence[Prompt], str, bool]:
    """The prompts, their field, and whether it held a list of them."""
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("Give either text or input_ids.", param="text")
    if body.text is not None:
        if isinstance(body.text, str):
            return [body.text], "text", False
        return _checked(body.text, "text"), "text", True
    ids: Any = body.input_ids
    kinds = set(map(type, ids))
    if kinds == {int}:
        return [ids], "input_ids", False
    if kinds != {list}:
        raise RequestError(
            "input_ids must be a list of token ids, or of such lists, and not empty.",
            param="input_ids",
        )
    return _checked(ids, "input_ids"), "input_ids", True


def _checked(prompts: Sequence[Prompt], param: str) -> Sequence[Prompt]:
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(
            f"{param} must hold 1 to {MAX_PROMPTS} prompts, got {len(prompts)}.", param=param
        )
    return prompts


def _rids(rid: str | list[str] | None, count: int, is_batch: bool) -> list[str | None]:
    """One name per prompt."""
    if rid is None:
        return [None] * count
    if not all(map(IDENTIFIER.fullmatch, [rid] if isinstance(rid, str) else rid)):
        raise RequestError(
            "rid must have 1 to 128 printable ASCII characters and no blanks.", param="rid"
        )
    if isinstance(rid, str):
        return [f"{rid}_{i}" for i in range(count)] if is_batch else [rid]
    if not is_batch or len(rid) != count:
        raise RequestError("rid must be a string, or a list with one per prompt.", param="rid")
    if len(set(rid)) != count:
        raise RequestError("rid must be different for each prompt.", param="rid")
    return list(rid)


def _logprobs(body: NativeRequest, count: int | None) -> list[NativeLogprobs]:
    """What each prompt's answer is to hold; ``count`` is None where there is no batch."""
    ids: Any = body.token_ids_logprob
    if count is None or ids is None or not any(isinstance(one, list) for one in ids):
        ids = [ids] * (count or 1)  # the same for all
    else:
        ids = _each("token_ids_logprob", ids, count)
    if not all(one is None or (isinstance(one, list) and _are_ints(one)) for one in ids):
        raise RequestError(
            "token_ids_logprob must hold token ids, or one list of them per prompt.",
            param="token_ids_logprob",
        )
    return [
        NativeLogprobs(
            bool(wanted),
            -1 if start is None else start,
            num_top or 0,
            tuple(one or ()),
            bool(body.return_text_in_logprobs),
        )
        for wanted, start, num_top, one in zip(
            _each("return_logprob", body.return_logprob, count),
            _each("logprob_start_len", body.logprob_start_len, count),
            _each("top_logprobs_num", body.top_logprobs_num, count),
            ids,
            strict=True,
        )
    ]


def _are_ints(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _each(name: str, value: Any, count: int | None) -> list[Any]:
    """One value per prompt."""
    if not isinstance(value, list):
        return [value] * (count or 1)
    if count is None or len(value) != count:
        raise RequestError(f"{name} must be one value, or a list with one per prompt.", param=name)
    return value


def _sampling(given: Any, body: NativeRequest, where: str, vocab_size: int) -> Asked:
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise RequestError(f"{where} must be an object.", param=where)
    try:
        asked = check_fields(given, NativeSampling)
        _check_refused(given, _REFUSED_SAMPLING)
        fields = SamplingFields(
            max_tokens=asked.max_new_tokens,
            min_tokens=asked.min_new_tokens,
            n=asked.n,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            repetition_penalty=asked.repetition_penalty,
            logit_bias=asked.logit_bias,
            seed=asked.sampling_seed,
            stop=asked.stop or None,
            stop_regex=asked.stop_regex or None,
            stop_token_ids=asked.stop_token_ids,
            ignore_eos=asked.ignore_eos,
            no_stop_trim=asked.no_stop_trim,
            skip_special_tokens=asked.skip_special_tokens,
            spaces_between_special_tokens=asked.spaces_between_special_tokens,
            json_schema=asked.json_schema,
            regex=asked.regex,
            ebnf=asked.ebnf,
            structural_tag=asked.structural_tag,
            priority=body.priority,
            cache_salt=body.cache_salt,
            extra_key=body.extra_key,
        )
        check_common(fields)
        # 0 needs no parameters; SamplingParams knows only 1 and more.
        params = sampling_params(fields, None, fields.max_tokens or None)
        check_token_ids(params, vocab_size)
        constraint = constraint_of(fields)
    except RequestError as error:
        raise _in_native_words(error, where) from None
    if constraint is not None:
        constraint = replace(constraint, param=f"{where}.{constraint.param}")
    return Asked(fields, params, fields.max_tokens, constraint)


def _in_native_words(error: RequestError, where: str) -> RequestError:
    """The error with the name and the place that the field has here."""
    param = error.param
    if param is None or param == "priority":
        return error
    message = error.message
    for ours, native in _NATIVE_NAMES.items():
        message = message.replace(ours, native)
    return RequestError(message, param=f"{where}.{_NATIVE_NAMES.get(param, param)}")


def _check_refused(fields: Body, refused: dict[str, Refusal]) -> None:
    for name in fields.keys() & refused.keys():
        value = fields[name]
        harmless = any(value == ok and type(value) is type(ok) for ok in refused[name].harmless)
        if value is not None and not harmless:
            raise unsupported(name, refused[name].why)
