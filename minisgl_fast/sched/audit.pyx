"""The scheduler's accounts, checked from scratch: every page, reference, slot and counter.

For tests and for a debugger; it walks everything and is far too slow for every step of a server.
"""

from minisgl_fast.sched.request cimport FINISHED, PREEMPTED, RUNNING, WAITING, Channel, Request
from minisgl_fast.sched.roster cimport Roster
from minisgl_fast.sched.scheduler cimport Scheduler


def check_scheduler(Scheduler scheduler not None):
    """AssertionError with what is wrong, unless everything adds up."""
    cdef Roster roster = scheduler.roster
    cdef Request request
    cdef Channel home
    scheduler.cache.check()
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
