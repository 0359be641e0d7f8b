"""C view of Scheduler."""

from libc.stdint cimport int32_t, int64_t, uint32_t
from libcpp.vector cimport vector

from minisgl_fast.sched.plan cimport Span, StepPlan
from minisgl_fast.sched.radix cimport RadixCache
from minisgl_fast.sched.request cimport Request
from minisgl_fast.sched.roster cimport Roster


cdef class Scheduler:
    cdef readonly RadixCache cache
    cdef readonly int32_t page_size
    cdef readonly int32_t max_seqs
    cdef readonly int32_t max_model_len
    cdef readonly int32_t max_step_tokens
    cdef int32_t page_shift
    cdef int32_t max_pages_per_seq
    cdef list eos_ids

    cdef Roster roster
    cdef vector[int32_t] scratch_path
    cdef int32_t budget
    cdef bint page_shortage

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
    cdef bint _grow(self, Request request, StepPlan plan)
    cdef void _take_output(self, Request request, Span span, int32_t token, object output)
    cdef void _take_token(self, Request request, int32_t token)
