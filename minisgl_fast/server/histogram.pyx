"""Histogram: counts of durations between fixed bounds, in C: the token loop fills two."""


cdef class Histogram:

    def __cinit__(self, bounds):
        """``bounds``: increasing upper bounds in seconds."""
        self.bounds = bounds
        self.counts.resize(self.bounds.size() + 1)

    def observe(self, double value):
        """Count one value."""
        self.add(value)

    def buckets(self):
        """[(upper bound as text, cumulative count)], ending with +Inf."""
        cdef uint64_t so_far = 0
        cdef size_t i
        result = []
        for i in range(self.bounds.size()):
            so_far += self.counts[i]
            result.append((repr(self.bounds[i]), so_far))
        return [*result, ("+Inf", so_far + self.counts.back())]

    cdef void add(self, double value) noexcept:
        cdef size_t i = 0
        while i < self.bounds.size() and value > self.bounds[i]:
            i += 1
        self.counts[i] += 1
        self.total += value
