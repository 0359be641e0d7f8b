"""Log-probabilities of logits: against torch.log_softmax, ties in order, broken rows apart."""

from __future__ import annotations

import pytest
import torch

from minisgl_fast.backend.logprobs import score

NEG_INF = float("-inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_they_are_those_of_the_whole_vocabulary_and_list_ids_with_a_text(dtype, num_top):
    logits = (torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    logits[:, 295] = 30.0  # an id that is never listed, but counts
    kept = logits.clone()
    targets = torch.tensor([0, 5, 299, 17, 290], dtype=torch.int32)
    scores = score(logits, targets, num_top, 290)
    assert torch.equal(logits, kept)
    expected = logits.double().log_softmax(-1)
    chosen = expected.gather(1, targets.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(scores.chosen.double(), chosen, rtol=0, atol=1e-5)
    # bfloat16 has few values: ties everywhere.
    order = logits[:, :290].float().sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    assert torch.equal(scores.top_ids, order.int())
    torch.testing.assert_close(
        scores.top_values.double(), expected.gather(1, order), rtol=0, atol=1e-5
    )


def test_ties_are_listed_by_id_wherever_they_stand():
    logits = torch.zeros(3, 64)
    logits[1, 40:] = 1.0
    logits[2, 63] = 1.0
    top_ids = score(logits, torch.zeros(3), 4, 64).top_ids.tolist()
    assert top_ids == [[0, 1, 2, 3], [40, 41, 42, 43], [63, 0, 1, 2]]


def test_a_token_that_is_listed_has_the_same_value_to_the_last_bit():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(2)) * 5
    best = logits.argmax(-1)
    scores = score(logits, best, 1, 1000)
    assert torch.equal(scores.chosen, scores.top_values[:, 0])
    assert torch.equal(scores.top_ids[:, 0].long(), best)


def test_a_vocabulary_smaller_than_the_list_ends_it():
    scores = score(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]), 5, 2)
    assert scores.top_ids.tolist() == [[1, 0, -1, -1, -1]]
    assert scores.top_values[0, 2:].tolist() == [NEG_INF] * 3


def test_broken_rows_are_told_and_leave_the_others_alone():
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
    logits[1, 5] = float("nan")
    logits[2, 5] = float("inf")
    alone = score(logits[[0, 3]], torch.tensor([1, 2]), 3, 40)
    scores = score(logits, torch.tensor([1, 1, 1, 2]), 3, 40)
    assert scores.chosen.isnan().tolist() == [False, True, True, False]
    for beside, lone in zip(scores, alone, strict=True):
        assert torch.equal(beside[[0, 3]], lone)


def test_no_rows_give_no_scores():
    scores = score(torch.zeros(0, 40), torch.zeros(0), 3, 40)
    assert [tuple(values.shape) for values in scores] == [(0,), (0, 3), (0, 3), (0,)]
