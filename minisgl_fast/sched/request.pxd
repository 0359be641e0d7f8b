"""C view of Request and Channel."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp.vector cimport vector

from minisgl_fast.sched.plan cimport Sampling, Span, StepPlan
from minisgl_fast.sched.radix cimport RadixCache
from minisgl_fast.wire cimport StepRows

cdef enum RequestState:
    WAITING    # in the waiting queue; holds no slot and no page
    RUNNING    # in the running list; holds a slot and pages
    PREEMPTED  # out of the running list, will wait again when nothing of it is in flight
    FINISHED   # answered or aborted; lets go of slot and pages when nothing of it is in flight


cdef class Channel:
    cdef int64_t number
    cdef StepRows rows
    cdef list logprobs    # the parts of its next LOGPROBS frame
    cdef list embeddings  # the payloads of its next EMBEDDING frames
    cdef dict requests


cdef class Request:
    cdef Channel channel
    cdef uint32_t rid
    cdef RequestState state
    cdef int32_t slot
    cdef int32_t priority
    cdef int64_t arrival

    cdef vector[int32_t] tokens
    cdef vector[int32_t] pages
    cdef vector[int32_t] path
    cdef int32_t num_prompt
    cdef int32_t num_prefill
    cdef int32_t num_computed
    cdef int32_t num_committed
    cdef int32_t num_published
    cdef int32_t num_pending
    cdef int32_t inflight
    cdef int32_t max_total
    cdef int32_t num_cached
    cdef bint reported
    cdef bint poisoned

    cdef Sampling sampling
    cdef uint64_t salt
    cdef int32_t min_total
    cdef vector[int32_t] eos_ids
    cdef vector[int32_t] stop_ids
    cdef vector[int32_t] bias_ids
    cdef vector[float] bias_values
    cdef vector[int32_t] banned_ids

    cdef int32_t num_top           # of the largest log-probabilities of sampled tokens; -1: none
    cdef vector[int32_t] logprob_ids
    cdef int32_t next_row          # the hidden states that are still due:
    cdef int32_t end_row           # positions next_row .. end_row - 1
    cdef vector[double] embedding  # its sum so far
    cdef uint8_t task
    cdef object grammar           # engine.grammar.Grammar; None: any token may follow
    cdef tuple avoided_first      # with a grammar: ids to avoid as long as min_tokens asks for more
    cdef tuple avoided            # and after that

    @staticmethod
    cdef Request unpack(
        Channel channel, bytes payload, int32_t max_model_len, list eos_ids, object grammar
    )

    cdef int32_t num_tokens(self) noexcept
    cdef int32_t num_bias(self) noexcept
    cdef int finish_reason(self, int32_t token) noexcept
    cdef void emit(self, int32_t token, int reason) noexcept
    cdef tuple history(self)
    cdef int32_t num_matchable(self) noexcept
    cdef void add_sample(self, StepPlan plan)
    cdef void add_due_rows(self, StepPlan plan, int32_t first, int32_t last)
    cdef Span make_span(
        self, StepPlan plan, int32_t sample, int32_t first_row, int32_t num_rows, int32_t position
    )
    cdef void take_output(self, Span span, int32_t token, bytes output)

    cdef void hold(
        self, RadixCache cache, const int32_t *matched, int32_t num_matched, int32_t num_pages,
        StepPlan plan,
    ) noexcept
    cdef void append_page(self, int32_t page, StepPlan plan) noexcept
    cdef void publish(self, RadixCache cache, int32_t num_tokens) noexcept
    cdef void let_go(self, RadixCache cache) noexcept
