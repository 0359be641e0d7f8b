"""C view of a request; see http_request.pyx."""


cdef class HttpRequest:
    cdef public str method
    cdef public str path
    cdef public str query
    cdef public dict headers
    cdef public bytes body
    cdef public str request_id
    cdef public bint is_admin
    cdef public bytes extra_head
    cdef public bint http_1_0
    cdef public bint keep_alive
    cdef public Py_ssize_t content_length
    cdef public bint expects_continue
