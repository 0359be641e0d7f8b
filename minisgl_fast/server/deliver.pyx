"""The token loop of the frontend: STEP frames in, one write per stream out.

``Dispatcher.deliver`` feeds each row's token to the TextStream of its choice and marks the choice;
``Dispatcher.flush`` then writes what every marked response has to say, in one piece (response.pyx).
Between the two any number of frames may be delivered. A loop that is a little late makes an event
of each step's token all the same, and writes them in one piece; where it lags on and on, a stream
gets several tokens in one event. A client that lags is paused, and gets what came meanwhile in one
event too.

Rules:
- No task, queue, future or await, and no Python object per token.
- A row whose rid is not open is dropped: its choice has ended here before the engine knew.
- A choice ends exactly once: by the engine's reason, by a stop string (then the engine is told to
  abort it), or by ``close`` (then nothing more is written for it).
- The token that stopped a generation (eos, stop id) is counted, but shown only on request.
- One clock reading per frame serves all its tokens.
"""

import logging

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libcpp.vector cimport vector

from minisgl_fast.server.histogram cimport Histogram
from minisgl_fast.server.outbox cimport Outbox
from minisgl_fast.server.response cimport STOP_STRING, Choice, Response
from minisgl_fast.wire cimport EOS, RUNNING, STOP_TOKEN, StepHeader

from minisgl_fast.errors import EngineError

log = logging.getLogger("minisgl_fast.frontend")

cdef enum:
    MIN_SLOTS = 64  # a power of two, as every number of slots
    # So many steps may come late and have events of their own, and that many again only after as
    # many turns of the loop that were in time.
    MAX_LATE_STEPS = 8


