"""Response and Choice: what an answer has to say, from the tokens of its choices to one write.

The token loop (deliver.pyx) feeds the text of a choice and marks it; at the end of a turn each
marked Response writes what all its choices have, in one piece.

A stream in mid-flow is ``direct``: its text is framed in the outbox and sent on its very socket.
All else (its first and last write, parsed text, TLS, a socket that is full) goes through its
exchange, which any stream can fall back to at any write.

Rules:
- A direct stream's transport has nothing unsent: whoever gives it bytes ends ``is_direct`` first.
  A stream that is written through its exchange becomes direct again when that is not paused.
- A choice whose text is parsed goes through Python, once per write, but for text that the parser
  would pass on as it is.
- One response that fails while it is written is ended and logged; the others go on.
"""

import logging

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t
from libc.string cimport memchr
from libcpp.string cimport string

from minisgl_fast.server.outbox cimport Outbox
from minisgl_fast.server.string_bytes cimport append, to_bytes
from minisgl_fast.text.stream cimport TextStream
from minisgl_fast.wire cimport RUNNING

from minisgl_fast.errors import EngineError, MinisglError

log = logging.getLogger("minisgl_fast.frontend")

STOPPED_BY_STRING = STOP_STRING


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

    def __cinit__(self):
        self.descriptor = -1

    def __init__(self, exchange, bint streaming, text_event=None):
        """``exchange`` as in exchange.pyx; ``text_event`` as in ResponseFormat."""
        self.exchange = exchange
        self.streaming = streaming
        self.text_event = text_event

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

    cdef bint _can_compose(self) noexcept:
        """Whether what is ready is running text of a direct stream."""
        cdef Choice choice = self.first_dirty
        if not self.is_direct or self.ended:
            return False
        while choice is not None:
            if choice.reason != RUNNING or (choice.is_parsed and not choice.in_lane()):
                return False
            choice = choice.next_dirty
        return True

    cdef void _append_events(self, string &out) noexcept:
        """Append what is ready of a stream that ``_can_compose``, an event for each choice."""
        cdef Choice choice = self._take_dirty()
        while choice is not None:
            if choice.is_parsed:
                choice.append_event(choice.lane_prefix, choice.lane_suffix, out)
            else:
                choice.append_event(choice.prefix, choice.suffix, out)
            choice = self._take_dirty()

    cdef void _separate(self) noexcept:
        """Make events of their own of what is ready, before more comes to it."""
        if self._can_compose():
            self._append_events(self.out)

    cdef bint _compose(self, Outbox outbox) noexcept:
        """Put what is ready of a direct stream into the outbox; False where that cannot be."""
        if not self._can_compose():
            return False
        outbox.begin()
        outbox.data.append(self.out)
        self.out.clear()
        self._append_events(outbox.data)
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
        choice = self._take_dirty()
        while choice is not None:
            self._write_choice(choice)
            choice = self._take_dirty()
        if self.streaming and not self.is_open:
            # Only now, when nothing has failed, is the status 200.
            self._open()
        if self.num_open == 0:
            self.ended = True
            self._complete()
        elif self.streaming and self.out.size():
            events = to_bytes(self.out)
            self.out.clear()
            self.exchange.write(events)
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
            self._close(choice)
        elif choice.is_parsed:
            if choice.in_lane():
                choice.append_event(choice.lane_prefix, choice.lane_suffix, self.out)
            else:
                text = choice.text.take()
                if text:
                    append(self.out, self.parse_text(choice, text))
        elif self.text_event is None:
            choice.append_event(choice.prefix, choice.suffix, self.out)
        else:
            text = choice.text.take()
            if text:
                append(self.out, self.text_event(text))
        return 0

    # For subclasses in Cython

    cdef int _close(self, Choice choice) except -1:
        """Append the last events of a choice to ``out``: close_choice."""
        if self.text_event is None and not choice.is_parsed:
            text = choice.text.take_json()
        else:
            text = choice.text.take()
        append(self.out, self.close_choice(choice, text))
        return 0

    cdef int _complete(self) except -1:
        """All choices are closed: complete."""
        self.complete(to_bytes(self.out))
        return 0
