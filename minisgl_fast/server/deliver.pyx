"""The token loop of the frontend: STEP frames in, one write per stream out.

``Dispatcher.deliver`` feeds each row's token to the TextStream of its choice and marks the choice;
``Dispatcher.flush`` then writes what every marked response has to say, in one piece. Between the
two any number of frames may be delivered, so a frontend that lags puts several tokens in one event;
a client that lags is paused, and gets what came meanwhile in one event too.

A stream in mid-flow is ``direct``: its text is framed in the outbox and sent on its very socket.
All else (its first and last write, parsed text, TLS, a socket that is full) goes through its
exchange, which any stream can fall back to at any write.

Rules:
- No task, queue, future or await, and no Python object per token.
- A direct stream's transport has nothing unsent: whoever gives it bytes ends ``is_direct`` first.
  A stream that is written through its exchange becomes direct again when that is not paused.
- A row whose rid is not open is dropped: its choice has ended here before the engine knew.
- A choice ends exactly once: by the engine's reason, by a stop string (then the engine is told to
  abort it), or by ``close`` (then nothing more is written for it).
- A choice whose text is parsed goes through Python, once per write, but for text that the parser
  would pass on as it is.
- The token that stopped a generation (eos, stop id) is counted, but shown only on request.
- One response that fails while it is written is ended and logged; the others go on.
- One clock reading per frame serves all its tokens.
"""

import logging

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr
from libcpp.string cimport string
from libcpp.vector cimport vector

from minisgl_fast.server.outbox cimport Outbox
from minisgl_fast.text.stream cimport TextStream
from minisgl_fast.wire cimport EOS, RUNNING, STOP_TOKEN, StepHeader

from minisgl_fast.errors import EngineError, MinisglError

log = logging.getLogger("minisgl_fast.frontend")

STOPPED_BY_STRING = STOP_STRING

cdef enum:
    MIN_SLOTS = 64  # a power of two, as every number of slots


cdef class Histogram:

    def __cinit__(self, bounds):
        """``bounds``: increasing upper bounds in seconds."""
        self.bounds = bounds
        self.counts.resize(self.bounds.size() + 1)

    def observe(self, double value):
        """Count one value."""
        self.add(value)

    def buckets(self):
        """[(upper bound as text, cumulative count)], ending with +Inf."""
        cdef uint64_t so_far = 0
        cdef size_t i
        result = []
        for i in range(self.bounds.size()):
            so_far += self.counts[i]
            result.append((repr(self.bounds[i]), so_far))
        return [*result, ("+Inf", so_far + self.counts.back())]

    cdef void add(self, double value) noexcept:
        cdef size_t i = 0
        while i < self.bounds.size() and value > self.bounds[i]:
            i += 1
        self.counts[i] += 1
        self.total += value


cdef class Choice:

    def __cinit__(
        self, Response response not None, int32_t index, TextStream text not None,
        bytes prefix not None, bytes suffix not None, bint include_stop, double now,
    ):
        """``prefix`` and ``suffix`` make an event of running text; ``now`` is the start's time."""
        self.response = response
        self.index = index
        self.text = text
        self.prefix = prefix
        self.suffix = suffix
        self.include_stop = include_stop
        self.last_token = -1
        self.mark_token = self.mark_token_2 = -1
        self.last_time = now
        response.num_open += 1

    @property
    def stopped_by_string(self):
        """Whether a stop string ended it; ``text.matched`` is the string's index."""
        return self.reason == STOP_STRING

    def take_tokens(self):
        """The tokens since the last call, where ``keeps_tokens`` was set from the beginning."""
        tokens = self.tokens
        self.tokens.clear()
        return tokens

    def take_ends(self):
        """Of each token since the last call, where there are ``logprobs``: the bytes of text that
        had come with it, as TextStream.num_taken counts them."""
        ends = self.ends
        self.ends.clear()
        return ends

    def set_lane(self, bytes prefix not None, bytes suffix not None, bytes watched not None):
        """For a choice that is parsed: text without these bytes is an event between the two, as
        if it were plain. No bytes at all: there is no such text."""
        self.lane_prefix = prefix
        self.lane_suffix = suffix
        self.lane_bytes = watched

    cdef bint in_lane(self) noexcept:
        """Whether the ready text is such text."""
        cdef const string *pending = &self.text.pending
        cdef size_t i
        for i in range(self.lane_bytes.size()):
            if memchr(pending.data(), self.lane_bytes[i], pending.size()) != NULL:
                return False
        return self.lane_bytes.size() > 0

    cdef void append_event(
        self, const string &prefix, const string &suffix, string &out
    ) noexcept:
        """Append the ready text as one event, nothing if there is none."""
        cdef size_t start = out.size()
        out.append(prefix)
        cdef size_t after_prefix = out.size()
        self.text.drain(out, True)
        if out.size() == after_prefix:
            out.resize(start)
        else:
            out.append(suffix)


