"""When requests are sent: seconds from the start of a run, in order.

Gaps follow a gamma distribution of shape ``burstiness`` and mean 1 / rate, as in vLLM's benchmark:
1 is a Poisson process, below 1 comes in bursts, infinity is a metronome. Without a ramp the times
are stretched so that the last request comes at exactly num / rate.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["linear", "exponential"]


@dataclass(frozen=True, slots=True)
class Ramp:
    """The rate goes from start to end (requests a second) over the requests of a run."""

    strategy: Strategy
    start_rps: float
    end_rps: float

    def rate(self, progress: float) -> float:
        """Requests a second; ``progress`` is 0 at the first request, 1 at the last."""
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return float(self.start_rps * (self.end_rps / self.start_rps) ** progress)


def arrival_times(
    num_requests: int,
    rate: float = math.inf,
    burstiness: float = 1.0,
    ramp: Ramp | None = None,
    seed: int = 0,
) -> array[float]:
    """Seconds at which each request is sent; all 0 where the rate is infinite."""
    rng = random.Random(f"arrivals {seed}")
    times = array("d")
    now = 0.0
    for index in range(num_requests):
        current = ramp.rate(index / max(num_requests - 1, 1)) if ramp else rate
        now += _gap(rng, current, burstiness)
        times.append(now)
    if ramp is None and now > 0:
        stretch = num_requests / rate / now
        times = array("d", (time * stretch for time in times))
    return times


def _gap(rng: random.Random, rate: float, burstiness: float) -> float:
    if math.isinf(rate):
        return 0.0
    if math.isinf(burstiness):
        return 1.0 / rate
    return rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
