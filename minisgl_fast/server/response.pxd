"""C view of answers under way; see response.pyx."""

from libc.stdint cimport int32_t, int64_t, uint32_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from minisgl_fast.server.outbox cimport Outbox
from minisgl_fast.text.stream cimport TextStream

cdef enum:
    # What ends a choice besides the engine's own reasons (wire.FinishReason): its stop string.
    STOP_STRING = 16


cdef class Choice:
    """One generation: one rid in the engine, one entry of ``choices`` in the answer."""
    cdef readonly Response response
    cdef readonly TextStream text
    cdef readonly int32_t index
    cdef readonly uint32_t rid
    cdef readonly int32_t num_tokens
    cdef readonly int32_t num_cached
    cdef readonly int32_t last_token
    cdef readonly int32_t reason      # RUNNING until the last token is here
    cdef readonly bint include_stop
    cdef public bint is_parsed        # its text goes through Response.parse_text
    cdef public int32_t mark_token    # two tokens whose first coming is noted, or -1
    cdef public int32_t mark_token_2
    cdef readonly int32_t num_at_mark  # tokens up to and with that one; 0 if it has not come
    cdef public bint keeps_tokens     # take_tokens gives its tokens
    cdef public object logprobs       # its LOGPROBS records go there (api/logprobs.py), or None
    cdef public object embedding      # its EMBEDDING, None before it is here
    cdef vector[int64_t] ends
    cdef vector[int32_t] tokens
    cdef string lane_prefix           # for text of a choice that is parsed, as set_lane says
    cdef string lane_suffix
    cdef string lane_bytes
    cdef readonly double first_time   # of the first token, 0 before it
    cdef readonly double last_time    # of the last token; of the submission before the first one
    cdef string prefix
    cdef string suffix
    cdef int32_t num_unwritten        # tokens since the choice was last marked
    cdef bint is_dirty
    cdef Choice next_dirty            # the chain of its response's marked choices

    cdef bint in_lane(self) noexcept
    cdef void append_event(self, const string &prefix, const string &suffix, string &out) noexcept


cdef class Response:
    """One answer under way: its choices, and where their text goes. Subclassed by Generation."""
    cdef readonly bint streaming
    cdef readonly int32_t num_open    # choices that are not closed yet
    cdef readonly bint is_open        # the head of the stream was sent
    cdef public bint ended            # nothing more is written
    cdef readonly object exchange     # where it is written
    cdef object text_event
    cdef int descriptor               # the socket of a stream that may be direct, or -1
    cdef bint is_direct
    cdef bint is_dirty
    cdef Choice first_dirty           # the chain of marked choices
    cdef Choice last_dirty
    cdef string out                   # events that are made and not written

    cdef int _write_ready(self) except -1
    cdef bint _can_compose(self) noexcept
    cdef void _append_events(self, string &out) noexcept
    cdef void _separate(self) noexcept
    cdef bint _compose(self, Outbox outbox) noexcept
    cdef int _hand_over(self, bytes rest) except -1
    cdef int _flush(self) except -1
    cdef int _open(self) except -1
    cdef int _write_choice(self, Choice choice) except -1
    cdef int _close(self, Choice choice) except -1
    cdef int _complete(self) except -1
    cdef void _mark(self, Choice choice)
    cdef Choice _take_dirty(self)
