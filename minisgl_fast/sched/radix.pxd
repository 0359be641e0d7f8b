"""C view of RadixCache."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libcpp.vector cimport vector

from minisgl_fast.sched.pages cimport PagePool

cdef enum:
    EMPTY = -1   # a free slot of the table
    ROOT = -1    # the parent of first pages
    VACANT = -2  # the parent of a page that is no node

cdef struct Node:
    uint64_t key            # hash of parent (or salt) and tokens: where the table looks for it
    uint64_t salt           # of a first page; 0 below
    int32_t parent          # a page, ROOT or VACANT
    int32_t num_references  # requests whose path holds this node
    int32_t num_children
    int32_t child           # found last; any page of the pool, so to be checked
    int32_t older           # neighbours in the list of unreferenced nodes
    int32_t newer


cdef class RadixCache:
    cdef readonly PagePool pool
    cdef readonly int32_t page_size
    cdef readonly int32_t page_shift
    cdef readonly bint enabled
    cdef readonly int32_t num_nodes
    cdef readonly int32_t num_unreferenced
    cdef uint64_t secret
    cdef int32_t sentinel
    cdef uint32_t mask
    cdef vector[Node] nodes
    cdef vector[int32_t] tokens
    cdef vector[int32_t] table

    cdef int32_t match_pages(
        self, const int32_t *tokens, int32_t num_pages, uint64_t salt, int32_t *path
    ) noexcept nogil
    cdef int32_t count_unreferenced(self, const int32_t *path, int32_t num_pages) noexcept nogil
    cdef void acquire_pages(self, const int32_t *path, int32_t num_pages) noexcept nogil
    cdef int32_t take_page(self) noexcept nogil
    cdef int32_t publish_pages(
        self, const int32_t *tokens, const int32_t *pages, int32_t *path,
        int32_t first, int32_t last, uint64_t salt,
    ) noexcept nogil
    cdef void release_pages(
        self, const int32_t *pages, const int32_t *path, int32_t num_pages,
        int32_t num_published, bint forget,
    ) noexcept nogil
    cdef int32_t num_available(self) noexcept nogil

    cdef uint64_t _key(
        self, int32_t parent, const int32_t *tokens, uint64_t salt
    ) noexcept nogil
    cdef int32_t _find(
        self, int32_t parent, uint64_t key, const int32_t *tokens, uint64_t salt
    ) noexcept nogil
    cdef bint _is_child(
        self, int32_t page, int32_t parent, const int32_t *tokens
    ) noexcept nogil
    cdef void _insert(
        self, int32_t page, int32_t parent, uint64_t key, const int32_t *tokens, uint64_t salt
    ) noexcept nogil
    cdef void _remove(self, int32_t page) noexcept nogil
    cdef void _count_child(self, int32_t parent, int32_t change) noexcept nogil
    cdef void _acquire(self, int32_t page) noexcept nogil
    cdef void _release(self, int32_t page, bint forget) noexcept nogil
    cdef void _unlink(self, int32_t page) noexcept nogil
