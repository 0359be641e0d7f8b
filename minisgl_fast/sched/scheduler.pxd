"""C view of Scheduler."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libcpp.map cimport map as ordered_map
from libcpp.pair cimport pair
from libcpp.vector cimport vector

from minisgl_fast.sched.plan cimport Span, StepPlan
from minisgl_fast.sched.radix cimport RadixCache
from minisgl_fast.sched.request cimport Request, RequestState

ctypedef pair[int64_t, int64_t] WaitingKey


cdef class Scheduler:
    cdef readonly RadixCache cache
    cdef readonly int32_t page_size
    cdef readonly int32_t max_seqs
    cdef readonly int32_t max_model_len
    cdef readonly int32_t max_step_tokens
    cdef int32_t page_shift
    cdef int32_t max_pages_per_seq
    cdef list eos_ids

    cdef dict channels
    cdef ordered_map[WaitingKey, void *] waiting
    cdef vector[int32_t] running
    cdef list slots
    cdef vector[int32_t] free_slots
    cdef vector[int32_t] scratch_path
    cdef int32_t num_leaving
    cdef int32_t reserved_bias
    cdef int32_t budget
    cdef bint page_shortage

    cdef int64_t num_arrivals
    cdef int32_t num_steps
    cdef int32_t num_committed_steps
    cdef int64_t num_preemptions
    cdef int64_t num_aborted
    cdef int64_t num_prompt_tokens
    cdef int64_t num_cached_tokens
    cdef int64_t num_generated_tokens

    cdef _check_plan(self, StepPlan plan)
    cdef void _schedule_decodes(self, StepPlan plan)
    cdef void _schedule_chunks(self, StepPlan plan)
    cdef void _schedule_chunk(self, Request request, StepPlan plan)
    cdef void _admit_waiting(self, StepPlan plan)
    cdef bint _admit(self, Request request, StepPlan plan)
    cdef void _enter(self, Request request, int32_t num_matched, StepPlan plan)
    cdef bint _grow(self, Request request, StepPlan plan)
    cdef void _take_output(self, Request request, Span span, int32_t token, object output)
    cdef void _take_token(self, Request request, int32_t token)
    cdef void _finish(self, Request request, int32_t token, int reason)
    cdef void _leave(self, Request request, RequestState state)
    cdef void _settle(self, Request request)
    cdef void _wait(self, Request request)
