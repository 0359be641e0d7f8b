"""Rate: how fast a counter grows, over the last seconds."""

from __future__ import annotations

from collections import deque

WINDOW_S = 5.0


class Rate:
    """Growth per second of a counter that somebody reads now and then."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, value: int, now: float) -> None:
        """The counter stood at ``value`` at ``now``, in seconds of a steady clock."""
        self._samples.append((now, value))
        self._forget(now)

    def per_second(self, now: float) -> float:
        """Over ``WINDOW_S``, or less at the beginning; 0 where nothing was heard for so long."""
        self._forget(now)
        if len(self._samples) < 2:
            return 0.0
        (start, first), (_, last) = self._samples[0], self._samples[-1]
        return (last - first) / max(now - start, 1e-3)

    def _forget(self, now: float) -> None:
        while self._samples and self._samples[0][0] < now - WINDOW_S:
            self._samples.popleft()
