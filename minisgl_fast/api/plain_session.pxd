"""C view of plain_session.pyx."""

from libc.stdint cimport int32_t, int64_t, uint64_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from minisgl_fast.api.generation cimport Generation
from minisgl_fast.api.mold cimport Mold
from minisgl_fast.server.response cimport Choice
from minisgl_fast.text.stream cimport TextStream
from minisgl_fast.wire cimport AddTemplate


cdef class Recipe:
    """What requests have in common that differ in prompt, seed and length alone; see
    plain_session.pyx."""
    cdef readonly str route
    cdef readonly bint streams
    cdef AddTemplate add
    cdef TextStream text              # of which each generation gets a fresh one
    cdef bint include_stop
    cdef tuple stops                  # what the text's ``matched`` counts
    cdef object seed                  # None for a fresh one each time
    cdef int64_t max_tokens           # that the client asked for, 0 if it did not; then it is
    cdef int64_t default_max_tokens   # this, cut to the context; 0 fills it
    cdef readonly str param           # names the prompt
    cdef readonly bint add_special_tokens
    cdef readonly object template_kwargs
    cdef readonly bytes watched       # what Formats.watched must make of the prompt
    cdef object make_form
    cdef object make_output
    cdef int32_t mark_token
    cdef int32_t mark_token_2
    cdef Mold body
    cdef Mold opening
    cdef Mold prefix
    cdef Mold suffix
    cdef Mold closing                 # where no text is left
    cdef Mold closing_text
    cdef Mold ending

    cdef int64_t limit(self, int64_t room, int64_t asked) noexcept


cdef class PlainSession(Generation):
    """One generation of one choice, of which the text alone is wanted; see plain_session.pyx."""
    cdef Recipe recipe
    cdef size_t num_prompt
    cdef str finish_reason
    cdef object form                  # made when it is needed
    cdef object output
    cdef vector[string] values        # for the molds

    cdef int start(self, prompt, int64_t max_tokens, int64_t own_seed) except -1
    cdef int _begin_output(self) except -1
    cdef int _close_output(self, Choice choice, tuple end) except -1
    cdef bint _has_watched(self, Choice choice) noexcept
