"""Roster: the requests there are, who holds which slot, and every change of a request's state.

    add -> WAITING -> enter -> RUNNING -> finish -> FINISHED -> (nothing in flight) -> gone
              ^                   |
              |             preempt_last
              |                   v
              +---------------- PREEMPTED   (when nothing of it is in flight)

Waiting requests go by priority (higher first), then by arrival; the running list has the same
order, its last is the first to give way. The scheduler decides who enters and who goes, and reads
the fields; only this file changes them.

Rules:
- A request counts its launched steps (inflight); its slot and its pages are given back in
  ``settle`` alone, when it left the running list and nothing of it is in flight. So no page in
  which an uncommitted step writes ever belongs to anyone else.
- Every request that was added answers one last row, in ``finish``, whatever state it is in.
- A rid is unique among the live requests of its channel, and free again when the last row is out.
"""

from cython.operator cimport dereference
from libcpp.algorithm cimport find

from minisgl_fast.errors import EngineError
from minisgl_fast.sched.request cimport FINISHED, PREEMPTED, RUNNING, WAITING
from minisgl_fast.wire cimport EMBEDDING, LOGPROBS, STEP


cdef class Roster:
    """Room for ``max_seqs`` running requests, whose pages are of ``cache``."""

    def __init__(self, RadixCache cache not None, int32_t max_seqs):
        self.cache = cache
        self.channels = {}
        self.slots = [None] * max_seqs
        for slot in range(max_seqs - 1, -1, -1):
            self.free_slots.push_back(slot)
        self.running.reserve(max_seqs)

    # Channels

    cdef Channel open_channel(self, int64_t number):
        cdef Channel channel = self.channels.get(number)
        if channel is None:
            channel = self.channels[number] = Channel(number)
        return channel

    cdef list close_channel(self, int64_t number):
        """Forget the channel, if it is there; its live requests, which are still to be finished."""
        cdef Channel channel = self.channels.pop(number, None)
        return [] if channel is None else list(channel.requests.values())

    cdef Request find_request(self, int64_t number, uint32_t rid):
        """A live request, or None."""
        cdef Channel channel = self.channels.get(number)
        return None if channel is None else channel.requests.get(rid)

    cdef list take_frames(self):
        """[(channel, frame kind, payload)] of all that came of steps since the last call."""
        cdef Channel channel
        frames = []
        for channel in self.channels.values():
            if channel.logprobs:
                frames.append((channel.number, LOGPROBS, b"".join(channel.logprobs)))
                channel.logprobs = []
            if channel.embeddings:
                frames += [(channel.number, EMBEDDING, one) for one in channel.embeddings]
                channel.embeddings = []
            if not channel.rows.rids.empty():
                frames.append((channel.number, STEP, channel.rows.pack()))
        return frames

    # What there is

    cdef bint has_work(self) noexcept:
        """Whether any request waits, runs, or has a step in flight."""
        return not self.waiting.empty() or not self.is_idle()

    cdef bint is_idle(self) noexcept:
        """Whether nobody holds a slot."""
        return self.running.empty() and self.num_leaving == 0

    cdef Request first_waiting(self):
        """The next one to enter, or None: when nobody waits, or all slots are held."""
        if self.waiting.empty() or self.free_slots.empty():
            return None
        return <Request>dereference(self.waiting.begin()).second

    cdef int64_t num_queued_tokens(self):
        cdef int64_t num_tokens = 0
        for entry in self.waiting:
            num_tokens += (<Request>entry.second).num_tokens()
        return num_tokens

    # State changes

    cdef add(self, Request request):
        """Let a new request wait. EngineError if its rid is taken."""
        if request.rid in request.channel.requests:
            raise EngineError(f"A frontend sent request {request.rid} twice.")
        request.channel.requests[request.rid] = request
        request.arrival = self.num_arrivals
        self.num_arrivals += 1
        self._wait(request)

    cdef void enter(self, Request request):
        """From waiting to running, with a slot, which must be there."""
        cdef int32_t slot = self.free_slots.back()
        cdef vector[int32_t].iterator place
        self._wait_no_more(request)
        self.free_slots.pop_back()
        self.slots[slot] = request
        request.slot = slot
        request.state = RUNNING
        place = self.running.end()
        while place != self.running.begin() and (
            (<Request>self.slots[dereference(place - 1)]).priority < request.priority
        ):
            place -= 1
        self.running.insert(place, slot)
        self.reserved_bias += request.num_bias()

    cdef void preempt_last(self):
        """Take the last running request's pages, now or when nothing of it is in flight."""
        self._leave(<Request>self.slots[self.running.back()], PREEMPTED)

    cdef void finish(self, Request request, int32_t token, int reason):
        """Answer the last row of a live request, in whatever state it is."""
        request.emit(token, reason)
        del request.channel.requests[request.rid]
        if request.state == WAITING:
            self._wait_no_more(request)
            request.state = FINISHED
        elif request.state == RUNNING:
            self._leave(request, FINISHED)
        else:
            request.state = FINISHED

    cdef void settle(self, Request request):
        """Give back slot and pages of a request that left, once nothing of it is in flight."""
        if request.inflight:
            return
        self.num_leaving -= 1
        self.reserved_bias -= request.num_bias()
        self.free_slots.push_back(request.slot)
        self.slots[request.slot] = None
        request.let_go(self.cache)
        if request.state == PREEMPTED:
            self._wait(request)

    cdef void _leave(self, Request request, RequestState state):
        """Out of the running list."""
        request.state = state
        self.running.erase(find(self.running.begin(), self.running.end(), request.slot))
        self.num_leaving += 1
        self.settle(request)

    cdef void _wait(self, Request request):
        request.state = WAITING
        self.waiting[WaitingKey(-<int64_t>request.priority, request.arrival)] = <void *>request

    cdef void _wait_no_more(self, Request request):
        self.waiting.erase(WaitingKey(-<int64_t>request.priority, request.arrival))
