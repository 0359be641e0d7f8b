"""PagePool: the physical KV pages that hold nothing, as a stack.

Rules: a page is at any time in exactly one of three places: in this stack, in the prefix cache as a
node (radix.pyx), or in the row of one request that has not published it. The pool neither knows
requests nor nodes; whoever takes a page gives it back once. Pages come out last in, first out, the
lowest number first from a fresh pool. All memory is allocated here and now.
"""


cdef class PagePool:
    """``num_pages`` pages numbered from 0."""

    def __init__(self, int32_t num_pages):
        if num_pages < 1:
            raise ValueError("a page pool needs at least one page")
        self.num_pages = num_pages
        self.stack.reserve(num_pages)
        cdef int32_t page
        for page in range(num_pages - 1, -1, -1):
            self.stack.push_back(page)

    cdef int32_t take_page(self) noexcept nogil:
        """A free page, or -1."""
        cdef int32_t page = -1
        if not self.stack.empty():
            page = self.stack.back()
            self.stack.pop_back()
        return page

    cdef void give_page(self, int32_t page) noexcept nogil:
        self.stack.push_back(page)

    cdef int32_t num_free_pages(self) noexcept nogil:
        return <int32_t>self.stack.size()

    # Public API

    @property
    def num_free(self):
        return self.num_free_pages()

    def free_pages(self):
        """The pages of the stack, next one last."""
        return list(self.stack)
