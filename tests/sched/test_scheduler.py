"""What the scheduler decides: order, budget, admission, preemption, endings, errors."""

import random
from array import array

import pytest
from fake_device import EOS, VOCAB, FakeEngine, expected, make_plan, next_token

from minisgl_fast.errors import EngineError
from minisgl_fast.params import SamplingParams
from minisgl_fast.sched.scheduler import Scheduler
from minisgl_fast.wire import FinishReason, pack_add, unpack_step

ENDLESS = SamplingParams(ignore_eos=True)


def make_engine(**changes):
    config = {
        "num_pages": 64, "page_size": 4, "max_seqs": 4, "max_model_len": 128,
        "max_step_tokens": 32, "overlap": 0,
    }  # fmt: skip
    return FakeEngine(**config | changes)


def numbers(seed, count):
    rng = random.Random(seed)
    return [rng.randrange(2, VOCAB) for _ in range(count)]


def step(engine):
    """Run one step; [(rows, is_decode)] as (num_decode, tokens per sequence)."""
    view = engine.plans[0]
    before = engine.num_steps
    engine.step()
    if engine.num_steps == before:
        return None
    plan = view.plan
    lengths = [view.q_start[i + 1] - view.q_start[i] for i in range(plan.num_seqs)]
    return plan.num_decode, lengths


# Order and budget


def test_long_prompts_are_prefilled_in_chunks_beside_decodes():
    engine = make_engine(max_step_tokens=10)
    engine.add(1, numbers(1, 4), ENDLESS, max_tokens=20)
    engine.add(2, numbers(2, 25), ENDLESS, max_tokens=20)
    engine.add(3, numbers(3, 3), ENDLESS, max_tokens=20)
    assert step(engine) == (0, [4, 6])
    assert step(engine) == (1, [1, 9])
    assert step(engine) == (1, [1, 9])
    assert step(engine) == (1, [1, 1, 3])
    assert step(engine) == (3, [1, 1, 1])
    engine.drain()


def test_waiting_requests_go_by_priority_then_by_arrival():
    engine = make_engine(max_seqs=1)
    for rid, priority in ((1, 0), (2, 5), (3, -1), (4, 5), (5, 0)):
        engine.add(rid, numbers(rid, 3), ENDLESS, max_tokens=2, priority=priority)
    order = []
    while engine.scheduler.has_work():
        engine.step()
        order += [rid for _, rid in engine.reasons if rid not in order]
    assert order == [2, 4, 1, 5, 3]


def test_there_are_never_more_running_than_one_step_can_serve():
    engine = make_engine(max_step_tokens=2, max_seqs=4)
    for rid in range(4):
        engine.add(rid, numbers(rid, 5), ENDLESS, max_tokens=3)
    engine.drain()
    assert engine.max_rows == 2
    assert len(engine.reasons) == 4


def test_a_blocked_head_is_not_overtaken():
    engine = make_engine(num_pages=8, max_model_len=32)
    engine.add(1, numbers(1, 15), ENDLESS, max_tokens=4)
    step(engine)
    engine.add(2, numbers(2, 24), ENDLESS, max_tokens=4)
    engine.add(3, numbers(3, 2), ENDLESS, max_tokens=4)
    assert step(engine) == (1, [1])
    engine.drain()
    assert list(engine.reasons) == [(0, 1), (0, 2), (0, 3)]


def test_admission_counts_pages_of_the_prompt_and_not_max_tokens():
    engine = make_engine(num_pages=16, max_model_len=64)
    for rid in range(4):
        engine.add(rid, numbers(rid, 6), ENDLESS, max_tokens=58)
    assert step(engine) == (0, [6, 6, 6, 6])


def test_admission_leaves_one_page_per_running_request():
    engine = make_engine(num_pages=5, max_model_len=20)
    engine.add(1, numbers(1, 6), ENDLESS, max_tokens=2)
    engine.add(2, numbers(2, 6), ENDLESS, max_tokens=2)
    engine.add(3, numbers(3, 2), ENDLESS, max_tokens=2)
    assert step(engine) == (0, [6, 6])
    engine.drain()


# Prefix cache