cdef class Dispatcher:

    def __init__(self, send_abort, time_to_first_token, inter_token, stream_interval=1):
        """``send_abort(rid)`` tells the engine; the next two are bucket bounds in seconds.

        A stream is written with its first token and then with every ``stream_interval``-th.
        """
        self.send_abort = send_abort
        self.time_to_first_token = Histogram(time_to_first_token)
        self.inter_token = Histogram(inter_token)
        self.stream_interval = stream_interval
        self.outbox = Outbox()
        self.slots.resize(MIN_SLOTS)

    def __dealloc__(self):
        for entry in self.slots:
            if entry != NULL:
                Py_DECREF(<object>entry)
        for entry in self.dirty:
            Py_DECREF(<object>entry)

    def __len__(self):
        """How many choices are open."""
        return self.num_open

    def open_choice(self, Choice choice not None):
        """Give the choice a rid that no open one has; rows of it are delivered from now on."""
        if 2 * (self.num_open + 1) > self.slots.size():
            self._double_slots()
        while self.slots[self.next_rid & (self.slots.size() - 1)] != NULL:
            self.next_rid += 1
        choice.rid = self.next_rid
        self.next_rid += 1
        Py_INCREF(choice)
        self.slots[choice.rid & (self.slots.size() - 1)] = <void *>choice
        self.num_open += 1
        return choice.rid

    def close(self, Choice choice not None):
        """Forget a choice that ends before the engine's last row; returns whether it was open."""
        if self._find(choice.rid) is not choice:
            return False
        self._forget(choice)
        return True

    def find(self, uint32_t rid):
        """The open choice with this rid, or None."""
        return self._find(rid)

    def choices(self):
        """All open choices."""
        return [<Choice>entry for entry in self.slots if entry != NULL]

    def deliver(self, bytes payload not None, double now):
        """Take the rows of a STEP frame that arrived at ``now`` (seconds, the clock of Choice)."""
        self.num_unflushed += 1
        if self.num_unflushed > 1 and self.num_late_steps < MAX_LATE_STEPS:
            self.num_late_steps += 1
            for entry in self.dirty:
                (<Response>entry)._separate()
        cdef const char *data = PyBytes_AS_STRING(payload)
        cdef const StepHeader *header = <const StepHeader *>data
        cdef size_t size = <size_t>PyBytes_GET_SIZE(payload)
        if size < sizeof(StepHeader) or size != (
            sizeof(StepHeader) + <size_t>header.num_rows * 9 + <size_t>header.num_first * 8
        ):
            raise EngineError("The engine sent a malformed STEP frame.")
        cdef size_t num_rows = header.num_rows
        cdef size_t num_first = header.num_first
        cdef const uint32_t *rids = <const uint32_t *>(data + sizeof(StepHeader))
        cdef const int32_t *tokens = <const int32_t *>(rids + num_rows)
        cdef const uint32_t *first_rids = <const uint32_t *>(tokens + num_rows)
        cdef const uint32_t *first_cached = first_rids + num_first
        cdef const uint8_t *reasons = <const uint8_t *>(first_cached + num_first)
        cdef Choice choice
        cdef size_t i
        for i in range(num_first):
            choice = self._find(first_rids[i])
            if choice is not None:
                choice.num_cached = <int32_t>first_cached[i]
                self.num_cached += first_cached[i]
        i = 0
        while i < num_rows:
            try:
                while i < num_rows:
                    choice = self._find(rids[i])
                    if choice is not None:
                        self._token(choice, tokens[i], reasons[i], now)
                    i += 1
            except Exception:
                i += 1
                log.exception("a token could not be turned into text")
                choice.response.fail(EngineError("The answer could not be turned into text."))

    def flush(self):
        """Write what the delivered rows brought, once per response."""
        cdef vector[void *] dirty
        cdef vector[void *] others
        cdef Outbox outbox = self.outbox
        cdef Response response
        cdef size_t i
        if self.num_unflushed == 1 and self.num_late_steps:
            self.num_late_steps -= 1
        self.num_unflushed = 0
        dirty.swap(self.dirty)
        for i in range(dirty.size()):
            response = <Response>dirty[i]
            response.is_dirty = False
            if not response._compose(outbox):
                others.push_back(dirty[i])
        outbox.send()
        for i in range(outbox.chunks.size()):
            if outbox.chunks[i].num_sent < outbox.chunks[i].size:
                response = <Response>outbox.chunks[i].owner
                response._hand_over(outbox.rest(i))
        outbox.clear()
        for i in range(others.size()):
            response = <Response>others[i]
            response._write_ready()
        for i in range(dirty.size()):
            Py_DECREF(<object>dirty[i])

    cdef Choice _find(self, uint32_t rid):
        """The open choice with this rid, or None."""
        cdef void *entry = self.slots[rid & (self.slots.size() - 1)]
        if entry == NULL or (<Choice>entry).rid != rid:
            return None
        return <Choice>entry

    cdef void _forget(self, Choice choice):
        """Free the rid of an open choice."""
        self.slots[choice.rid & (self.slots.size() - 1)] = NULL
        self.num_open -= 1
        Py_DECREF(choice)

    cdef void _double_slots(self):
        """Rids that differ in their low bits still do when one more bit counts."""
        cdef vector[void *] slots
        cdef size_t mask = 2 * self.slots.size() - 1
        slots.resize(mask + 1)
        for entry in self.slots:
            if entry != NULL:
                slots[(<Choice>entry).rid & mask] = entry
        self.slots.swap(slots)

    cdef int _token(self, Choice choice, int32_t token, int32_t reason, double now) except -1:
        if token >= 0:
            if choice.num_tokens == 0:
                choice.first_time = now
                self.time_to_first_token.add(now - choice.last_time)
            else:
                self.inter_token.add(now - choice.last_time)
            choice.last_time = now
            choice.last_token = token
            choice.num_tokens += 1
            if choice.keeps_tokens:
                choice.tokens.push_back(token)
            if token == choice.mark_token or token == choice.mark_token_2:
                if not choice.num_at_mark:
                    choice.num_at_mark = choice.num_tokens
            self.num_generated += 1
            if choice.include_stop or not (reason == EOS or reason == STOP_TOKEN):
                choice.text.push(token)
            if choice.logprobs is not None:
                choice.ends.push_back(
                    choice.text.num_taken + <int64_t>choice.text.pending.size()
                )
        if choice.text.matched >= 0:
            if reason == RUNNING:
                self.send_abort(choice.rid)
            reason = STOP_STRING
        if reason != RUNNING:
            choice.reason = reason
            choice.text.finish()
            self._mark(choice)
            self._forget(choice)
        elif choice.response.streaming:
            choice.num_unwritten += 1
            if choice.num_tokens == 1 or choice.num_unwritten >= self.stream_interval:
                self._mark(choice)
        return 0

    cdef void _mark(self, Choice choice):
        """Have the next flush write this choice."""
        cdef Response response = choice.response
        choice.num_unwritten = 0
        if not choice.is_dirty:
            response._mark(choice)
        if not response.is_dirty:
            response.is_dirty = True
            Py_INCREF(response)
            self.dirty.push_back(<void *>response)
