"""The layout of StepPlan's buffer, and padding for CUDA graphs."""

import struct
from array import array

import pytest
from fake_device import FakeEngine, PlanView, make_plan

from minisgl_fast.params import SamplingParams
from minisgl_fast.sched.plan import PlanCapacity, SampleFlag, StepPlan
from minisgl_fast.sched.scheduler import Scheduler
from minisgl_fast.wire import pack_add


def make_scheduler(**changes):
    config = {
        "num_pages": 64, "page_size": 4, "max_seqs": 4, "max_model_len": 64,
        "max_step_tokens": 32, "eos_ids": [1, 3],
    }  # fmt: skip
    return Scheduler(**config | changes)


def test_sections_are_aligned_disjoint_and_sized_by_the_capacity():
    capacity = PlanCapacity(max_tokens=50, max_seqs=7, max_updates=11, max_bias=5)
    seqs, samples = 7, 7
    lengths = {
        "header": 16, "seq_slot": seqs, "q_start": seqs + 1, "context_len": seqs,
        "sample_row": samples, "sample_slot": samples, "sample_position": samples,
        "temperature": samples, "top_k": samples, "top_p": samples, "min_p": samples,
        "seed_lo": samples, "seed_hi": samples, "presence": samples, "frequency": samples,
        "repetition": samples, "sample_flags": samples, "mask_row": samples,
        "bias_start": samples + 1,
        "bias_id": 5, "bias_value": 5, "update_slot": 11, "update_column": 11,
        "update_page": 11, "input_id": 50, "position": 50, "kv_slot": 50,
    }  # fmt: skip
    offsets = capacity.offsets()
    assert {name: length for name, (_, length) in offsets.items()} == lengths
    end = 0
    for offset, length in offsets.values():
        assert offset >= end and offset % 4 == 0
        end = offset + length
    assert offsets["header"][0] == 0
    assert end <= capacity.num_words < end + 4


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1, 1), (4, 0, 4, 4), (4, 4, 0, 4), (4, 4, 4, -1), (3, 4, 4, 4)]
)
def test_impossible_capacities_are_refused(sizes):
    with pytest.raises(ValueError, match="a plan needs room"):
        PlanCapacity(*sizes)


def test_a_plan_needs_aligned_memory():
    capacity = PlanCapacity(4, 4, 4, 4)
    for address in (0, 2):
        with pytest.raises(ValueError, match="address"):
            StepPlan(address, capacity)


