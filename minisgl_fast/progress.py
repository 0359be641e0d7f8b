"""Progress of long work: a bar on a terminal, a line now and then elsewhere.

A ``Progress`` is called as ``progress(stage, done, total)``; ``done == total`` ends a stage. It is
what downloads, weight loading, kernel compilation and graph capture report to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

Progress = Callable[[str, int, int], None]

LINE_INTERVAL_S = 5.0


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


class ConsoleProgress:
    """Progress on stderr."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm[NoReturn] | None = None
        self._last_line_s = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._draw(stage, done, total)
        else:
            self._print(stage, done, total)

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or self._stage != stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=stage, unit_scale=True, file=sys.stderr)
        bar = self._bar
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            self.close()

    def _print(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        finished = done >= total
        if stage == self._stage and not finished and now - self._last_line_s < LINE_INTERVAL_S:
            return
        self._stage = "" if finished else stage
        self._last_line_s = now
        print(f"{stage}: {done}/{total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar that is open, if one is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
