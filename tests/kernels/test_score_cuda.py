"""Log-probabilities on the GPU: those of the CPU reference, and the host waits for none of them."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minisgl_fast.backend.logprobs import score
from minisgl_fast.engine.outputs import compute, to_bytes
from minisgl_fast.wire import Task

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = [pytest.mark.gpu, needs_gpu]

VOCAB, LIMIT, NUM_ROWS = 151936, 151669, 9


def draw(dtype: torch.dtype) -> torch.Tensor:
    """Rows as a model's, rows of ties, a row that is broken and one with banned ids."""
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(NUM_ROWS, VOCAB, generator=generator) * 3).to(dtype)
    logits[2] = 0.0
    logits[3, ::2] = -0.0
    logits[4, 77] = float("nan")
    logits[5, 9:] = float("-inf")
    logits[6, LIMIT:] = 50.0  # no text, so never listed; but part of the sum
    return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_scores_are_those_of_the_cpu(dtype: torch.dtype, num_top: int) -> None:
    logits, targets = draw(dtype), torch.arange(NUM_ROWS)
    expected = score(logits, targets, num_top, LIMIT)
    got = score(logits.cuda(), targets.cuda(), num_top, LIMIT)
    sound = [row for row in range(NUM_ROWS) if row != 4]
    assert got.chosen[4].isnan() and expected.chosen[4].isnan()
    torch.testing.assert_close(
        got.chosen.cpu()[sound], expected.chosen[sound], rtol=1e-6, atol=1e-5
    )
    assert torch.equal(got.top_ids.cpu()[sound], expected.top_ids[sound])
    torch.testing.assert_close(
        got.top_values.cpu()[sound], expected.top_values[sound], rtol=1e-6, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_outputs_of_samples_wait_for_nothing() -> None:
    logits = draw(torch.bfloat16).cuda()
    tokens = torch.arange(NUM_ROWS, dtype=torch.int32).cuda()
    spans: list[Any] = [
        SimpleNamespace(sample=row, task=Task.GENERATE, num_top=num_top, ids=array("i", (5, 6)))
        for row, num_top in zip(range(NUM_ROWS), (0, 1, 5, 20, 20, 3, 2, 1, 0), strict=True)
    ]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    model: Any = None  # samples need none
    try:
        outputs = compute(spans, model, None, logits, tokens, LIMIT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    bodies = to_bytes(outputs)
    assert [body is None for body in bodies] == [row == 4 for row in range(NUM_ROWS)]
    expected = score(logits.cpu(), tokens.cpu(), 20, LIMIT)
    for row in (3, 7):
        chosen, ids, values, named = outputs[row]
        torch.testing.assert_close(chosen, expected.chosen[row : row + 1], rtol=1e-6, atol=1e-5)
        assert ids.tolist() == expected.top_ids[row, : spans[row].num_top].tolist()
        by_name = logits[row, 5:7].float().cpu() - expected.normalizer[row]
        torch.testing.assert_close(named.flatten(), by_name, rtol=1e-6, atol=1e-5)
