"""C view of stop_regex.pyx, for TextStream."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp.vector cimport vector

cdef struct Instruction:
    int32_t op
    int32_t x
    int32_t y

cdef struct CharSet:
    uint64_t ascii_low
    uint64_t ascii_high
    vector[uint32_t] ranges    # low, high, low, high, ...
    vector[uint32_t] without
    uint32_t categories
    bint negated
    bint folds

cdef struct Thread:
    int32_t at
    int64_t start              # offset of the first byte of what it has matched


cdef class StopProgram:
    """The automaton of some patterns, shared by all streams that look for them."""
    cdef vector[Instruction] code
    cdef vector[CharSet] sets
    cdef uint64_t first_low    # ASCII characters that a match may begin with
    cdef uint64_t first_high


cdef class StopRegex:
    """The search in one text."""
    cdef StopProgram program
    cdef vector[Thread] threads   # by start, the first is the earliest
    cdef vector[Thread] next
    cdef vector[uint32_t] marks   # of instructions that are in the list being made
    cdef vector[int32_t] stack
    cdef uint32_t mark
    cdef int64_t offset           # bytes seen
    cdef int64_t matched_start
    cdef int32_t num_missing      # continuation bytes of the character under way
    cdef uint8_t low
    cdef uint8_t high
    cdef uint32_t character
    cdef int64_t character_start
    cdef readonly int32_t matched  # the pattern that is complete, or -1

    cdef bint push(self, uint8_t byte) noexcept nogil
    cdef int64_t num_held(self) noexcept nogil
    cdef int64_t num_matched(self) noexcept nogil
    cdef void _step(self, uint32_t character, int64_t start) noexcept nogil
    cdef void _forget(self) noexcept nogil
    cdef void _new_mark(self) noexcept nogil
    cdef void _add(
        self, vector[Thread] &threads, int32_t at, int64_t start
    ) noexcept nogil
