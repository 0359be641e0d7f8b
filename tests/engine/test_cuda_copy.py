"""Words between pinned memory and the GPU: those that a step uses are copied, no others touched."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from minisgl_fast.engine.cuda_copy import MAX_RANGES, USED, UsedWords, WordCopier
from minisgl_fast.sched.plan import PlanCapacity


@pytest.mark.parametrize("seed", range(20))
def test_used_words_are_each_section_up_to_its_count(seed: int) -> None:
    rng = random.Random(seed)
    max_seqs = rng.randint(1, 300)
    max_tokens = max_seqs + rng.randint(0, 300)
    capacity = PlanCapacity(max_tokens, max_seqs, rng.randint(1, 300), rng.randint(0, 300))
    sections = capacity.offsets()
    longest = dict.fromkeys(USED.values(), capacity.num_words)
    for name, count in USED.items():
        longest[count] = min(longest[count], sections[name][1])
    counts = {
        count: rng.choice([0, 1, most, rng.randint(0, most)]) for count, most in longest.items()
    }
    plan = SimpleNamespace(num_bias=counts["num_bias"], num_updates=counts["num_updates"])

    ranges = UsedWords(capacity)(plan, counts["num_tokens"])

    copied = [word for first, count in ranges for word in range(first, first + count)]
    needed = {
        word
        for name, (first, length) in sections.items()
        for word in range(first, first + (counts[USED[name]] if name in USED else length))
    }
    assert len(ranges) <= MAX_RANGES and min(count for _, count in ranges) > 0
    assert len(copied) == len(set(copied)) and max(copied) < capacity.num_words
    assert needed <= set(copied)
    # What is more aligns the section behind it.
    assert len(copied) - len(needed) < 4 * len(sections)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("to_device", [True, False])
@pytest.mark.parametrize("num_ranges", [1, 3, MAX_RANGES])
def test_ranges_are_copied_and_nothing_else(num_ranges: int, to_device: bool) -> None:
    rng = random.Random(num_ranges)
    cuts = sorted(rng.sample(range(20_000), 2 * num_ranges))
    ranges = [(first, end - first) for first, end in zip(cuts[::2], cuts[1::2], strict=True)]
    ranges[0] = (ranges[0][0], 1)
    pinned = torch.arange(20_000, dtype=torch.int32).pin_memory()
    device = -torch.arange(20_000, dtype=torch.int32, device="cuda")
    to, source = (device, pinned) if to_device else (pinned, device)
    expected, values = to.clone().cpu(), source.clone().cpu()
    for first, count in ranges:
        expected[first : first + count] = values[first : first + count]

    WordCopier()(to, source, ranges)
    torch.cuda.synchronize()

    assert torch.equal(to.cpu(), expected) and torch.equal(source.cpu(), values)
