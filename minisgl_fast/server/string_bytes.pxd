"""Between bytes objects and C++ strings, in which output is put together."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libcpp.string cimport string


cdef inline bytes to_bytes(const string &data):
    return PyBytes_FromStringAndSize(data.data(), <Py_ssize_t>data.size())


cdef inline int append(string &out, bytes data) except -1:
    out.append(<const char *>PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data))
    return 0
