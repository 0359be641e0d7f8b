"""FindAny: whether a text has any of some short marks, by a character of each that is rare.

A search for a mark of two characters looks at every position; one for a character is the C
library's, which looks at many at once.
"""

from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.string cimport memchr, memcmp
from libcpp.string cimport string
from libcpp.vector cimport vector

cdef struct Mark:
    string text
    Py_ssize_t anchor  # where in it the rare character stands


cdef class FindAny:

    cdef vector[Mark] _marks

    def __init__(self, marks):
        """``marks``: pairs of a rare ASCII character and a mark that has it."""
        cdef Mark mark
        for character, text in marks:
            mark.text = text.encode()
            mark.anchor = text.encode().index(character.encode())
            self._marks.push_back(mark)

    def found_in(self, str text not None):
        """UnicodeEncodeError for half of a surrogate pair."""
        cdef Py_ssize_t size
        cdef const char *data = PyUnicode_AsUTF8AndSize(text, &size)
        cdef size_t i
        for i in range(self._marks.size()):
            if _has(data, size, self._marks[i]):
                return True
        return False


cdef bint _has(const char *data, Py_ssize_t size, const Mark &mark) noexcept nogil:
    cdef Py_ssize_t length = <Py_ssize_t>mark.text.size()
    cdef const char *end = data + size
    cdef const char *found = data
    cdef const char *start
    while True:
        found = <const char *>memchr(found, mark.text[<size_t>mark.anchor], <size_t>(end - found))
        if found == NULL:
            return False
        start = found - mark.anchor
        if start >= data and end - start >= length:
            if memcmp(start, mark.text.data(), <size_t>length) == 0:
                return True
        found += 1
