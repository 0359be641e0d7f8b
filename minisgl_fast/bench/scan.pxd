"""What the response reader looks for in the bytes of its buffer; no object is made."""

from libc.string cimport memcmp
from libcpp.string cimport string

cdef extern from "<string.h>" nogil:
    void *memmem(const void *haystack, size_t size, const void *needle, size_t needle_size)


cdef inline bint ends_head(const string &frame) noexcept nogil:
    cdef size_t size = frame.size()
    return size >= 4 and memcmp(frame.data() + size - 4, b"\r\n\r\n", 4) == 0


cdef inline bint is_blank(const char *line, size_t size) noexcept nogil:
    return size == 2 and line[0] == c"\r"


cdef inline bint read_chunk_size(const char *line, size_t size, size_t *value) noexcept nogil:
    """The hexadecimal number that a chunk line begins with; extensions behind it are ignored.

    False if it has no such number, or one of more than 15 digits.
    """
    cdef size_t i = 0
    cdef char c = 0
    value[0] = 0
    while i < size:
        c = line[i]
        if c"0" <= c <= c"9":
            value[0] = value[0] * 16 + <size_t>(c - c"0")
        elif c"a" <= (c | 32) <= c"f":
            value[0] = value[0] * 16 + <size_t>((c | 32) - c"a" + 10)
        else:
            break
        i += 1
    return 0 < i <= 15 and (c == c"\r" or c == c";" or c == c" " or c == c"\n")


cdef inline const char *string_of(
    const char *data, size_t size, const char *key, size_t key_size, size_t *length
) noexcept nogil:
    """The inside of the first non-empty string under a key, JSON-escaped; NULL if there is none."""
    cdef const char *end = data + size
    cdef const char *at = data
    cdef const char *start
    length[0] = 0
    while True:
        at = <const char *>memmem(at, <size_t>(end - at), key, key_size)
        if at == NULL:
            return NULL
        at += key_size
        while at < end and at[0] == c" ":
            at += 1
        if at + 1 >= end or at[0] != c'"' or at[1] == c'"':
            continue
        at += 1
        start = at
        while at < end and at[0] != c'"':
            at += 2 if at[0] == c"\\" else 1
        if at >= end:
            return NULL
        length[0] = <size_t>(at - start)
        return start


cdef inline bint object_of(
    const char *data, size_t size, const char *key, size_t key_size
) noexcept nogil:
    """Whether an object stands under the key."""
    cdef const char *end = data + size
    cdef const char *at = <const char *>memmem(data, size, key, key_size)
    if at == NULL:
        return False
    at += key_size
    while at < end and at[0] == c" ":
        at += 1
    return at < end and at[0] == c"{"
