"""SamplingFields: what the bodies of all generating routes share, and what the engine gets of it.

Nothing here knows the model: its defaults and limits are arguments.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from minisgl_fast.errors import RequestError
from minisgl_fast.params import SamplingDefaults, SamplingParams

# Below this a temperature is greedy: logits divided by it would leave the range of float32.
LOWEST_TEMPERATURE = 1e-5


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


def _first(given: Any, default: Any, neutral: Any) -> Any:
    if given is not None:
        return given
    return neutral if default is None else default
