"""C view of PagePool."""

from libc.stdint cimport int32_t
from libcpp.vector cimport vector


cdef class PagePool:
    cdef readonly int32_t num_pages
    cdef vector[int32_t] stack

    cdef int32_t take_page(self) noexcept nogil
    cdef void give_page(self, int32_t page) noexcept nogil
    cdef int32_t num_free_pages(self) noexcept nogil
