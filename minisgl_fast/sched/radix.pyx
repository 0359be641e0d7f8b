"""RadixCache: the KV pages of prompts and outputs that later requests may start from.

A radix tree whose digit is one page of tokens, kept in flat arrays indexed by physical page: node
id and page id are the same number, so a match *is* the beginning of a row of the page table, no
node is ever split, and nothing is allocated after the start. Children are found through one
open-addressing table (linear probing, deletion by backward shift) keyed by a 64-bit hash of the
parent and the page's tokens; parent, tokens and salt are compared in full, so a hash collision
cannot serve wrong KV. The salt enters at the root: requests with different salts share nothing.
A node remembers the child that was found last, which is tried before anything is hashed.

What a request holds, by page of its row (``pages``) and of its path (``path``):

    [0, num_published)          path[i] is a node that this request references. pages[i] is the same
                                page, or a private copy if the tree had an equal page already
    [num_published, num_pages)  pages[i] is private, path[i] is not used

Rules: a referenced node's ancestors are referenced, since paths begin at the root. Unreferenced
nodes stand in one list, least recently used first; a path is released from its end to the root, so
a parent is always newer than its children and the head of the list is always a leaf. Eviction takes
the head: no scan, no heap. A private page goes back to the pool when its request lets go of it.
"""

import os

from cpython.array cimport array as c_array
from libc.string cimport memcmp, memcpy

cdef extern from *:
    """
    #include <cstdint>
    #include <cstring>

    // Folded 64x64 -> 128 bit multiplication, the mixing step of wyhash and its relatives
    // (Wang Yi, public domain): one multiplication per 16 bytes, two independent lanes.
    static inline uint64_t minisgl_mix(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }

    static inline uint64_t minisgl_hash(const int32_t *tokens, int32_t n, uint64_t seed) {
        const uint64_t other = seed * 0x9e3779b97f4a7c15ull | 1;
        uint64_t left = seed, right = other, words[4];
        int32_t i = 0;
        for (; i + 8 <= n; i += 8) {
            std::memcpy(words, tokens + i, 32);
            left = minisgl_mix(words[0] ^ seed, words[1] ^ left);
            right = minisgl_mix(words[2] ^ other, words[3] ^ right);
        }
        for (; i < n; i++)
            left = minisgl_mix((uint64_t)(uint32_t)tokens[i] ^ other, left ^ seed);
        return minisgl_mix(left ^ other, right ^ (uint64_t)n);
    }
    """
    uint64_t minisgl_mix(uint64_t a, uint64_t b) noexcept nogil
    uint64_t minisgl_hash(const int32_t *tokens, int32_t n, uint64_t seed) noexcept nogil

# Counters are written x = x + 1 below: without the GIL, Cython cannot compile += on an attribute
# under the None checks of the debug build.


