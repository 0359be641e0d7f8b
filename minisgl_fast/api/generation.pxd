"""C view of what every HTTP generation has; see generation.pyx."""

from minisgl_fast.server.response cimport Choice, Response


cdef class Generation(Response):
    """One generation request under way: its choices in the engine, and how it can end."""
    cdef object __weakref__
    cdef readonly object frontend
    cdef readonly object metrics
    cdef readonly str route
    cdef readonly double received   # by time.perf_counter()
    cdef readonly list choices

    cpdef start_choices(self, list choices)
    cpdef tuple end_of(self, Choice choice, tuple stops, grammar_param)
    cpdef bytes feed_output(self, output, Choice choice, bytes text)
    cpdef bytes close_output(self, output, Choice choice, answer)
    cpdef succeed(self, str finish_reason)
    cpdef release(self)
