"""SamplingParams: what one generation is asked to do, validated in one place.

The HTTP layer fills a SamplingParams from a request body and the Python API takes one from its
user; both meet the same ranges here. Errors are ``RequestError`` with ``param`` naming the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from minisgl_fast.errors import RequestError
from minisgl_fast.text.stop_regex import StopProgram

MAX_STOP_STRINGS = 32
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_BANNED_TOKEN_IDS = 512
MAX_SEED = 2**64 - 1
MAX_INT32 = 2**31 - 1  # what the engine's frames can hold


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping of one generation.

    temperature 0 is greedy. top_k 0 or -1 is off; top_p 1 and min_p 0 are off. ``seed`` None draws
    a fresh one. ``max_tokens`` None fills the context. ``stop`` holds at most 32 strings,
    ``stop_regex`` at most 32 patterns (text/regex_syntax.py says which). ``banned_token_ids`` never
    come.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _out_of_range("max_tokens", self.max_tokens, "at least 1")
        if not 0 <= self.min_tokens <= MAX_INT32:
            raise _out_of_range("min_tokens", self.min_tokens, f"in [0, {MAX_INT32}]")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _out_of_range("min_tokens", self.min_tokens, "at most max_tokens")
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_excluded=True)
        if not -1 <= self.top_k <= MAX_INT32:
            raise _out_of_range("top_k", self.top_k, f"-1 or 0 (off), or in [1, {MAX_INT32}]")
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 2.0, low_excluded=True)
        if self.seed is not None and not -(2**63) <= self.seed <= MAX_SEED:
            raise _out_of_range("seed", self.seed, "a 64-bit integer")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise _out_of_range(
                "logit_bias", len(self.logit_bias), f"at most {MAX_LOGIT_BIAS} entries"
            )
        for token, bias in self.logit_bias.items():
            if not 0 <= token <= MAX_INT32:
                raise _out_of_range("logit_bias", token, "keys that are token ids")
            _check_float("logit_bias", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise _out_of_range("stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise _out_of_range(
                    "stop", len(text), f"strings of 1 to {MAX_STOP_CHARACTERS} characters"
                )
        if self.stop_regex:
            stop_program(self.stop_regex)
        for name, ids, limit in (
            ("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS),
            ("banned_token_ids", self.banned_token_ids, MAX_BANNED_TOKEN_IDS),
        ):
            if len(ids) > limit:
                raise _out_of_range(name, len(ids), f"at most {limit} ids")
            for token in ids:
                if not 0 <= token <= MAX_INT32:
                    raise _out_of_range(name, token, "token ids")

    @property
    def stops(self) -> tuple[str, ...]:
        """What TextStream.matched counts: the strings, then the patterns."""
        return self.stop + self.stop_regex


@lru_cache(maxsize=64)
def stop_program(patterns: tuple[str, ...]) -> StopProgram | None:
    """The patterns, ready to be looked for; None where there are none."""
    return StopProgram(patterns) if patterns else None


class SamplingDefaults(Protocol):
    """What the model's author recommends; None where nothing is said."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...


def _check_float(
    name: str, value: float, low: float, high: float, *, low_excluded: bool = False
) -> None:
    inside = low < value <= high if low_excluded else low <= value <= high
    if not math.isfinite(value) or not inside:
        bracket = "(" if low_excluded else "["
        raise _out_of_range(name, value, f"in {bracket}{low:g}, {high:g}]")


def _out_of_range(name: str, value: object, expected: str) -> RequestError:
    return RequestError(f"{name} must be {expected}, got {value}.", param=name)
