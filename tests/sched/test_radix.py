"""RadixCache and PagePool against a model made of dicts and lists."""

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minisgl_fast.sched.pages import PagePool
from minisgl_fast.sched.radix import RadixCache

MAX_ROW_PAGES = 6


class Row:
    """What one request holds: its tokens, pages, and the prefixes of its path."""

    def __init__(self, tokens, salt):
        self.tokens = array("i", tokens)
        self.salt = salt
        self.pages = array("i", [-7] * MAX_ROW_PAGES)
        self.path = array("i", [-7] * MAX_ROW_PAGES)
        self.num_pages = 0
        self.num_published = 0


class CacheMachine(RuleBasedStateMachine):
    """nodes: {(salt, tokens of the prefix): page}; holders: {prefix: count}; idle: LRU order."""

    @initialize(
        page_size=st.sampled_from((1, 2, 8, 16)), num_pages=st.integers(1, 14), data=st.data()
    )
    def start(self, page_size, num_pages, data):
        self.size = page_size
        self.num_pages = num_pages
        self.pool = PagePool(num_pages)
        self.cache = RadixCache(self.pool, page_size)
        self.free = list(range(num_pages))[::-1]
        self.nodes = {}
        self.holders = {}
        self.idle = []
        self.rows = []

    def prefix(self, row, num_pages):
        return row.salt, tuple(row.tokens[: num_pages * self.size])

    def tokens_of(self, digits):
        # Pages differ in their last token only, so that comparing less than all would show.
        return [t for digit in digits for t in [9] * (self.size - 1) + [digit]]

    def model_take(self):
        if self.free:
            return self.free.pop()
        if not self.idle:
            return -1
        return self.nodes.pop(self.idle.pop(0))

    @rule(
        digits=st.lists(st.integers(0, 2), min_size=1, max_size=MAX_ROW_PAGES),
        salt=st.sampled_from((0, 0, 0, 2**64 - 1)),
    )
    def begin(self, digits, salt):
        """Match, lock, and take the other pages of the row, as an admission does."""
        row = Row(self.tokens_of(digits), salt)
        found = self.cache.match(row.tokens, row.path, salt)
        want = 0
        while want < len(digits) and self.prefix(row, want + 1) in self.nodes:
            want += 1
        assert found == want
        assert list(row.path[:found]) == [self.nodes[self.prefix(row, i + 1)] for i in range(found)]
        self.cache.acquire(row.path, found)
        for i in range(found):
            self.hold(self.prefix(row, i + 1))
        row.pages[:found] = row.path[:found]
        taken = self.cache.take(row.pages, found, len(digits))
        row.num_pages = found + taken
        row.num_published = found
        for column in range(found, len(digits)):
            page = self.model_take()
            if page < 0:
                assert row.num_pages == column
                break
            assert row.pages[column] == page
        self.rows.append(row)

    def hold(self, prefix):
        if self.holders.get(prefix, 0) == 0 and prefix in self.idle:
            self.idle.remove(prefix)
        self.holders[prefix] = self.holders.get(prefix, 0) + 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def publish(self, data):
        row = data.draw(st.sampled_from(self.rows))
        last = data.draw(st.integers(row.num_published, row.num_pages))
        done = self.cache.publish(
            row.tokens, row.pages, row.path, row.num_published, last, row.salt
        )
        assert done == last
        for column in range(row.num_published, last):
            prefix = self.prefix(row, column + 1)
            page = self.nodes.setdefault(prefix, row.pages[column])
            assert row.path[column] == page
            self.hold(prefix)
        row.num_published = last

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), forget=st.sampled_from((False, False, True)))
    def release(self, data, forget):
        row = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        self.cache.release(row.pages, row.path, row.num_pages, row.num_published, forget=forget)
        for column in range(row.num_pages - 1, -1, -1):
            prefix = self.prefix(row, column + 1)
            if column >= row.num_published or self.nodes[prefix] != row.pages[column]:
                self.free.append(row.pages[column])
            if column < row.num_published:
                self.holders[prefix] -= 1
                if self.holders[prefix] == 0:
                    if forget and not self.has_children(prefix):
                        self.free.append(self.nodes.pop(prefix))
                    else:
                        self.idle.append(prefix)

    def has_children(self, prefix):
        salt, tokens = prefix
        return any(
            other[0] == salt
            and len(other[1]) == len(tokens) + self.size
            and other[1][: len(tokens)] == tokens
            for other in self.nodes
        )

    @rule()
    def flush(self):
        self.cache.flush()
        for prefix in self.idle:
            self.free.append(self.nodes.pop(prefix))
        self.idle.clear()

    @invariant()
    def agrees(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        assert self.pool.free_pages() == self.free
        assert self.cache.unreferenced() == [self.nodes[prefix] for prefix in self.idle]
        assert self.cache.references() == {
            page: self.holders[prefix] for prefix, page in self.nodes.items()
        }
        private = sum(
            1
            for row in self.rows
            for column in range(row.num_pages)
            if column >= row.num_published or row.path[column] != row.pages[column]
        )
        assert len(self.free) + len(self.nodes) + private == self.num_pages


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True
)


def test_a_full_table_survives_eviction_of_everything():
    """Backward-shift deletion at the load that the table is made for."""
    num_pages = 512
    cache = RadixCache(PagePool(num_pages), 1)
    path = array("i", [0])
    pages = array("i", [0])
    for token in range(5 * num_pages):
        assert cache.take(pages, 0, 1) == 1
        cache.publish(array("i", [token]), pages, path, 0, 1)
        cache.release(pages, path, 1, 1)
        if token % 500 == 0:
            cache.check()
    for token in range(5 * num_pages):
        assert cache.match(array("i", [token]), path) == (token >= 4 * num_pages)
    cache.check()


def test_nothing_is_found_when_disabled():
    cache = RadixCache(PagePool(4), 2, enabled=False)
    tokens, pages, path = array("i", [1, 2, 3, 4]), array("i", [0, 0]), array("i", [-1, -1])
    assert cache.take(pages, 0, 2) == 2
    assert cache.publish(tokens, pages, path, 0, 2) == 0
    assert cache.match(tokens, path) == 0
    cache.release(pages, path, 2, 0)
    cache.check()
    assert cache.pool.num_free == 4


@pytest.mark.parametrize("page_size", [0, -1, 3, 48])
def test_the_page_size_is_a_power_of_two(page_size):
    with pytest.raises(ValueError, match="power of two"):
        RadixCache(PagePool(4), page_size)


def test_arrays_that_are_too_short_are_refused():
    cache = RadixCache(PagePool(4), 2)
    with pytest.raises(ValueError, match="at least 2"):
        cache.match(array("i", [1, 2, 3, 4]), array("i", [0]))
    with pytest.raises(ValueError, match="array"):
        cache.match(array("q", [1, 2]), array("i", [0]))
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)
