"""Poller: reads the sockets of many connections in one go, without a Python object per read.

A stream's answer comes as one small packet a token, so the client's own cost is that of a read. An
epoll instance of ours watches the sockets (Linux); the event loop watches that instance, and calls
``read_ready`` once for all that have bytes.

Rules:
- A socket is watched only while its transport does not read; the end of a stream and errors are
  left to the transport, which reads again from then on.
- A socket that a callback closes in the middle of a round is no longer in the table, and one that
  took its number has nothing to read yet.
"""

import select

from libc.stdint cimport uint32_t, uint64_t
from libcpp.vector cimport vector
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from minisgl_fast.bench.reader cimport ResponseReader

from minisgl_fast.bench.reader import ProtocolError

cdef extern from "<sys/socket.h>" nogil:
    ssize_t c_recv "recv"(int descriptor, void *data, size_t size, int flags)
    int MSG_DONTWAIT

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
        uint64_t u64

    struct epoll_event:
        uint32_t events
        epoll_data_t data

    int epoll_wait(int descriptor, epoll_event *events, int max_events, int timeout_ms)

cdef extern from "<errno.h>" nogil:
    int errno
    int EAGAIN
    int EINTR

cdef enum:
    MAX_READY = 512
    BUFFER_BYTES = 256 << 10


cdef class Poller:
    cdef:
        object _epoll
        list _watched  # by descriptor: (reader, connection), or None
        int _descriptor
        vector[char] _buffer
        epoll_event _ready[MAX_READY]

    def __init__(self):
        self._epoll = select.epoll()
        self._descriptor = self._epoll.fileno()
        self._watched = []
        self._buffer.resize(BUFFER_BYTES)

    def fileno(self):
        return self._descriptor

    def watch(self, int descriptor, ResponseReader reader not None, connection):
        if descriptor >= len(self._watched):
            self._watched += [None] * (descriptor + 1 - len(self._watched))
        self._watched[descriptor] = (reader, connection)
        self._epoll.register(descriptor, select.EPOLLIN)

    def forget(self, int descriptor, connection):
        watched = self._watched[descriptor]
        if watched is not None and watched[1] is connection:
            self._watched[descriptor] = None
            try:
                self._epoll.unregister(descriptor)
            except OSError:
                pass  # it is closed already

    def read_ready(self):
        cdef int i
        cdef int num_ready
        with nogil:
            num_ready = epoll_wait(self._descriptor, self._ready, MAX_READY, 0)
        for i in range(num_ready):
            watched = self._watched[self._ready[i].data.fd]
            if watched is not None:
                self._read(self._ready[i].data.fd, <ResponseReader>(<tuple>watched)[0], watched)

    def close(self):
        self._watched.clear()
        self._epoll.close()

    cdef int _read(self, int descriptor, ResponseReader reader, tuple watched) except -1:
        cdef timespec now
        cdef ssize_t size = c_recv(descriptor, self._buffer.data(), BUFFER_BYTES, MSG_DONTWAIT)
        if size < 0 and (errno == EAGAIN or errno == EINTR):
            return 0
        if size <= 0:
            watched[1].read_by_transport()
            return 0
        clock_gettime(CLOCK_MONOTONIC, &now)
        try:
            if reader.take(self._buffer.data(), <size_t>size, now.tv_sec + now.tv_nsec * 1e-9):
                watched[1].answered()
        except ProtocolError as error:
            watched[1].give_up("protocol", str(error))
        return 0
