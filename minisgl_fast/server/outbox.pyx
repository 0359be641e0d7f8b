"""Outbox: one step's HTTP chunks, sent straight on their sockets.

The events of every stream are written into one buffer that is kept from step to step, each stream's
framed as one HTTP chunk (RFC 9112 section 7.1) where it stands, and leave by one send a stream, all
in one system call where the kernel lets us (ring.pyx). No Python object is made, and the
interpreter lock is free while the kernel works.

Rules, for who fills it:
- Only a plain TCP socket, and only while its transport has nothing unsent: nothing may overtake.
- ``send`` follows at once, with no Python code in between that could close a socket.
- What a socket does not take (``rest``) goes to the transport, which knows what to do: a full
  socket and a broken one look the same from here.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize

from minisgl_fast.server.ring cimport Send, SendRing

cdef enum:
    # Room for the size of a chunk, in hexadecimal, and its line end.
    HEAD_ROOM = 18
    # A buffer beyond this, left by streams that had lagged far, is given back.
    KEPT_CAPACITY = 4 << 20

cdef const char *HEX_DIGITS = b"0123456789abcdef"


cdef class Outbox:

    def __cinit__(self):
        self.ring = SendRing()

    cdef void begin(self) noexcept:
        """A chunk begins: its events are to be appended to ``data``."""
        cdef Chunk chunk
        chunk.start = self.data.size()
        self.data.append(HEAD_ROOM, c" ")
        self.chunks.push_back(chunk)

    cdef void end(self, int descriptor, void *owner) noexcept:
        """Frame the chunk that ``begin`` began, or forget it if nothing was appended."""
        cdef Chunk *chunk = &self.chunks.back()
        cdef size_t head = chunk.start + HEAD_ROOM
        cdef size_t left = self.data.size() - head
        if left == 0:
            self.data.resize(chunk.start)
            self.chunks.pop_back()
            return
        self.data.append(b"\r\n", 2)
        head -= 2
        self.data[head] = c"\r"
        self.data[head + 1] = c"\n"
        while left:
            head -= 1
            self.data[head] = HEX_DIGITS[left & 15]
            left >>= 4
        chunk.start = head
        chunk.size = self.data.size() - head
        chunk.num_sent = 0
        chunk.descriptor = descriptor
        chunk.owner = owner

    cdef void send(self) noexcept:
        """Give every chunk to its socket, as far as that takes it now."""
        cdef const char *data = self.data.data()
        cdef Chunk *chunk
        cdef Send *send
        cdef size_t i
        if self.chunks.empty():
            return
        self.sends.resize(self.chunks.size())
        for i in range(self.chunks.size()):
            chunk = &self.chunks[i]
            send = &self.sends[i]
            send.descriptor = chunk.descriptor
            send.data = data + chunk.start
            send.size = chunk.size
        with nogil:
            self.ring.send(self.sends)
        for i in range(self.chunks.size()):
            self.chunks[i].num_sent = <size_t>max(self.sends[i].result, 0)

    cdef bytes rest(self, size_t index):
        """What the socket of a chunk has not taken."""
        cdef Chunk *chunk = &self.chunks[index]
        return PyBytes_FromStringAndSize(
            self.data.data() + chunk.start + chunk.num_sent,
            <Py_ssize_t>(chunk.size - chunk.num_sent),
        )

    cdef void clear(self) noexcept:
        self.chunks.clear()
        self.data.clear()
        if self.data.capacity() > KEPT_CAPACITY:
            self.data.shrink_to_fit()
