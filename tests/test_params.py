"""SamplingParams: every range at its edge, and the field that an error names."""

from __future__ import annotations

import math
from typing import Any

import pytest

from minisgl_fast.errors import RequestError
from minisgl_fast.params import SamplingParams

NAN, INFINITY = math.nan, math.inf
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    # field: (accepted, refused)
    "max_tokens": ([None, 1, 2**40], [0, -1]),
    "min_tokens": ([0, 2**31 - 1], [-1, 2**31]),
    "temperature": ([0, 0.0, 1e-9, 2, 100.0], [-0.001, 100.1, NAN, INFINITY, -INFINITY]),
    "top_p": ([1e-9, 1, 1.0], [0, 0.0, 1.001, -1, NAN, INFINITY]),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31]),
    "min_p": ([0, 0.0, 1.0], [-0.001, 1.001, NAN]),
    "seed": ([None, 0, -(2**63), 2**64 - 1], [-(2**63) - 1, 2**64]),
    "presence_penalty": ([-2, 2.0], [-2.001, 2.001, NAN]),
    "frequency_penalty": ([-2, 2.0], [-2.001, 2.001, NAN]),
    "repetition_penalty": ([0.001, 1, 2.0], [0, 0.0, 2.001, -1, NAN]),
    "logit_bias": (
        [{}, {0: -100, 2**31 - 1: 100.0}, dict.fromkeys(range(1024), 1.0)],
        [{-1: 0.0}, {2**31: 0.0}, {1: 100.1}, {1: -101}, {1: NAN}, dict.fromkeys(range(1025), 1.0)],
    ),
    "stop": (
        [(), ("a",), ("x" * 256,), ("a",) * 32],
        [("",), ("a", ""), ("x" * 257,), ("a",) * 33],
    ),
    "stop_regex": ([(), ("a",), ("a" * 256,), ("a",) * 32], []),
    "banned_token_ids": ([(), (0, 2**31 - 1), (5,) * 512], [(-1,), (2**31,), (5,) * 513]),
    "stop_token_ids": ([(), (0, 2**31 - 1), (5,) * 64], [(-1,), (2**31,), (5,) * 65]),
}
ACCEPTED = [(field, value) for field, (good, _) in EDGES.items() for value in good]
REFUSED = [(field, value) for field, (_, bad) in EDGES.items() for value in bad]


@pytest.mark.parametrize(("field", "value"), ACCEPTED, ids=lambda value: str(value)[:30])
def test_a_value_at_the_edge_is_kept_as_it_is(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_value_past_the_edge_is_a_400_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert caught.value.http_status == 400
    assert caught.value.message.startswith(f"{field} must be ")
    assert len(caught.value.message) < 200


def test_min_tokens_are_at_most_max_tokens() -> None:
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    with pytest.raises(RequestError) as caught:
        SamplingParams(min_tokens=6, max_tokens=5)
    assert (caught.value.param, caught.value.message) == (
        "min_tokens",
        "min_tokens must be at most max_tokens, got 6.",
    )


def test_the_table_above_has_every_field_with_a_range() -> None:
    switches = {"ignore_eos", "include_stop_str_in_output", "skip_special_tokens"}
    assert set(SamplingParams.__slots__) == set(EDGES) | switches


def test_stop_patterns_are_compiled_when_they_are_given() -> None:
    params = SamplingParams(stop=("a",), stop_regex=("b+c", "\\d"))
    assert params.stops == ("a", "b+c", "\\d")
    with pytest.raises(RequestError) as caught:
        SamplingParams(stop_regex=("(",))
    assert caught.value.param == "stop_regex"
