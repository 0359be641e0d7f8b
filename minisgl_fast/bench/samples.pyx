"""Samples of a run in bounded memory: distributions of times, and counts over time.

Rules:
- A distribution keeps its values until there are ``max_values``; from then on it answers from
  logarithmic bins (200 a decade: within 1.2 %) and says so. Mean and deviation stay exact.
- A finished response is added in one call; nothing is done per event while a run is hot.
"""

from libc.math cimport log10, pow, sqrt
from libc.stdint cimport int64_t, uint64_t
from libcpp.algorithm cimport sort
from libcpp.vector cimport vector

from minisgl_fast.bench.reader cimport ResponseReader

BINS_PER_DECADE = 200
LOWEST_S = 1e-5
MAX_VALUES = 8 << 20

cdef enum:
    PER_DECADE = 200
    NUM_BINS = PER_DECADE * 10

cdef double LOWEST = 1e-5  # seconds; what is less counts there
cdef size_t MAX_BINS = 1 << 22  # of a timeline: 4 days at 100 ms


cdef class Distribution:
    cdef:
        readonly uint64_t count
        readonly bint exact
        size_t _max_values
        double _sum
        double _sum_of_squares
        double _max
        bint _sorted
        vector[double] _values
        vector[uint64_t] _bins  # of values that are not kept

    def __init__(self, size_t max_values=MAX_VALUES):
        self.exact = True
        self._max_values = max_values
        self._bins.resize(NUM_BINS)

    cdef void _add(self, double value) noexcept:
        self.count += 1
        self._sum += value
        self._sum_of_squares += value * value
        if value > self._max:
            self._max = value
        if self._values.size() < self._max_values:
            self._values.push_back(value)
            self._sorted = False
        else:
            self.exact = False
            self._bins[_bin_of(value)] += 1

    cdef list _counts(self):
        """Of all bins; those of kept values are counted here, not while a run is hot."""
        cdef vector[uint64_t] bins = self._bins
        cdef size_t i
        for i in range(self._values.size()):
            bins[_bin_of(self._values[i])] += 1
        return list(bins)

    def add(self, double value):
        self._add(value)

    def add_gaps(self, ResponseReader reader not None):
        cdef size_t i
        for i in range(reader.gaps_s.size()):
            self._add(reader.gaps_s[i])

    def mean(self):
        return self._sum / self.count if self.count else 0.0

    def std(self):
        cdef double mean, total
        cdef size_t i
        if self.count == 0:
            return 0.0
        mean = self._sum / self.count
        if self.exact:
            total = 0.0
            for i in range(self._values.size()):
                total += (self._values[i] - mean) * (self._values[i] - mean)
            return sqrt(total / self.count)
        return sqrt(max(0.0, self._sum_of_squares / self.count - mean * mean))

    def percentiles(self, percents):
        if self.count == 0:
            return [0.0 for _ in percents]
        if not self.exact:
            counts = self._counts()
            return [self._binned(counts, percent) for percent in percents]
        if not self._sorted:
            sort(self._values.begin(), self._values.end())
            self._sorted = True
        return [self._interpolated(percent) for percent in percents]

    cdef double _interpolated(self, double percent) noexcept:
        cdef double at = percent / 100.0 * (self._values.size() - 1)
        cdef size_t low = <size_t>at
        cdef double share = at - low
        if low + 1 >= self._values.size():
            return self._values.back()
        return self._values[low] + share * (self._values[low + 1] - self._values[low])

    cdef double _binned(self, list counts, double percent) except -1:
        cdef double wanted = percent / 100.0 * self.count
        cdef uint64_t so_far = 0
        cdef int i
        if percent >= 100.0:
            return self._max
        for i in range(NUM_BINS):
            so_far += <uint64_t>counts[i]
            if so_far >= wanted and so_far:
                return LOWEST * pow(10.0, (i + 0.5) / PER_DECADE)
        return self._max

    def histogram(self):
        counts = self._counts()
        used = [i for i, count in enumerate(counts) if count]
        if not used:
            return 0, []
        return min(used), counts[min(used) : max(used) + 1]


cdef int _bin_of(double value) noexcept nogil:
    cdef int index
    if value <= LOWEST:
        return 0
    index = <int>(log10(value / LOWEST) * PER_DECADE)
    return index if index < NUM_BINS else NUM_BINS - 1


cdef class Timeline:
    cdef:
        readonly double width_s
        vector[uint64_t] _events
        vector[int64_t] _changes

    def __init__(self, double width_s):
        self.width_s = width_s

    def add(self, ResponseReader reader not None, double origin_s):
        cdef size_t i
        cdef size_t bin = self._bin(reader.start_s - origin_s)
        cdef double now = reader.first_s - origin_s
        self._changes[bin] += 1
        bin = self._bin(reader.last_s - origin_s)
        self._changes[bin] -= 1
        if reader.num_events:
            bin = self._bin(now)
            self._events[bin] += 1
        for i in range(reader.gaps_s.size()):
            now += reader.gaps_s[i]
            bin = self._bin(now)
            self._events[bin] += 1

    cdef size_t _bin(self, double at) noexcept:
        cdef size_t index = <size_t>(at / self.width_s) if at > 0 else 0
        if index >= MAX_BINS:
            index = MAX_BINS - 1
        if index >= self._events.size():
            self._events.resize(index + 1)
            self._changes.resize(index + 1)
        return index

    def events(self):
        return list(self._events)

    def running(self):
        cdef int64_t now = 0
        cdef size_t i
        found = []
        for i in range(self._changes.size()):
            now += self._changes[i]
            found.append(now)
        return found