def test_a_repeated_prompt_computes_at_least_one_token():
    engine = make_engine()
    prompt = numbers(1, 16)
    for rid in (1, 2):
        engine.add(rid, prompt, ENDLESS, max_tokens=3)
        assert step(engine) == (0, [16 if rid == 1 else 4])
        engine.drain()
    assert (engine.cached[0, 1], engine.cached[0, 2]) == (0, 12)
    assert engine.tokens[0, 1] == engine.tokens[0, 2]
    engine.add(3, prompt + engine.tokens[0, 1], ENDLESS, max_tokens=3)
    engine.drain()
    assert engine.cached[0, 3] == 16


@pytest.mark.parametrize("overlap", (0, 1))
def test_requests_that_arrive_together_compute_a_common_prefix_once(overlap):
    engine = make_engine(overlap=overlap)
    common = numbers(3, 18)
    for rid in (1, 2, 3):
        engine.add(rid, [*common, rid], seed=rid)
    assert step(engine) == (0, [19, 3, 3])
    engine.drain()
    assert [engine.cached[0, rid] for rid in (1, 2, 3)] == [0, 16, 16]
    for rid in (1, 2, 3):
        prompt = [*common, rid]
        text, _ = expected(prompt, SamplingParams(), seed=rid, max_tokens=8, max_model_len=128)
        assert engine.tokens[0, rid] == text


def test_chunks_are_shared_while_their_prompt_is_still_prefilled():
    engine = make_engine(max_step_tokens=9)
    prompt = numbers(1, 40)
    engine.add(1, prompt, ENDLESS, max_tokens=3)
    for _ in range(4):
        step(engine)
    engine.add(2, prompt[:30] + [1], ENDLESS, max_tokens=3)
    engine.drain()
    assert engine.cached[0, 2] == 28


def test_decoded_pages_are_shared():
    engine = make_engine()
    engine.add(1, numbers(1, 6), ENDLESS, max_tokens=11)
    engine.drain()
    again = numbers(1, 6) + engine.tokens[0, 1]
    engine.add(2, again + [5], ENDLESS, max_tokens=2)
    engine.drain()
    # 17 tokens, the last of which was never computed.
    assert engine.cached[0, 2] == 16


def test_another_salt_shares_nothing():
    engine = make_engine()
    for rid, salt in ((1, 0), (2, 7), (3, 2**64 - 1), (4, 7)):
        engine.add(rid, numbers(1, 12), ENDLESS, max_tokens=2, cache_salt=salt)
        engine.drain()
    assert [engine.cached[0, rid] for rid in (1, 2, 3, 4)] == [0, 0, 0, 8]


def test_cached_tokens_are_told_once_and_as_first_found():
    engine = make_engine(num_pages=10, max_model_len=40)
    prompt = numbers(1, 8)
    engine.add(0, prompt, ENDLESS, max_tokens=1)
    engine.drain()
    for rid in (1, 2):
        engine.add(rid, prompt + numbers(rid, 6), ENDLESS, max_tokens=18)
    engine.drain()
    stats = engine.scheduler.stats()
    assert stats["preemptions"] > 0
    assert (engine.cached[0, 1], engine.cached[0, 2]) == (8, 8)
    assert (stats["prompt_tokens"], stats["cached_tokens"]) == (8 + 2 * 14, 16)


# Shortage


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_youngest_is_preempted_and_still_writes_the_same_text(overlap):
    engine = make_engine(num_pages=12, max_model_len=40, overlap=overlap)
    for rid in range(3):
        engine.add(rid, numbers(rid, 9), ENDLESS, seed=rid, max_tokens=20)
    engine.drain()
    assert engine.scheduler.stats()["preemptions"] > 0
    for rid in range(3):
        want = expected(numbers(rid, 9), ENDLESS, seed=rid, max_tokens=20, max_model_len=40)
        assert (engine.tokens[0, rid], engine.reasons[0, rid]) == want
    assert list(engine.reasons)[0] == (0, 0)


def test_lower_priority_gives_way_before_the_younger():
    engine = make_engine(num_pages=8, max_model_len=32)
    engine.add(1, numbers(1, 8), ENDLESS, max_tokens=20, priority=0)
    step(engine)
    engine.add(2, numbers(2, 8), ENDLESS, max_tokens=20, priority=1)
    engine.drain()
    assert engine.scheduler.stats()["preemptions"] > 0
    assert list(engine.reasons) == [(0, 2), (0, 1)]


