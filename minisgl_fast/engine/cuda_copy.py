"""Copies of words between pinned memory and the GPU by a kernel, as part of the stream of kernels.

A copy engine would take the words as quickly, but the stream then waits for it and the kernels for
the stream: some 15 us a step on an H200, where a step of one row has 700.
"""

from __future__ import annotations

from torch import Tensor

from minisgl_fast.backend.kernel import get_kernel
from minisgl_fast.sched.plan import PlanCapacity, StepPlan

BLOCK = 256
MAX_RANGES = 10

# Sections of a plan of which only the first so many words are used.
USED = {
    "bias_id": "num_bias",
    "bias_value": "num_bias",
    "update_slot": "num_updates",
    "update_column": "num_updates",
    "update_page": "num_updates",
    "input_id": "num_tokens",
    "position": "num_tokens",
    "kv_slot": "num_tokens",
}

Range = tuple[int, int]  # first word, number of words


class WordCopier:
    """Enqueues copies on torch's current stream; nothing waits."""

    def __init__(self) -> None:
        self._kernel = get_kernel("step", "copy_ranges")

    def __call__(self, to: Tensor, source: Tensor, ranges: list[Range]) -> None:
        """``to`` and ``source`` int32, one of them pinned; up to MAX_RANGES ranges of both."""
        longest = max(count for _, count in ranges)
        words = [word for one in ranges for word in one]
        words += [0] * (2 * MAX_RANGES - len(words))
        self._kernel.launch(
            (-(-longest // BLOCK), len(ranges)),
            BLOCK,
            (to.data_ptr(), source.data_ptr(), *words),
            pdl=True,
        )


class UsedWords:
    """Which words of a plan a step uses."""

    def __init__(self, capacity: PlanCapacity) -> None:
        self._whole: list[Range] = []  # sections that are copied at their full length
        self._partial: list[tuple[int, str]] = []
        for name, (first, length) in sorted(capacity.offsets().items(), key=lambda item: item[1]):
            if name in USED:
                self._partial.append((first, USED[name]))
            elif self._whole and first - sum(self._whole[-1]) < 4:  # what aligns it lies between
                start = self._whole[-1][0]
                self._whole[-1] = (start, first + length - start)
            else:
                self._whole.append((first, length))
        assert len(self._whole) + len(self._partial) <= MAX_RANGES

    def __call__(self, plan: StepPlan, num_tokens: int) -> list[Range]:
        """``num_tokens``: those of the plan, padding included."""
        counts = {
            "num_bias": plan.num_bias,
            "num_updates": plan.num_updates,
            "num_tokens": num_tokens,
        }
        partial = [(first, counts[name]) for first, name in self._partial]
        return self._whole + [one for one in partial if one[1]]
