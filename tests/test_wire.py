"""Frames: layouts by hand with struct, STEP there and back, malformed ones refused."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl_fast.errors import EngineError
from minisgl_fast.params import SamplingParams
from minisgl_fast.wire import (
    FinishReason,
    FrameKind,
    LogprobsRecord,
    Task,
    frame,
    pack_add,
    pack_embedding,
    pack_logprobs,
    pack_step,
    unpack_embedding,
    unpack_logprobs,
    unpack_step,
)

RIDS = st.integers(0, 2**32 - 1)
ROWS = st.lists(st.tuples(RIDS, st.integers(-1, 2**31 - 1), st.sampled_from(FinishReason)))
FIRST = st.lists(st.tuples(RIDS, st.integers(0, 2**32 - 1)))


@settings(derandomize=True, deadline=None)
@given(rows=ROWS, first=FIRST)
def test_a_step_comes_back_as_it_was(
    rows: list[tuple[int, int, int]], first: list[tuple[int, int]]
) -> None:
    payload = pack_step(rows, first)
    assert unpack_step(payload) == (rows, first)
    assert len(payload) == 8 + 9 * len(rows) + 8 * len(first)


def test_a_steps_layout_is_the_documented_one() -> None:
    payload = pack_step([(7, 100, 0), (2**32 - 1, -1, 4)], [(7, 48)])
    assert payload == struct.pack("<2I2I2i1I1I2B", 2, 1, 7, 2**32 - 1, 100, -1, 7, 48, 0, 4)


@settings(derandomize=True, deadline=None)
@given(payload=st.binary(max_size=200))
def test_a_step_of_a_wrong_length_is_refused_whatever_it_says(payload: bytes) -> None:
    num_rows, num_first = struct.unpack("<2I", payload[:8].ljust(8, b"\0"))
    if len(payload) < 8 or len(payload) != 8 + 9 * num_rows + 8 * num_first:
        with pytest.raises(EngineError):
            unpack_step(payload)
    else:
        unpack_step(payload)


def test_a_step_cut_or_grown_at_any_place_is_refused() -> None:
    payload = pack_step([(1, 2, 0), (3, 4, 1)], [(1, 16)])
    for length in range(len(payload)):
        with pytest.raises(EngineError):
            unpack_step(payload[:length])
    with pytest.raises(EngineError):
        unpack_step(payload + b"\0")
    for counts in ((2**32 - 1, 0), (0, 2**32 - 1), (2**32 - 1, 2**32 - 1)):
        with pytest.raises(EngineError):
            unpack_step(struct.pack("<2I", *counts) + payload[8:])


def test_an_adds_layout_is_the_documented_one() -> None:
    params = SamplingParams(
        temperature=0.5,
        top_p=0.25,
        min_p=0.125,
        top_k=-1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        min_tokens=3,
        stop_token_ids=(9, 8),
        logit_bias={5: -100.0},
        ignore_eos=True,
    )
    payload = pack_add(
        2**32 - 1, params, [1, 2, 3], seed=2**64 - 1, max_tokens=77, cache_salt=2**63, priority=-4,
        num_top_logprobs=20, prompt_logprobs_from=6, logprob_ids=[11, 12], task=Task.EMBED_MEAN,
        grammar=b"start: /a/",
    )  # fmt: skip
    head = struct.Struct("<2I2Q6f4i5IihBx")
    assert head.unpack_from(payload) == (
        2**32 - 1, 1, 2**64 - 1, 2**63, 0.5, 0.25, 0.125, 1.0, -1.0, 1.5, 0, 77, 3, -4, 3, 2, 1,
        2, 10, 6, 20, 2,
    )  # fmt: skip
    arrays = array("i", [1, 2, 3, 9, 8, 5]).tobytes() + array("f", [-100.0]).tobytes()
    assert payload[head.size :] == arrays + array("i", [11, 12]).tobytes() + b"start: /a/"


def test_an_add_that_asks_for_nothing_more_says_so() -> None:
    payload = pack_add(1, SamplingParams(), [1], seed=0, max_tokens=1)
    assert struct.unpack_from("<2IihBx", payload, 76) == (0, 0, -1, -1, Task.GENERATE)
    assert payload[92:] == array("i", [1]).tobytes()


@pytest.mark.parametrize(
    "values",
    [{"rid": 2**32}, {"seed": 2**64}, {"seed": -1}, {"max_tokens": 2**31}, {"prompt": [2**31]},
     {"num_top_logprobs": 2**15}, {"prompt_logprobs_from": 2**31}, {"logprob_ids": [2**31]}],
)  # fmt: skip
def test_a_value_that_does_not_fit_its_field_is_never_cut(values: dict[str, object]) -> None:
    arguments = {"rid": 1, "prompt": [1], "seed": 0, "max_tokens": 1, **values}
    with pytest.raises(OverflowError):
        pack_add(params=SamplingParams(), **arguments)  # type: ignore[arg-type]


def test_a_frame_is_its_length_its_kind_and_its_payload() -> None:
    assert frame(FrameKind.ABORT, b"abcd") == b"\x05\0\0\0\x02abcd"
    assert frame(FrameKind.STATS, b"") == b"\x01\0\0\0\x13"


def records() -> list[LogprobsRecord]:
    ints, floats = (lambda *v: array("i", v)), (lambda *v: array("f", v))
    return [
        LogprobsRecord(7, True, 1, 2, ints(5, 6), floats(-1, -2), ints(1, 2, 3, 4),
                       floats(-1, -2, -3, -4), floats(-5, -6)),
        LogprobsRecord(2**32 - 1, False, 3, 0, ints(9), floats(float("-inf")), ints(), floats(),
                       floats(-0.5, -0.25, -0.125)),
    ]  # fmt: skip


def test_log_probabilities_come_back_as_they_were() -> None:
    assert unpack_logprobs(pack_logprobs(records())) == records()
    assert unpack_logprobs(b"") == []


def test_the_layout_of_log_probabilities_is_the_documented_one() -> None:
    assert pack_logprobs(records()[:1]) == struct.pack(
        "<6I2i2f4i4f2f", 7, 1, 1, 2, 2, 1, 5, 6, -1, -2, 1, 2, 3, 4, -1, -2, -3, -4, -5, -6
    )


def test_log_probabilities_cut_at_any_place_are_refused() -> None:
    whole = [pack_logprobs(records()[:count]) for count in range(3)]
    for length in range(len(whole[2])):
        if length in map(len, whole):
            continue
        with pytest.raises(EngineError):
            unpack_logprobs(whole[2][:length])
    for counts in ((2**32 - 1, 0, 0), (2**32 - 1, 2**32 - 1, 2**32 - 1), (1, 2**32 - 1, 0)):
        with pytest.raises(EngineError):
            unpack_logprobs(struct.pack("<6I", 1, 0, 0, *counts) + bytes(40))


def test_an_embedding_comes_back_as_it_was() -> None:
    vector = array("f", [0.5, -0.25])
    payload = pack_embedding(2**32 - 1, vector.tobytes())
    assert payload == b"\xff\xff\xff\xff" + vector.tobytes()
    assert unpack_embedding(payload) == (2**32 - 1, vector)
    for bad in (b"", b"abc", payload[:-1]):
        with pytest.raises(EngineError):
            unpack_embedding(bad)