@pytest.mark.parametrize("overlap", [0, 1])
def test_one_that_cannot_grow_alone_ends_with_length(overlap):
    engine = make_engine(num_pages=4, max_model_len=100, overlap=overlap)
    prompt = numbers(1, 10)
    engine.add(1, prompt, ENDLESS, max_tokens=50)
    engine.add(2, numbers(2, 3), ENDLESS, max_tokens=2)
    engine.drain()
    want, _ = expected(prompt, ENDLESS, seed=0, max_tokens=50, max_model_len=100)
    # 16 token slots, and a last token without one.
    assert engine.tokens[0, 1] == want[:7]
    assert engine.reasons == {(0, 1): FinishReason.LENGTH, (0, 2): FinishReason.LENGTH}


def test_a_prompt_that_fits_neither_pool_nor_context_is_an_error():
    engine = make_engine(num_pages=4, max_model_len=20)
    engine.add(1, numbers(1, 17), ENDLESS)
    engine.add(2, numbers(1, 20), ENDLESS)
    engine.add(3, numbers(1, 16), ENDLESS)
    engine.take()
    assert engine.reasons == {(0, 1): FinishReason.ERROR, (0, 2): FinishReason.ERROR}
    engine.drain()
    assert engine.reasons[0, 3] == FinishReason.LENGTH and len(engine.tokens[0, 3]) == 1


def test_biases_of_all_running_requests_fit_the_plan():
    engine = make_engine(plan_changes={"max_bias": 5})
    for rid in range(3):
        params = SamplingParams(ignore_eos=True, logit_bias={5: 1.0, 6: 1.0})
        engine.add(rid, numbers(rid, 3), params, max_tokens=3)
    too_many = SamplingParams(logit_bias=dict.fromkeys(range(6), 0.5))
    engine.add(9, numbers(9, 3), too_many, max_tokens=3)
    assert step(engine) == (0, [3, 3])
    engine.drain()
    assert engine.reasons.pop((0, 9)) == FinishReason.ERROR
    assert set(engine.reasons.values()) == {FinishReason.LENGTH}


def test_updates_of_one_step_fit_the_plan():
    engine = make_engine(max_seqs=2, max_model_len=40, plan_changes={"max_updates": 12})
    for rid in range(2):
        engine.add(rid, numbers(rid, 30), ENDLESS, max_tokens=3)
    engine.scheduler.check()
    assert step(engine) == (0, [30])
    assert step(engine) == (1, [1, 30])
    engine.drain()


# Endings


def test_eos_stop_token_and_length_end_a_request_with_the_token_delivered():
    prompt = numbers(5, 7)
    want, _ = expected(prompt, ENDLESS, seed=3, max_tokens=8, max_model_len=128)
    stop = next(token for token in want if token not in (EOS, want[0]))
    cut = want.index(stop) + 1
    engine = make_engine(eos_ids=[EOS, stop])
    engine.add(1, prompt, SamplingParams(), seed=3)
    engine.add(2, prompt, SamplingParams(ignore_eos=True, stop_token_ids=(stop,)), seed=3)
    engine.add(3, prompt, SamplingParams(ignore_eos=True), seed=3)
    engine.drain()
    assert engine.tokens == {(0, 1): want[:cut], (0, 2): want[:cut], (0, 3): want}
    assert list(engine.reasons.values()) == [
        FinishReason.EOS, FinishReason.STOP_TOKEN, FinishReason.LENGTH,
    ]  # fmt: skip


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_nan_row_ends_its_request_alone_and_leaves_the_cache(overlap):
    engine = make_engine(overlap=overlap)
    prompt = numbers(1, 14)
    engine.device.nan_tokens = {VOCAB + 1}
    engine.add(1, [*prompt, VOCAB + 1], ENDLESS)
    engine.add(2, prompt, ENDLESS)
    engine.drain()
    assert (engine.tokens[0, 1], engine.reasons[0, 1]) == ([], FinishReason.ERROR)
    assert engine.reasons[0, 2] == FinishReason.LENGTH
    assert engine.scheduler.cache.num_nodes == (14 + 8 - 1) // 4
    engine.add(3, [*prompt, VOCAB + 1, 5, 6, 7], ENDLESS)
    engine.drain()
    assert engine.cached[0, 3] == 12


# Abort


def overlapped_engine(num_rids=3):
    engine = make_engine(overlap=1, max_seqs=2, num_pages=16, max_model_len=64)
    for rid in range(num_rids):
        engine.add(rid, numbers(rid, 7), ENDLESS, max_tokens=30)
    return engine


