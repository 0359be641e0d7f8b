from collections.abc import Sequence

from minisgl_fast.bench.reader import ResponseReader

BINS_PER_DECADE: int
LOWEST_S: float
MAX_VALUES: int

class Distribution:
    """Times in seconds: exact up to ``max_values`` of them, in fine logarithmic bins beyond.

    count, exact: how many there are, and whether all of them were kept.
    """

    count: int
    exact: bool

    def __init__(self, max_values: int = ...) -> None: ...
    def add(self, value: float) -> None: ...
    def add_gaps(self, reader: ResponseReader) -> None:
        """The gaps between the events of a response."""

    def mean(self) -> float: ...
    def std(self) -> float:
        """Of the population, as numpy has it by default. 0 where there is nothing."""

    def percentiles(self, percents: Sequence[float]) -> list[float]:
        """Linearly interpolated between order statistics, as numpy does by default."""

    def histogram(self) -> tuple[int, list[int]]:
        """(first bin, counts); bin i begins at LOWEST_S * 10 ** (i / BINS_PER_DECADE)."""

class Timeline:
    """How many events with text came, and how many requests ran, in each ``width_s`` seconds."""

    width_s: float

    def __init__(self, width_s: float) -> None: ...
    def add(self, reader: ResponseReader, origin_s: float) -> None:
        """A finished response."""

    def events(self) -> list[int]: ...
    def running(self) -> list[int]:
        """Requests between their start and their last event, at the end of each bin."""
