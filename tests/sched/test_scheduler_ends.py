"""How requests end in the scheduler, what its frames say, and which calls are errors."""

from array import array

import pytest
from fake_device import EOS, VOCAB, expected, make_plan, next_token
from small_engine import ENDLESS, make_engine, numbers

from minisgl_fast.errors import EngineError
from minisgl_fast.params import SamplingParams
from minisgl_fast.sched.scheduler import Scheduler
from minisgl_fast.wire import FinishReason, pack_add, unpack_step

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
