"""From the fields that all generating routes share to what the engine is asked to do.

Nothing here knows the model: its defaults and limits are arguments.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from minisgl_fast.api.logprobs import MAX_LOGPROB_IDS, MAX_TOP_LOGPROBS
from minisgl_fast.api.sampling_fields import MAX_N, SamplingFields
from minisgl_fast.errors import RequestError
from minisgl_fast.params import MAX_INT32, SamplingDefaults, SamplingParams
from minisgl_fast.text.tokenizer import Tokenizer

# Below this a temperature is greedy: logits divided by it would leave the range of float32.
LOWEST_TEMPERATURE = 1e-5

IDENTIFIER = re.compile("[!-~]{1,128}")


def sampling_params(
    request: SamplingFields, defaults: SamplingDefaults | None, max_tokens: int | None
) -> SamplingParams:
    """The parameters of every choice: the client's values, else the model's, else neutral ones."""
    temperature = _first(request.temperature, defaults and defaults.temperature, 1.0)
    if 0.0 < temperature < LOWEST_TEMPERATURE:
        temperature = 0.0
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
        stop=_texts(request.stop),
        stop_regex=_texts(request.stop_regex),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        include_stop_str_in_output=bool(request.include_stop_str_in_output or request.no_stop_trim),
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


def check_common(request: SamplingFields) -> None:
    """RequestError for what no other part of the request can make good."""
    if not 1 <= request.num_choices <= MAX_N:
        raise RequestError(f"n must be in [1, {MAX_N}], got {request.n}.", param="n")
    if request.stream_options is not None and not request.stream:
        raise RequestError(
            "stream_options can only be given when stream is true.", param="stream_options"
        )
    if request.priority is not None and abs(request.priority) > MAX_INT32:
        raise RequestError(
            f"priority must be in [{-MAX_INT32}, {MAX_INT32}], got {request.priority}.",
            param="priority",
        )
    cut = request.truncate_prompt_tokens
    if cut is not None and (cut < -1 or cut == 0):
        raise RequestError(
            f"truncate_prompt_tokens must be -1 or at least 1, got {cut}.",
            param="truncate_prompt_tokens",
        )
    if request.prompt_logprobs is not None:
        check_num_top("prompt_logprobs", request.prompt_logprobs)
        if request.stream:
            raise RequestError("prompt_logprobs cannot be streamed.", param="prompt_logprobs")
    for name in ("rid", "request_id"):
        text = getattr(request, name)
        if text is not None and not IDENTIFIER.fullmatch(text):
            raise RequestError(
                f"{name} must have 1 to 128 printable ASCII characters and no blanks.", param=name
            )


def check_logprob_ids(ids: Sequence[int], vocab_size: int) -> None:
    """RequestError if ``logprob_token_ids`` are too many or outside the vocabulary."""
    name = "logprob_token_ids"
    if len(ids) > MAX_LOGPROB_IDS:
        raise RequestError(
            f"{name} must hold at most {MAX_LOGPROB_IDS} ids, got {len(ids)}.", param=name
        )
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(f"{name} must hold token ids in [0, {vocab_size - 1}].", param=name)


def check_spaces(params: SamplingParams, tokenizer: Tokenizer) -> None:
    """RequestError if there would be blanks between special tokens, which are not wanted."""
    if tokenizer.puts_spaces and not params.skip_special_tokens:
        name = "spaces_between_special_tokens"
        raise RequestError(
            f"{name} cannot be false: the decoder of this model's tokenizer puts them there.",
            param=name,
        )


def check_num_top(name: str, num_top: int) -> None:
    """RequestError if no so many log-probabilities can be listed."""
    if not 0 <= num_top <= MAX_TOP_LOGPROBS:
        raise RequestError(f"{name} must be in [0, {MAX_TOP_LOGPROBS}], got {num_top}.", param=name)


def cache_salt(request: SamplingFields) -> int:
    """The number that keeps this client's cached prefixes apart; 0 is the common cache."""
    if not request.cache_salt and not request.extra_key:
        return 0
    salt = (request.cache_salt or "").encode()
    if request.extra_key:
        salt = b"%d:%b%b" % (len(salt), salt, request.extra_key.encode())
    digest = hashlib.blake2b(salt, digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _first(given: Any, default: Any, neutral: Any) -> Any:
    if given is not None:
        return given
    return neutral if default is None else default


def _texts(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())
