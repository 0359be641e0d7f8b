"""C view of StepPlan: the sections as pointers, and the writers that the scheduler calls."""

from libc.stdint cimport int32_t, uint8_t

cdef enum:
    # words of the header
    STEP
    NUM_TOKENS
    NUM_DECODE
    NUM_SEQS
    NUM_SAMPLES
    NUM_UPDATES
    NUM_BIAS
    GRAPH_SIZE
    MAX_Q_LEN
    MAX_CONTEXT
    HEADER_WORDS = 16

cpdef enum SampleFlag:
    HAS_PENALTIES = 1
    HAS_BIAS = 2
    HAS_MASK = 4

cdef struct Sampling:
    # what the sampler needs of one request, the same in every step
    float temperature
    float top_p
    float min_p
    float presence
    float frequency
    float repetition
    int32_t top_k
    int32_t seed_lo
    int32_t seed_hi
    int32_t flags


cdef class Span:
    """Rows of a step that bring more than tokens; see plan.pyx."""
    cdef readonly int32_t seq
    cdef readonly int32_t sample
    cdef readonly uint8_t task
    cdef readonly int32_t first_row
    cdef readonly int32_t num_rows
    cdef readonly int32_t position
    cdef readonly int32_t num_top
    cdef readonly object targets
    cdef readonly object ids


cdef class PlanCapacity:
    cdef readonly int32_t max_tokens
    cdef readonly int32_t max_seqs
    cdef readonly int32_t max_updates
    cdef readonly int32_t max_bias
    cdef readonly int32_t num_words
    cdef dict sections


cdef class StepPlan:
    cdef readonly PlanCapacity capacity
    cdef readonly list histories
    cdef readonly list spans
    cdef readonly list masks
    cdef readonly bint in_flight

    cdef int32_t *header
    cdef int32_t *seq_slot
    cdef int32_t *q_start
    cdef int32_t *context_len
    cdef int32_t *sample_row
    cdef int32_t *sample_slot
    cdef int32_t *sample_position
    cdef float *temperature
    cdef int32_t *top_k
    cdef float *top_p
    cdef float *min_p
    cdef int32_t *seed_lo
    cdef int32_t *seed_hi
    cdef float *presence
    cdef float *frequency
    cdef float *repetition
    cdef int32_t *sample_flags
    cdef int32_t *mask_row
    cdef int32_t *bias_start
    cdef int32_t *bias_id
    cdef float *bias_value
    cdef int32_t *update_slot
    cdef int32_t *update_column
    cdef int32_t *update_page
    cdef int32_t *input_id
    cdef int32_t *position
    cdef int32_t *kv_slot

    cdef int32_t _offset(self, str name) except -1
    cdef void begin(self, int32_t step)
    cdef void add_update(self, int32_t slot, int32_t column, int32_t page) noexcept
    cdef void add_decode(self, int32_t slot, int32_t position, int32_t kv_slot) noexcept
    cdef void add_chunk(
        self, int32_t slot, const int32_t *tokens, int32_t first, int32_t last,
        const int32_t *pages, int32_t page_size,
    ) noexcept
    cdef void add_sample(self, int32_t slot, int32_t position, const Sampling *sampling) noexcept
    cdef void add_bias(self, int32_t token, float value) noexcept
    cdef void add_mask(self, object grammar, tuple avoided)
