"""C view of a request; see http_request.pyx."""


cdef class HttpRequest:
    cdef public str method
    cdef public str path
    cdef public str query
    cdef public bytes body
    cdef public str request_id
    cdef public bint is_admin
    cdef public bytes extra_head
    cdef public bint http_1_0
    cdef public bint keep_alive
    cdef public Py_ssize_t content_length
    cdef public bint expects_continue
    cdef dict _headers      # None until somebody looks at it: then it is made of the next
    cdef dict _shared       # those of all requests with this head, without the length; read only

    cpdef bytes field(self, bytes name)


cdef HttpRequest known_request(
    str method, str path, str query, dict shared, Py_ssize_t content_length
)
