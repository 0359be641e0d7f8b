"""HttpRequest: what a handler reads of one request."""

import os

from libc.stdint cimport uint64_t


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
        self.headers = {} if headers is None else headers
        self.body = body
        self.request_id = request_id or fresh_request_id()
        self.is_admin = True
        self.extra_head = b""
        self.http_1_0 = False
        self.keep_alive = True
        self.content_length = 0
        self.expects_continue = False


cdef str _id_prefix = f"req-{os.urandom(6).hex()}-"
cdef uint64_t _num_ids = 0


def fresh_request_id():
    """An id that no other request of this or another process has."""
    global _num_ids
    _num_ids += 1
    return f"{_id_prefix}{_num_ids:x}"