cdef class RadixCache:
    """Prefix cache over the pages of ``pool``.

    ``page_size`` is a power of two. With ``enabled`` false nothing is ever published or found and
    pages only pass between requests and the pool.
    """

    def __init__(self, PagePool pool not None, int32_t page_size, *, bint enabled=True):
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError("page_size must be a power of two")
        self.pool = pool
        self.page_size = page_size
        self.page_shift = int(page_size).bit_length() - 1
        self.enabled = enabled
        # Clients choose the tokens: an unknown seed keeps them from building long probe chains.
        self.secret = int.from_bytes(os.urandom(8), "little")
        cdef size_t num_slots = 4
        while num_slots < 2 * <size_t>pool.num_pages:
            num_slots *= 2
        self.mask = <uint32_t>(num_slots - 1)
        self.table.assign(num_slots, EMPTY)
        self.nodes.resize(pool.num_pages + 1)
        if enabled:
            self.tokens.resize(<size_t>pool.num_pages * page_size)
        for page in range(pool.num_pages):
            self.nodes[page].parent = VACANT
        # The list of unreferenced nodes is a ring through one more entry of the array.
        self.sentinel = pool.num_pages
        self.nodes[self.sentinel].older = self.sentinel
        self.nodes[self.sentinel].newer = self.sentinel

    cdef int32_t match_pages(
        self, const int32_t *tokens, int32_t num_pages, uint64_t salt, int32_t *path
    ) noexcept nogil:
        """Walk at most ``num_pages`` pages of tokens; fill ``path``, return how many were found."""
        cdef int32_t depth = 0
        cdef int32_t page = ROOT
        cdef const int32_t *digit
        if not self.enabled:
            return 0
        while depth < num_pages:
            digit = tokens + <size_t>depth * self.page_size
            if page != ROOT and self._is_child(self.nodes[page].child, page, digit):
                page = self.nodes[page].child
            else:
                page = self._find(page, self._key(page, digit, salt), digit, salt)
                if page < 0:
                    break
            path[depth] = page
            depth += 1
        return depth

    cdef int32_t count_unreferenced(self, const int32_t *path, int32_t num_pages) noexcept nogil:
        """How many nodes of a path acquiring it would take from what can be evicted."""
        cdef int32_t i
        for i in range(num_pages):
            # Below an unreferenced node everything is unreferenced.
            if self.nodes[path[i]].num_references == 0:
                return num_pages - i
        return 0

    cdef void acquire_pages(self, const int32_t *path, int32_t num_pages) noexcept nogil:
        cdef int32_t i
        for i in range(num_pages):
            self._acquire(path[i])

    cdef int32_t take_page(self) noexcept nogil:
        """A page to write: a free one, else the least recently used leaf; -1 when all are held."""
        cdef int32_t page = self.pool.take_page()
        if page < 0 and self.num_unreferenced:
            page = self.nodes[self.sentinel].newer
            self._unlink(page)
            self._remove(page)
        return page

    cdef int32_t publish_pages(
        self, const int32_t *tokens, const int32_t *pages, int32_t *path,
        int32_t first, int32_t last, uint64_t salt,
    ) noexcept nogil:
        """Enter the full pages [first, last) of a row below path[first-1]; the new num_published.

        Where the tree has an equal page, the path takes that one and pages[i] stays private.
        """
        cdef int32_t depth
        cdef int32_t page
        cdef int32_t parent = path[first - 1] if first else ROOT
        cdef uint64_t key
        cdef const int32_t *digit
        if not self.enabled:
            return first
        for depth in range(first, last):
            digit = tokens + <size_t>depth * self.page_size
            key = self._key(parent, digit, salt)
            page = self._find(parent, key, digit, salt)
            if page < 0:
                page = pages[depth]
                self._insert(page, parent, key, digit, salt)
            else:
                self._acquire(page)
            path[depth] = page
            parent = page
        return last

    cdef void release_pages(
        self, const int32_t *pages, const int32_t *path, int32_t num_pages,
        int32_t num_published, bint forget,
    ) noexcept nogil:
        """Let go of a whole row and its path, from the end to the root.

        ``forget`` drops the nodes that nobody else needs, for a row whose KV cannot be trusted.
        """
        cdef int32_t i
        for i in range(num_pages - 1, -1, -1):
            if i >= num_published:
                self.pool.give_page(pages[i])
            else:
                if path[i] != pages[i]:
                    self.pool.give_page(pages[i])
                self._release(path[i], forget)

    cdef int32_t num_available(self) noexcept nogil:
        """Pages that ``take_page`` can still hand out."""
        return self.pool.num_free_pages() + self.num_unreferenced

    cdef uint64_t _key(
        self, int32_t parent, const int32_t *tokens, uint64_t salt
    ) noexcept nogil:
        # The tokens' hash does not wait for the parent, so the pages of a walk overlap.
        cdef uint64_t above = <uint64_t>parent if parent >= 0 else ~salt
        return minisgl_mix(
            minisgl_hash(tokens, self.page_size, self.secret),
            (above + 1) * <uint64_t>0x9E3779B97F4A7C15 ^ self.secret,
        )

    cdef int32_t _find(
        self, int32_t parent, uint64_t key, const int32_t *tokens, uint64_t salt
    ) noexcept nogil:
        """The child of ``parent`` with these tokens, or -1."""
        cdef uint32_t slot = <uint32_t>key & self.mask
        cdef int32_t page = self.table[slot]
        while page != EMPTY:
            if (
                self.nodes[page].key == key
                and (parent != ROOT or self.nodes[page].salt == salt)
                and self._is_child(page, parent, tokens)
            ):
                if parent != ROOT:
                    self.nodes[parent].child = page
                return page
            slot = (slot + 1) & self.mask
            page = self.table[slot]
        return -1

    cdef bint _is_child(
        self, int32_t page, int32_t parent, const int32_t *tokens
    ) noexcept nogil:
        """Whether ``page``, any page, is a node below ``parent`` with these tokens."""
        return self.nodes[page].parent == parent and memcmp(
            &self.tokens[<size_t>page * self.page_size], tokens, self.page_size * sizeof(int32_t)
        ) == 0

    cdef void _insert(
        self, int32_t page, int32_t parent, uint64_t key, const int32_t *tokens, uint64_t salt
    ) noexcept nogil:
        """Make ``page`` a node with one reference."""
        cdef uint32_t slot = <uint32_t>key & self.mask
        cdef Node *node = &self.nodes[page]
        while self.table[slot] != EMPTY:
            slot = (slot + 1) & self.mask
        self.table[slot] = page
        node.key = key
        node.salt = salt if parent == ROOT else 0
        node.parent = parent
        node.num_references = 1
        node.num_children = 0
        if parent != ROOT:
            self._count_child(parent, 1)
            self.nodes[parent].child = page
        memcpy(
            &self.tokens[<size_t>page * self.page_size], tokens, self.page_size * sizeof(int32_t)
        )
        self.num_nodes = self.num_nodes + 1

    cdef void _remove(self, int32_t page) noexcept nogil:
        """Take a leaf out of the tree."""
        cdef int32_t parent = self.nodes[page].parent
        cdef uint32_t hole = <uint32_t>self.nodes[page].key & self.mask
        cdef uint32_t slot, home
        while self.table[hole] != page:
            hole = (hole + 1) & self.mask
        # Close the gap: move up every later entry of the run whose home is not past the hole.
        slot = hole
        while True:
            slot = (slot + 1) & self.mask
            if self.table[slot] == EMPTY:
                break
            home = <uint32_t>self.nodes[self.table[slot]].key & self.mask
            if ((slot - home) & self.mask) >= ((slot - hole) & self.mask):
                self.table[hole] = self.table[slot]
                hole = slot
        self.table[hole] = EMPTY
        if parent != ROOT:
            self._count_child(parent, -1)
        self.nodes[page].parent = VACANT
        self.num_nodes = self.num_nodes - 1

    cdef void _count_child(self, int32_t parent, int32_t change) noexcept nogil:
        cdef Node *node = &self.nodes[parent]
        node.num_children += change

    cdef void _acquire(self, int32_t page) noexcept nogil:
        cdef Node *node = &self.nodes[page]
        if node.num_references == 0:
            self._unlink(page)
        node.num_references += 1

    cdef void _release(self, int32_t page, bint forget) noexcept nogil:
        cdef Node *node = &self.nodes[page]
        cdef int32_t newest
        node.num_references -= 1
        if node.num_references:
            return
        if forget and node.num_children == 0:
            self._remove(page)
            self.pool.give_page(page)
            return
        newest = self.nodes[self.sentinel].older
        node.older = newest
        node.newer = self.sentinel
        self.nodes[newest].newer = page
        self.nodes[self.sentinel].older = page
        self.num_unreferenced = self.num_unreferenced + 1

    cdef void _unlink(self, int32_t page) noexcept nogil:
        cdef int32_t older = self.nodes[page].older
        cdef int32_t newer = self.nodes[page].newer
        self.nodes[older].newer = newer
        self.nodes[newer].older = older
        self.num_unreferenced = self.num_unreferenced - 1

    # Public API: the same over array('i'), for tests and tools/bench_sched.py

    def match(self, c_array tokens not None, c_array path not None, uint64_t salt=0):
        """Pages of ``tokens`` in the tree, whole ones only; ``path`` receives them."""
        cdef int32_t num_pages = <int32_t>len(tokens) // self.page_size
        return self.match_pages(_ints(tokens, 0), num_pages, salt, _ints(path, num_pages))

    def acquire(self, c_array path not None, int32_t num_pages):
        self.acquire_pages(_ints(path, num_pages), num_pages)

    def take(self, c_array pages not None, int32_t first, int32_t last):
        """Fill pages[first:last]; how many there were to take."""
        cdef int32_t *row = _ints(pages, last)
        cdef int32_t i
        for i in range(first, last):
            row[i] = self.take_page()
            if row[i] < 0:
                return i - first
        return last - first

    def publish(
        self, c_array tokens not None, c_array pages not None, c_array path not None,
        int32_t first, int32_t last, uint64_t salt=0,
    ):
        """Enter pages[first:last]; ``path`` receives their nodes. The new num_published."""
        return self.publish_pages(
            _ints(tokens, last * self.page_size), _ints(pages, last), _ints(path, last),
            first, last, salt,
        )

    def release(
        self, c_array pages not None, c_array path not None, int32_t num_pages,
        int32_t num_published, *, bint forget=False,
    ):
        """Let go of a row of ``num_pages`` of which ``num_published`` have a node."""
        self.release_pages(
            _ints(pages, num_pages), _ints(path, num_published), num_pages, num_published, forget
        )

    def flush(self):
        """Give every unreferenced page back to the pool."""
        cdef int32_t page
        while self.num_unreferenced:
            page = self.nodes[self.sentinel].newer
            self._unlink(page)
            self._remove(page)
            self.pool.give_page(page)

    def unreferenced(self):
        """The unreferenced nodes, the next to be evicted first."""
        cdef int32_t page = self.nodes[self.sentinel].newer
        listed = []
        while page != self.sentinel:
            listed.append(page)
            page = self.nodes[page].newer
        return listed

    def references(self):
        """{page: number of references} of every node."""
        return {
            page: self.nodes[page].num_references
            for page in range(self.pool.num_pages) if self.nodes[page].parent != VACANT
        }

    def check(self):
        """AssertionError unless tree, table, list and pool agree."""
        # Imported here: audit.pyx needs this module's types first.
        from minisgl_fast.sched.audit import check_cache
        check_cache(self)


cdef int32_t *_ints(c_array values, int32_t length) except? NULL:
    if values.ob_descr.typecode != c"i" or len(values) < length:
        raise ValueError(f"needs an array('i') of at least {length} values")
    return <int32_t *>values.data.as_ints
