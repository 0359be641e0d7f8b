"""What the scheduler decides: order, budget, admission, shared prefixes, preemption."""

import pytest
from fake_device import expected
from small_engine import ENDLESS, make_engine, numbers, step

from minisgl_fast.params import SamplingParams
from minisgl_fast.wire import FinishReason

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