def test_abort_while_waiting():
    engine = overlapped_engine()
    engine.scheduler.abort(0, 1)
    engine.scheduler.abort(0, 1)
    engine.scheduler.abort(5, 1)
    engine.scheduler.abort(0, 77)
    engine.take()
    assert engine.reasons == {(0, 1): FinishReason.ABORTED}
    assert engine.scheduler.stats()["aborted"] == 1
    engine.drain()
    assert len(engine.tokens[0, 0]) == len(engine.tokens[0, 2]) == 30


def test_abort_with_a_step_in_flight_keeps_the_pages_until_its_commit():
    engine = overlapped_engine()
    engine.step()
    engine.scheduler.abort(0, 0)
    engine.scheduler.check()
    assert engine.scheduler.stats()["pages_used"] == 4
    engine.scheduler.abort(0, 1)
    assert not engine.scheduler.flush_cache()
    # Both slots are still in flight: nothing can be admitted before the commit.
    plan, _ = make_plan(engine.scheduler)
    assert not engine.scheduler.schedule(plan)
    assert engine.scheduler.has_work()
    view, tokens = engine.in_flight.popleft()
    engine.scheduler.commit(view.plan, tokens)
    engine.plans.append(view)
    engine.scheduler.check()
    assert engine.scheduler.stats()["pages_used"] == 0
    engine.drain()
    assert engine.tokens[0, 0] == engine.tokens[0, 1] == []
    assert len(engine.tokens[0, 2]) == 30


def test_abort_of_a_preempted_request_whose_step_is_in_flight():
    engine = make_engine(overlap=1, num_pages=7, max_model_len=28)
    engine.add(1, numbers(1, 7), ENDLESS, max_tokens=20)
    engine.add(2, numbers(2, 7), ENDLESS, max_tokens=20)
    while not engine.scheduler.stats()["preemptions"]:
        engine.step()
    assert engine.in_flight
    engine.scheduler.abort(0, 2)
    engine.scheduler.check()
    engine.drain()
    assert engine.reasons[0, 2] == FinishReason.ABORTED
    assert len(engine.tokens[0, 1]) == 20


def test_a_rid_can_be_used_again_at_once():
    engine = overlapped_engine()
    engine.step()
    engine.step()
    engine.scheduler.abort(0, 0)
    engine.take()
    del engine.reasons[0, 0], engine.tokens[0, 0], engine.cached[0, 0]
    engine.add(0, numbers(9, 5), ENDLESS, max_tokens=4)
    engine.drain()
    want = expected(numbers(9, 5), ENDLESS, seed=0, max_tokens=4, max_model_len=64)
    assert (engine.tokens[0, 0], engine.reasons[0, 0]) == want


def test_the_requests_of_a_lost_channel_end_silently():
    engine = overlapped_engine()
    engine.add(0, numbers(9, 5), ENDLESS, max_tokens=4, channel=1)
    engine.step()
    engine.step()
    engine.scheduler.abort_channel(0)
    engine.scheduler.abort_channel(8)
    engine.drain()
    assert set(engine.reasons) == {(1, 0)}
    assert engine.scheduler.stats()["aborted"] == 3
    assert engine.scheduler.stats()["pages_used"] == 0


# Frames, errors, idleness


def test_frames_are_packed_per_channel():
    scheduler = Scheduler(16, 4, 4, 64, 32, [EOS])
    plan, _ = make_plan(scheduler)
    for channel, rid in ((0, 3), (7, 3), (7, 4)):
        scheduler.add(channel, pack_add(rid, ENDLESS, [5, 6], seed=0, max_tokens=1))
    assert scheduler.take_frames() == []
    assert scheduler.schedule(plan)
    scheduler.commit(plan, array("i", [50, 51, 52]))
    frames = {channel: unpack_step(payload) for channel, _, payload in scheduler.take_frames()}
    length = FinishReason.LENGTH
    assert frames == {
        0: ([(3, 50, length)], [(3, 0)]),
        7: ([(3, 51, length), (4, 52, length)], [(3, 0), (4, 0)]),
    }
    assert scheduler.take_frames() == []


