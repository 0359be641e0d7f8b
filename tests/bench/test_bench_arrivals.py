"""When requests are sent."""

import math
import statistics

import pytest

from minisgl_fast.bench.arrivals import Ramp, arrival_times


def gaps(times):
    return [b - a for a, b in zip([0.0, *times], times, strict=False)]


def test_an_infinite_rate_sends_all_at_once():
    assert list(arrival_times(5)) == [0.0] * 5


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_follow_a_gamma_distribution(burstiness):
    times = arrival_times(20_000, rate=50.0, burstiness=burstiness, seed=1)
    assert times[-1] == pytest.approx(20_000 / 50.0, rel=1e-9)
    assert list(times) == sorted(times)
    found = gaps(times)
    variation = statistics.pstdev(found) / statistics.mean(found)
    assert variation**2 == pytest.approx(1 / burstiness, rel=0.1)


def test_poisson_gaps_are_exponential():
    found = gaps(arrival_times(20_000, rate=10.0, seed=2))
    longer = sum(gap > 0.2 for gap in found) / len(found)
    assert longer == pytest.approx(math.exp(-2), rel=0.05)


def test_infinite_burstiness_is_a_metronome():
    times = arrival_times(4, rate=2.0, burstiness=math.inf)
    assert list(times) == pytest.approx([0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize(
    ("strategy", "rates"), [("linear", [1.0, 4.5, 8.0]), ("exponential", [1.0, 8**0.5, 8.0])]
)
def test_a_ramp_raises_the_rate_over_the_requests(strategy, rates):
    ramp = Ramp(strategy, 1.0, 8.0)
    times = arrival_times(3, burstiness=math.inf, ramp=ramp)
    assert gaps(times) == pytest.approx([1 / rate for rate in rates])


def test_the_seed_decides():
    first, again, other = (arrival_times(50, 5.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
