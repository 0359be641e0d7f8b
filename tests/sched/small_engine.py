"""A scheduler with a fake device, small enough to count its steps by hand."""

import random

from fake_device import VOCAB, FakeEngine

from minisgl_fast.params import SamplingParams

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
