"""C view of the heads that came before; see head_cache.pyx."""

from libcpp.string cimport string

from minisgl_fast.server.http_request cimport HttpRequest


cdef class Known:
    """What one head says, but for the length."""

    cdef str method
    cdef str path
    cdef str query
    cdef dict headers
    cdef bint http_1_0
    cdef bint keep_alive
    cdef bint expects_continue
    cdef string before          # the bytes up to the length, or all of them where there is none
    cdef string after           # those behind it
    cdef bint is_admitted       # a request with this head was let in, as the next two say
    cdef bint is_admin
    cdef bytes extra_head

    cdef Py_ssize_t match(
        self, const char *data, Py_ssize_t size, Py_ssize_t *length
    ) noexcept nogil
    cdef HttpRequest request(self, Py_ssize_t length)


cdef class HeadCache:
    cdef object _limits
    cdef dict _known            # by the head, in two parts around its length
    cdef readonly Known last    # what ``parse`` took its last request from, or None

    cpdef HttpRequest parse(self, bytes head)
