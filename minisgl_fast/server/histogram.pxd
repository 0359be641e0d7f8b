"""C view of a histogram; see histogram.pyx."""

from libc.stdint cimport uint64_t
from libcpp.vector cimport vector


cdef class Histogram:
    """Counts of observed seconds between fixed bounds, for /metrics."""
    cdef vector[double] bounds
    cdef vector[uint64_t] counts
    cdef readonly double total

    cdef void add(self, double value) noexcept