def test_malformed_and_repeated_adds_are_engine_errors():
    scheduler = Scheduler(16, 4, 4, 64, 32, [EOS])
    good = pack_add(1, ENDLESS, [5, 6], seed=0, max_tokens=1)
    for bad in (b"", good[:-1], good + b"\0", pack_add(1, ENDLESS, [], seed=0, max_tokens=1)):
        with pytest.raises(EngineError, match="malformed"):
            scheduler.add(0, bad)
    scheduler.add(0, good)
    with pytest.raises(EngineError, match="twice"):
        scheduler.add(0, good)
    scheduler.check()
    assert scheduler.stats()["queued"] == 1


def test_plans_and_commits_are_used_in_order():
    scheduler = Scheduler(16, 4, 4, 64, 32, [EOS])
    (first, _memory), (second, _other) = make_plan(scheduler), make_plan(scheduler)
    scheduler.add(0, pack_add(1, ENDLESS, [5, 6], seed=0, max_tokens=9))
    tokens = array("i", [50])
    with pytest.raises(EngineError, match="order"):
        scheduler.commit(first, tokens)
    assert scheduler.schedule(first)
    with pytest.raises(EngineError, match="not committed"):
        scheduler.schedule(first)
    assert scheduler.schedule(second)
    with pytest.raises(EngineError, match="order"):
        scheduler.commit(second, tokens)
    with pytest.raises(ValueError, match="1 tokens were sampled, got 0"):
        scheduler.commit(first, array("i"))
    scheduler.commit(first, tokens)
    with pytest.raises(EngineError, match="order"):
        scheduler.commit(first, tokens)
    scheduler.commit(second, tokens)
    scheduler.check()


def test_a_plan_of_the_wrong_capacity_is_refused():
    scheduler = Scheduler(16, 4, 4, 64, 32, [EOS])
    for changes in ({"max_seqs": 5}, {"max_updates": 19}):
        plan, _memory = make_plan(scheduler, **changes)
        with pytest.raises(ValueError, match="does not suit"):
            scheduler.schedule(plan)


@pytest.mark.parametrize(
    "changes",
    [{"max_seqs": 0}, {"max_step_tokens": 0}, {"page_size": 12}, {"num_pages": 0},
     {"page_size": 256, "num_pages": 2**23}],
)  # fmt: skip
def test_impossible_sizes_are_refused(changes):
    config = {
        "num_pages": 4, "page_size": 4, "max_seqs": 4, "max_model_len": 64,
        "max_step_tokens": 32, "eos_ids": [],
    }  # fmt: skip
    with pytest.raises(ValueError):
        Scheduler(**config | changes)


def test_flush_empties_the_cache_only_when_idle():
    engine = make_engine()
    engine.add(1, numbers(1, 12), ENDLESS, max_tokens=2)
    assert not engine.scheduler.flush_cache()
    engine.drain()
    assert engine.scheduler.stats()["pages_cached"] == 3
    assert engine.scheduler.flush_cache()
    assert engine.scheduler.stats()["pages_cached"] == 0
    engine.add(2, numbers(1, 12), ENDLESS, max_tokens=2)
    engine.drain()
    assert engine.cached[0, 2] == 0


def test_stats_have_the_fields_of_the_frame():
    engine = make_engine()
    engine.add(1, numbers(1, 12), ENDLESS, max_tokens=5)
    engine.step()
    assert engine.scheduler.stats() == {
        "running": 1, "queued": 0, "queued_tokens": 0, "pages_total": 64, "pages_free": 61,
        "pages_cached": 0, "pages_used": 3, "preemptions": 0, "steps": 1,
        "prompt_tokens": 12, "cached_tokens": 0, "generated_tokens": 1, "aborted": 0,
    }  # fmt: skip


def test_nothing_to_do_is_no_step():
    scheduler = Scheduler(16, 4, 4, 64, 32, [EOS])
    plan, _ = make_plan(scheduler)
    assert not scheduler.has_work() and not scheduler.schedule(plan)
    assert plan.num_tokens == 0 and not plan.in_flight


def test_the_fake_model_can_tell_texts_apart():
    """The oracle of these tests: a changed token, place, length or seed changes what follows."""
    context = numbers(1, 30)
    swapped = context[:10] + [context[11], context[10]] + context[12:]
    others = [context[:-1], [context[0] + 1, *context[1:]], context[::-1], context + [5]]
    seeds = range(40)
    text = [next_token(context, seed) for seed in seeds]
    for other in others:
        assert text != [next_token(other, seed) for seed in seeds]
    assert text != [next_token(context, seed + 1) for seed in seeds]
    assert text != [next_token(swapped, seed) for seed in seeds]
