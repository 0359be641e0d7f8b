"""Statistics against numpy, and their bounds."""

import random

import numpy as np
import pytest

from minisgl_fast.bench.reader import GENERATE, ResponseReader
from minisgl_fast.bench.samples import BINS_PER_DECADE, LOWEST_S, Distribution, Timeline

PERCENTS = [0, 1, 25, 50, 90, 99, 99.9, 100]


def response(start, times):
    reader = ResponseReader(GENERATE)
    reader.begin(start)
    reader.feed(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", start)
    for time in times:
        reader.feed(b"data: x\n\n", time)
    return reader


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1001])
def test_statistics_are_numpys(size):
    rng = random.Random(size)
    values = [rng.lognormvariate(-4, 1) for _ in range(size)]
    found = Distribution()
    for value in values:
        found.add(value)
    assert found.count == size
    assert found.exact
    assert found.mean() == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std() == pytest.approx(np.std(values), rel=1e-9, abs=1e-15)
    assert found.percentiles(PERCENTS) == pytest.approx(np.percentile(values, PERCENTS), rel=1e-12)
    found.add(100.0)  # sorted values stay open for more
    assert found.percentiles([100]) == [100.0]


def test_nothing_measured_counts_as_zero():
    found = Distribution()
    assert (found.mean(), found.std(), found.percentiles([50, 99])) == (0.0, 0.0, [0.0, 0.0])
    assert found.histogram() == (0, [])


def test_beyond_its_room_percentiles_come_from_bins():
    rng = random.Random(3)
    values = [rng.lognormvariate(-4, 1) for _ in range(20_000)]
    found = Distribution(max_values=100)
    for value in values:
        found.add(value)
    assert not found.exact
    assert found.count == 20_000
    assert found.mean() == pytest.approx(np.mean(values), rel=1e-9)
    assert found.std() == pytest.approx(np.std(values), rel=1e-6)
    expected = np.percentile(values, PERCENTS, method="inverted_cdf")
    assert found.percentiles(PERCENTS) == pytest.approx(list(expected), rel=0.013)


def test_the_histogram_counts_every_value_in_its_bin():
    found = Distribution()
    for value in (1e-9, 0.00101, 0.00102, 0.5, 1e9):
        found.add(value)
    first, counts = found.histogram()
    assert first == 0
    assert sum(counts) == 5
    edges = [LOWEST_S * 10 ** (i / BINS_PER_DECADE) for i in range(len(counts) + 1)]
    bins = [i for i, count in enumerate(counts) for _ in range(count)]
    assert bins[0] == 0
    for value, index in zip((0.00101, 0.00102, 0.5), bins[1:4], strict=True):
        assert edges[index] <= value <= edges[index + 1]


def test_gaps_of_responses_are_pooled():
    found = Distribution()
    found.add_gaps(response(0.0, [1.0, 1.5, 1.75]))
    found.add_gaps(response(0.0, [2.0]))
    found.add_gaps(response(0.0, [1.0, 3.0]))
    assert found.count == 3
    assert found.percentiles([0, 50, 100]) == [0.25, 0.5, 2.0]


def test_a_timeline_counts_events_and_running_requests():
    timeline = Timeline(0.5)
    timeline.add(response(10.0, [10.25, 10.75, 11.25]), 10.0)
    timeline.add(response(10.5, [10.5, 12.0]), 10.0)
    assert timeline.events() == [1, 2, 1, 0, 1]
    assert timeline.running() == [1, 2, 1, 1, 0]
