"""The accounts of cache and scheduler, checked from scratch: every page, reference and counter.

For tests and for a debugger; it walks everything and is far too slow for every step of a server.
"""

from libc.stdint cimport int32_t

from minisgl_fast.sched.radix cimport EMPTY, ROOT, Node, RadixCache
from minisgl_fast.sched.request cimport FINISHED, PREEMPTED, RUNNING, WAITING, Channel, Request
from minisgl_fast.sched.roster cimport Roster
from minisgl_fast.sched.scheduler cimport Scheduler


def check_cache(RadixCache cache not None):
    """AssertionError with what is wrong, unless tree, table, list and pool agree."""
    cdef int32_t page, parent
    cdef Node node
    references = cache.references()
    listed = cache.unreferenced()
    rank = {page: i for i, page in enumerate(listed)}
    children = dict.fromkeys(references, 0)
    free = set(cache.pool.free_pages())
    _assert(len(free) == cache.pool.num_free, "a page is free twice")
    _assert(len(references) == cache.num_nodes, "num_nodes is wrong")
    _assert(len(listed) == len(rank) == cache.num_unreferenced, "num_unreferenced is wrong")
    in_table = [entry for entry in cache.table if entry != EMPTY]
    _assert(sorted(in_table) == list(references), "the table and the nodes differ")
    for page, count in references.items():
        node = cache.nodes[page]
        parent = node.parent
        _assert(count >= 0, f"page {page} has {count} references")
        _assert((count == 0) == (page in rank), f"page {page} is wrongly listed")
        _assert(page not in free, f"page {page} is free and a node")
        _assert(
            cache._find(
                parent, node.key, &cache.tokens[<size_t>page * cache.page_size], node.salt
            ) == page,
            f"page {page} cannot be found",
        )
        if parent != ROOT:
            _assert(parent in references, f"the parent of page {page} is no node")
            children[parent] += 1
            if count:
                _assert(references[parent] > 0, f"page {page} is held, its parent is not")
            elif parent in rank:
                _assert(rank[parent] > rank[page], f"page {page} is newer than its parent")
    for page, count in children.items():
        _assert(cache.nodes[page].num_children == count, f"children of page {page} miscounted")


def check_scheduler(Scheduler scheduler not None):
    """AssertionError with what is wrong, unless everything adds up."""
    cdef Roster roster = scheduler.roster
    cdef Request request
    cdef Channel home
    check_cache(scheduler.cache)
    private = []
    references = {}
    states = {WAITING: 0, RUNNING: 0, PREEMPTED: 0, FINISHED: 0}
    bias = 0
    for slot, held in enumerate(roster.slots):
        if held is None:
            continue
        request = held
        name = f"request {request.channel.number}/{request.rid}"
        states[request.state] += 1
        bias += request.num_bias()
        pages, path = list(request.pages), list(request.path)
        _assert(request.slot == slot, f"{name} is not in its slot")
        _assert(request.state == RUNNING or request.inflight > 0, f"{name} should be gone")
        _assert(
            0 <= request.num_committed <= request.num_computed <= request.num_tokens()
            and request.num_computed <= len(pages) * scheduler.page_size
            and request.num_published <= request.num_computed >> scheduler.page_shift
            and 0 <= request.num_pending <= request.inflight,
            f"the counters of {name} are wrong",
        )
        for column, page in enumerate(pages):
            if column >= request.num_published or path[column] != page:
                private.append(page)
            if column < request.num_published:
                references[path[column]] = references.get(path[column], 0) + 1
    free = set(scheduler.cache.pool.free_pages())
    nodes = scheduler.cache.references()
    _assert(len(set(private)) == len(private), "a page has two owners")
    _assert(free.isdisjoint(private), "a held page is free")
    _assert(nodes.keys().isdisjoint(private), "a held page is cached for others")
    _assert(references == {page: n for page, n in nodes.items() if n}, "references miscounted")
    _assert(
        len(free) + scheduler.cache.num_nodes + len(private) == scheduler.cache.pool.num_pages,
        "free, cached and used pages do not add up",
    )
    _assert(states[RUNNING] == roster.running.size(), "the running list and the slots differ")
    _assert(states[PREEMPTED] + states[FINISHED] == roster.num_leaving, "num_leaving is wrong")
    _assert(bias == roster.reserved_bias, "reserved_bias is wrong")
    _assert(
        sorted(roster.free_slots)
        == [i for i, held in enumerate(roster.slots) if held is None],
        "the free slots are wrong",
    )
    order = [
        (-(<Request>roster.slots[slot]).priority, i) for i, slot in enumerate(roster.running)
    ]
    _assert(order == sorted(order), "the running list is out of order")
    for home in roster.channels.values():
        for rid, held in home.requests.items():
            request = held
            _assert(request.rid == rid and request.state != FINISHED, f"rid {rid} is stale")
            states[WAITING] += request.state == WAITING
            _assert((request.slot < 0) == (request.state == WAITING), f"rid {rid} has no slot")
    _assert(states[WAITING] == roster.waiting.size(), "the waiting queue is wrong")


cdef _assert(bint condition, str message):
    # Not the statement: check() must work where asserts are compiled out.
    if not condition:
        raise AssertionError(message)
