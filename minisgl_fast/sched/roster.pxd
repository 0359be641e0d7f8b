"""C view of Roster."""

from libc.stdint cimport int32_t, int64_t, uint32_t
from libcpp.map cimport map as ordered_map
from libcpp.pair cimport pair
from libcpp.vector cimport vector

from minisgl_fast.sched.radix cimport RadixCache
from minisgl_fast.sched.request cimport Channel, Request, RequestState

ctypedef pair[int64_t, int64_t] WaitingKey


cdef class Roster:
    cdef RadixCache cache
    cdef dict channels                             # by number
    cdef ordered_map[WaitingKey, void *] waiting   # a channel holds the reference
    cdef vector[int32_t] running                   # slots, in order of priority and entry
    cdef list slots                                # who holds each, also when leaving; or None
    cdef vector[int32_t] free_slots
    cdef int32_t num_leaving                       # in a slot, but not running
    cdef int32_t reserved_bias                     # entries of a plan, of all who hold a slot
    cdef int64_t num_arrivals

    cdef Channel open_channel(self, int64_t number)
    cdef list close_channel(self, int64_t number)
    cdef Request find_request(self, int64_t number, uint32_t rid)
    cdef list take_frames(self)

    cdef bint has_work(self) noexcept
    cdef bint is_idle(self) noexcept
    cdef Request first_waiting(self)
    cdef int64_t num_queued_tokens(self)

    cdef add(self, Request request)
    cdef void enter(self, Request request)
    cdef void preempt_last(self)
    cdef void finish(self, Request request, int32_t token, int reason)
    cdef void settle(self, Request request)
    cdef void _leave(self, Request request, RequestState state)
    cdef void _wait(self, Request request)
    cdef void _wait_no_more(self, Request request)