cdef class Response:

    def __init__(self, exchange, bint streaming, text_event=None):
        """``exchange`` as in exchange.pyx; ``text_event`` as in ResponseFormat."""
        self.exchange = exchange
        self.streaming = streaming
        self.text_event = text_event
        self.descriptor = -1

    # For subclasses

    def open_stream(self):
        """Called before the first event: sends the head, returns the events that come first."""
        raise TypeError("a streaming Response must have open_stream")

    def parse_text(self, Choice choice, bytes text):
        """Called with the UTF-8 text of a choice that ``is_parsed``; returns the events it makes.

        From where it sets ``is_parsed`` to False, text is written as that of any other choice.
        """
        raise TypeError("a Response with parsed choices must have parse_text")

    def close_choice(self, Choice choice, bytes text):
        """Called when a choice is complete; returns its last events (``text`` not yet written).

        ``text`` is JSON-escaped, but for a choice that ``is_parsed`` and with ``text_event``.
        """
        raise TypeError("a Response must have close_choice")

    def complete(self, bytes events):
        """Called when all choices are closed, with the events not yet written."""
        raise TypeError("a Response must have complete")

    def fail(self, error):
        """Called when the answer cannot go on; ``error`` is a MinisglError."""
        raise TypeError("a Response must have fail")

    def write_ready(self):
        """Write what is ready, as when a paused client reads again."""
        self._write_ready()

    cdef int _write_ready(self) except -1:
        try:
            self._flush()
        except MinisglError as error:
            self.fail(error)
        except Exception:
            log.exception("an answer could not be written")
            self.fail(EngineError("The answer could not be written."))
        return 0

    cdef bint _compose(self, Outbox outbox) noexcept:
        """Put what is ready of a direct stream into the outbox; False where that cannot be."""
        cdef Choice choice = self.first_dirty
        if not self.is_direct or self.ended:
            return False
        while choice is not None:
            if choice.reason != RUNNING or (choice.is_parsed and not choice.in_lane()):
                return False
            choice = choice.next_dirty
        outbox.begin()
        choice = self._take_dirty()
        while choice is not None:
            if choice.is_parsed:
                choice.append_event(choice.lane_prefix, choice.lane_suffix, outbox.data)
            else:
                choice.append_event(choice.prefix, choice.suffix, outbox.data)
            choice = self._take_dirty()
        outbox.end(self.descriptor, <void *>self)
        return True

    cdef int _hand_over(self, bytes rest) except -1:
        """Give the transport what the socket has not taken."""
        self.is_direct = False
        try:
            self.exchange.write_rest(rest)
        except Exception:
            log.exception("an answer could not be written")
            self.fail(EngineError("The answer could not be written."))
        return 0

    def forget(self):
        """Nothing more will be written: unchain what waits, which would be a cycle."""
        while self._take_dirty() is not None:
            pass

    cdef int _flush(self) except -1:
        """Write what is ready through the exchange."""
        cdef Choice choice
        if self.ended or (self.streaming and self.exchange.paused):
            return 0
        self.is_direct = False
        self.out.clear()
        choice = self._take_dirty()
        while choice is not None:
            self._write_choice(choice)
            choice = self._take_dirty()
        if self.streaming and not self.is_open:
            # Only now, when nothing has failed, is the status 200.
            self._open()
        if self.num_open == 0:
            self.ended = True
            self.complete(_bytes(self.out))
        elif self.streaming and self.out.size():
            self.exchange.write(_bytes(self.out))
            self.is_direct = self.descriptor >= 0 and not self.exchange.paused
        return 0

    cdef int _open(self) except -1:
        """Send the head; its first events go before those that wait in ``out``."""
        cdef bytes first = self.open_stream()
        self.is_open = True
        if self.text_event is None:
            self.descriptor = self.exchange.descriptor()
        self.out.insert(0, PyBytes_AS_STRING(first), <size_t>PyBytes_GET_SIZE(first))
        return 0

    cdef void _mark(self, Choice choice):
        """Put a choice at the end of the chain of those with something to write."""
        choice.is_dirty = True
        if self.first_dirty is None:
            self.first_dirty = choice
        else:
            self.last_dirty.next_dirty = choice
        self.last_dirty = choice

    cdef Choice _take_dirty(self):
        """Unchain the first marked choice; None when there is none left."""
        cdef Choice choice = self.first_dirty
        if choice is not None:
            choice.is_dirty = False
            self.first_dirty = choice.next_dirty
            choice.next_dirty = None
            if self.first_dirty is None:
                self.last_dirty = None
        return choice

    cdef int _write_choice(self, Choice choice) except -1:
        """Append the events of a marked choice to ``out``."""
        if choice.reason != RUNNING:
            self.num_open -= 1
            if self.text_event is None and not choice.is_parsed:
                text = choice.text.take_json()
            else:
                text = choice.text.take()
            _append(self.out, self.close_choice(choice, text))
        elif choice.is_parsed:
            if choice.in_lane():
                choice.append_event(choice.lane_prefix, choice.lane_suffix, self.out)
            else:
                text = choice.text.take()
                if text:
                    _append(self.out, self.parse_text(choice, text))
        elif self.text_event is None:
            choice.append_event(choice.prefix, choice.suffix, self.out)
        else:
            text = choice.text.take()
            if text:
                _append(self.out, self.text_event(text))
        return 0


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


cdef inline bytes _bytes(const string &data):
    return PyBytes_FromStringAndSize(data.data(), <Py_ssize_t>data.size())


cdef inline int _append(string &out, bytes data) except -1:
    out.append(<const char *>PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data))
    return 0
