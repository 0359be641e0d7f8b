"""HttpState: what the connections of a server share, and how they share the loop.

A burst of requests must not keep the loop from the tokens of those that came before: after
``max_turn_s`` of requests in one turn of the loop, the others wait, in the order they came, until
the loop has looked at everything else.
"""

from collections import deque

from minisgl_fast.server.head_cache cimport HeadCache

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *time)


cdef class HttpState:

    def __init__(self, handler, limits, admit):
        self.handler = handler
        self.limits = limits
        self.admit = admit
        self.heads = HeadCache(limits)
        self.connections = set()
        self.refusals = {}
        self.date_line = b""
        self.max_body = limits.max_body
        self.max_buffered_bodies = limits.max_buffered_bodies
        self.max_pipelined = limits.max_pipelined
        self.keep_alive_timeout_s = limits.keep_alive_timeout_s
        self.max_turn_s = limits.max_turn_s
        self._waiting = deque()

    def use_loop(self, loop):
        """The loop that calls the connections. Once, before the first of them."""
        self._loop = loop
        self._loop_time = loop.time

    cdef double now(self) except? -1:
        """The loop's clock, in seconds."""
        return self._loop_time()

    cdef bint has_time(self) except -1:
        """Whether this turn of the loop may take another request."""
        cdef double now = monotonic()
        if self._turn_start == 0:
            self._turn_start = now
            self._loop.call_soon(self._next_turn)
            return not self._waiting
        return now - self._turn_start < self.max_turn_s and not self._waiting

    cdef int wait_for_turn(self, object connection) except -1:
        """Have ``connection.go_on()`` called when there is time again."""
        self._waiting.append(connection)
        return 0

    def _next_turn(self):
        """The loop has looked at all else: those that wait go on, as far as there is time."""
        cdef object waiting = self._waiting
        self._waiting = deque()
        self._turn_start = 0
        try:
            while waiting and not self._waiting:
                waiting.popleft().go_on()
        finally:
            self._waiting.extend(waiting)


cdef double monotonic() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9
