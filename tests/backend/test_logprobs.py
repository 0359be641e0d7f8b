"""The sampler's log-probabilities against torch.log_softmax, in all kinds of rows."""

from __future__ import annotations

import pytest
import torch
from step_driver import make_step

from minisgl_fast.backend.sampling import sample
from minisgl_fast.backend.step import (
    HAS_BIAS,
    HAS_LOGPROBS,
    HAS_PENALTIES,
    NUM_TOP,
    DeviceState,
    Logprobs,
)

CPU = torch.device("cpu")
NEG_INF = float("-inf")


def make_state(rows: int, vocab: int) -> DeviceState:
    return DeviceState(rows, 1, vocab, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_log_softmax_before_temperature_and_filters(dtype):
    logits = (torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    params = [
        {},
        {"temperature": 0.5, "top_k": 3},
        {"temperature": 100.0, "top_p": 0.5},
        {"temperature": 2.0, "min_p": 0.2},
    ]
    params = [one | {"sample_flags": HAS_LOGPROBS, "seed_lo": 3} for one in params]
    step = make_step(sample_slots=[0, 1, 2, 3], params=params)
    out = Logprobs.allocate(4, CPU)
    kept = logits.clone()
    tokens = sample(logits, step, make_state(4, 300), 290, out)
    assert torch.equal(logits, kept)
    expected = logits[:, :290].float().log_softmax(-1)
    chosen = expected.gather(1, tokens.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(out.chosen, chosen, rtol=0, atol=2e-6)
    order = logits[:, :290].float().sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(out.ids, order[:, :NUM_TOP].int())
    largest = expected.gather(1, order[:, :NUM_TOP])
    torch.testing.assert_close(out.values, largest, rtol=0, atol=2e-6)
    # The tokens are those of the same rows without the flag.
    plain = make_step(
        sample_slots=[0, 1, 2, 3], params=[one | {"sample_flags": 0} for one in params]
    )
    assert sample(logits, plain, make_state(4, 300), 290).tolist() == tokens.tolist()
    assert sample(logits, step, make_state(4, 300), 290).tolist() == tokens.tolist()


def test_penalties_and_bias_count_and_banned_ids_are_not_listed():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    flags = HAS_LOGPROBS | HAS_BIAS | HAS_PENALTIES
    step = make_step(
        sample_slots=[0],
        params=[{"sample_flags": flags, "presence": 2.0}],
        biases=[{3: NEG_INF, 0: 5.0}],
    )
    state = make_state(1, 4)
    state.counts[0, 2] = 1
    out = Logprobs.allocate(1, CPU)
    assert sample(logits, step, state, 4, out).tolist() == [0]
    expected = torch.tensor([6.0, 2.0, 1.0]).log_softmax(0)
    assert out.ids[0, :4].tolist() == [0, 1, 2, -1]
    torch.testing.assert_close(out.values[0, :3], expected)
    assert (out.values[0, 3:] == NEG_INF).all() and (out.ids[0, 3:] == -1).all()
    torch.testing.assert_close(out.chosen, expected[:1])


def test_ties_are_listed_by_id():
    step = make_step(sample_slots=[0], params=[{"sample_flags": HAS_LOGPROBS}])
    out = Logprobs.allocate(1, CPU)
    sample(torch.zeros(1, 50), step, make_state(1, 50), 50, out)
    assert out.ids[0].tolist() == list(range(NUM_TOP))
    torch.testing.assert_close(out.values[0], torch.full((NUM_TOP,), 1 / 50).log())


def test_rows_that_do_not_ask_are_left_alone_and_broken_ones_are_empty():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 5] = float("nan")
    flags = [0, HAS_LOGPROBS, HAS_LOGPROBS]
    step = make_step(sample_slots=[0, 1, 2], params=[{"sample_flags": f} for f in flags])
    out = Logprobs.allocate(3, CPU)
    for tensor in (out.ids, out.values, out.chosen):
        tensor.fill_(9)
    tokens = sample(logits, step, make_state(3, 40), 40, out)
    assert tokens[1] == -1
    assert (out.ids[0] == 9).all() and (out.values[0] == 9).all() and out.chosen[0] == 9
    assert (out.ids[1] == -1).all() and (out.values[1] == NEG_INF).all()
    assert out.chosen[1] == NEG_INF
    assert out.ids[2, 0] == tokens[2]
