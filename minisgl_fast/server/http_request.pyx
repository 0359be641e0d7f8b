"""HttpRequest: what a handler reads of one request."""

import os

cimport cython
from libc.stdint cimport uint64_t


@cython.freelist(64)
cdef class HttpRequest:
    """One request: what a handler reads.

    method      upper case, as sent
    path        the raw path of the target, always starting with ``/`` (or ``*`` for ``OPTIONS *``);
                not percent-decoded and not normalised, so that every layer sees the same string
    query       the raw query without ``?``; "" when there is none
    headers     lower-case names to values; repeated fields are joined with ``, ``
    body        the whole body, transfer coding removed (empty while only the head is known)
    request_id  the client's ``x-request-id`` where it is sane, else a fresh one
    is_admin    whether the client may do what only operators may; access.py decides
    extra_head  header lines that every answer to it has, with their line ends; access.py again

    The rest is framing, for the connection: ``http_1_0``, ``keep_alive``, ``content_length`` (-1
    for a chunked body), ``expects_continue``.
    """

    def __init__(
        self, str method not None, str path not None, str query not None="", dict headers=None,
        bytes body not None=b"", str request_id not None="",
    ):
        self.method = method
        self.path = path
        self.query = query
        self._headers = {} if headers is None else headers
        self.body = body
        self.request_id = request_id or fresh_request_id()
        self.is_admin = True
        self.extra_head = b""
        self.keep_alive = True

    @property
    def headers(self):
        if self._headers is None:
            self._headers = self._shared.copy()
            if self.content_length > 0:
                self._headers[b"content-length"] = b"%d" % self.content_length
        return self._headers

    cpdef bytes field(self, bytes name):
        """One of ``headers``, or None: cheaper where no other is looked at."""
        if self._headers is None and name != b"content-length":
            return self._shared.get(name)
        return self.headers.get(name)


cdef HttpRequest known_request(
    str method, str path, str query, dict shared, Py_ssize_t content_length
):
    """A request by a head that came before; ``shared`` are its headers but for a length above 0."""
    cdef HttpRequest request = HttpRequest.__new__(HttpRequest)
    request.method = method
    request.path = path
    request.query = query
    request._shared = shared
    request.content_length = content_length
    request.body = b""
    request.request_id = fresh_request_id()
    request.is_admin = True
    request.extra_head = b""
    return request


cdef str _id_prefix = f"req-{os.urandom(6).hex()}-"
cdef uint64_t _num_ids = 0


def fresh_request_id():
    """An id that no other request of this or another process has."""
    global _num_ids
    _num_ids += 1
    return f"{_id_prefix}{_num_ids:x}"