def test_one_prefill_and_one_decode_fill_every_section():
    scheduler = make_scheduler()
    plan, memory = make_plan(scheduler)
    view = PlanView(plan, memory)
    params = SamplingParams(
        temperature=0.5, top_p=0.25, top_k=40, min_p=0.125, presence_penalty=1.5,
        frequency_penalty=-0.5, repetition_penalty=1.25, logit_bias={11: 2.5, 12: -100.0},
        stop_token_ids=(20,), min_tokens=2,
    )  # fmt: skip
    seed = 0x89ABCDEF_FFFFFFFE
    scheduler.add(0, pack_add(7, params, [30, 31, 32, 33, 34], seed=seed, max_tokens=9))
    assert scheduler.schedule(plan)
    assert (plan.step, plan.num_tokens, plan.num_decode, plan.num_seqs) == (1, 5, 0, 1)
    assert (plan.num_samples, plan.num_updates, plan.num_bias) == (1, 2, 5)
    assert (plan.max_q_len, plan.max_context, plan.graph_size) == (5, 5, 0)
    assert list(view.header) == [1, 5, 0, 1, 1, 2, 5, 0, 5, 5] + [0] * 6
    slot = view.seq_slot[0]
    assert list(view.q_start[:2]) == [0, 5] and view.context_len[0] == 5
    assert (view.sample_row[0], view.sample_slot[0], view.sample_position[0]) == (4, slot, 5)
    assert (view.temperature[0], view.top_k[0], view.top_p[0]) == (0.5, 40, 0.25)
    assert (view.min_p[0], view.presence[0], view.frequency[0]) == (0.125, 1.5, -0.5)
    assert view.repetition[0] == 1.25
    assert struct.pack("<ii", view.seed_lo[0], view.seed_hi[0]) == struct.pack("<Q", seed)
    assert view.sample_flags[0] == SampleFlag.HAS_PENALTIES | SampleFlag.HAS_BIAS
    assert list(view.bias_start[:2]) == [0, 5]
    biases = dict(zip(view.bias_id[:5], view.bias_value[:5], strict=True))
    ban = float("-inf")
    assert biases == {11: 2.5, 12: -100.0, 1: ban, 3: ban, 20: ban}
    pages = list(view.update_page[:2])
    assert list(view.update_slot[:2]) == [slot, slot] and list(view.update_column[:2]) == [0, 1]
    assert list(view.input_id[:5]) == [30, 31, 32, 33, 34]
    assert list(view.position[:5]) == [0, 1, 2, 3, 4]
    assert list(view.kv_slot[:5]) == [pages[0] * 4 + i for i in range(4)] + [pages[1] * 4]
    assert plan.histories == [(slot, array("i", [30, 31, 32, 33, 34]), 5)]
    scheduler.commit(plan, array("i", [50]))

    plain = SamplingParams(temperature=0.0)
    scheduler.add(0, pack_add(8, plain, [60, 61, 62], seed=1, max_tokens=9))
    assert scheduler.schedule(plan)
    assert (plan.step, plan.num_tokens, plan.num_decode, plan.num_seqs) == (2, 4, 1, 2)
    assert list(view.input_id[:4]) == [-1, 60, 61, 62]
    assert list(view.position[:4]) == [5, 0, 1, 2]
    assert view.kv_slot[0] == pages[1] * 4 + 1
    assert list(view.q_start[:3]) == [0, 1, 4] and list(view.context_len[:2]) == [6, 3]
    assert list(view.sample_row[:2]) == [0, 3] and list(view.sample_position[:2]) == [6, 3]
    assert list(view.bias_start[:3]) == [0, 5, 5]
    assert view.sample_flags[1] == 0 and view.temperature[1] == 0.0
    assert plan.histories == []
    assert (plan.max_q_len, plan.max_context) == (3, 3)


def test_bans_end_when_min_tokens_are_reached():
    engine = FakeEngine(page_size=4, num_pages=8, max_seqs=2, max_model_len=32, max_step_tokens=16)
    engine.add(1, [5, 6, 7], SamplingParams(min_tokens=3, ignore_eos=True, stop_token_ids=(4,)))
    counts = []
    for _ in range(6):
        view = engine.plans[0]
        engine.step()
        counts.append(view.plan.num_bias)
    assert counts == [1, 1, 1, 0, 0, 0]


def test_padding_adds_rows_that_touch_nothing():
    scheduler = make_scheduler()
    plan, memory = make_plan(scheduler)
    view = PlanView(plan, memory)
    for rid in range(2):
        params = SamplingParams(logit_bias={9: 1.0})
        scheduler.add(0, pack_add(rid, params, [5 + rid], seed=0, max_tokens=4))
    assert scheduler.schedule(plan)
    with pytest.raises(ValueError, match="decodes"):
        plan.pad(4)
    scheduler.commit(plan, array("i", [50, 51]))
    memory[16:] = array("i", [77] * (len(memory) - 16))  # nothing may rely on zeroed memory
    assert scheduler.schedule(plan)
    for size in (1, 5):
        with pytest.raises(ValueError, match="cannot pad"):
            plan.pad(size)
    plan.pad(4)
    assert (plan.num_seqs, plan.num_tokens, plan.graph_size) == (2, 2, 4)
    assert list(view.seq_slot[2:4]) == list(view.sample_slot[2:4]) == [4, 4]
    assert list(view.q_start[:5]) == [0, 1, 2, 3, 4]
    assert list(view.context_len[2:4]) == [0, 0]
    assert list(view.sample_row[2:4]) == [2, 3]
    assert list(view.sample_position[2:4]) == [0, 0]
    for name, value in {
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed_lo": 0, "seed_hi": 0,
        "presence": 0.0, "frequency": 0.0, "repetition": 1.0, "sample_flags": 0,
    }.items():  # fmt: skip
        assert list(getattr(view, name)[2:4]) == [value, value], name
    assert list(view.bias_start[2:5]) == [2, 2, 2]
    assert list(view.input_id[2:4]) == [0, 0] and list(view.position[2:4]) == [0, 0]
    assert list(view.kv_slot[2:4]) == [-1, -1]
    scheduler.commit(plan, array("i", [50, 51]))
