"""Reads streamed HTTP responses: status, chunked framing and server-sent events, counted and timed.

A response is parsed where it lies in the read buffer: no Python object is made per chunk, event or
token. httptools parses the head, once per response; the body's framing and its events are read
here. An event counts if it carries text: a non-empty string under ``content`` (or
``reasoning_content``, ``reasoning``) for chat and under ``text`` for completions and for SGLang's
``/generate``, any data for Mini-SGLang's. A quote inside a JSON string is escaped, so
``content":"`` is always the key. Events of a stream differ in their text alone most of the time:
then one comparison with the last one tells all that a search would find.

Rules:
- No I/O and no clock: ``feed`` gets bytes and the time at which they were read; every event in
  them has that time.
- However the bytes are cut into reads, the events are the same.
- What a server can make long is bounded: head, line, error text, events of one response.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memchr, memcmp

from minisgl_fast.bench.scan cimport (
    ends_head, is_blank, memmem, object_of, read_chunk_size, string_of,
)

import httptools
import orjson

CHAT = 0
COMPLETIONS = 1
GENERATE = 2
SGLANG = 3
MAX_EVENTS = 1 << 22

cdef enum:
    API_CHAT = 0
    API_COMPLETIONS = 1
    API_GENERATE = 2
    API_SGLANG = 3

cdef enum State:
    IDLE
    HEAD
    LENGTH
    CHUNK_SIZE
    CHUNK_DATA
    CHUNK_END
    TRAILER
    UNTIL_CLOSE

cdef size_t MAX_HEAD_BYTES = 64 << 10
cdef size_t MAX_LINE_BYTES = 4 << 20
cdef size_t MAX_CHUNK_LINE_BYTES = 4 << 10
cdef size_t MAX_ERROR_BYTES = 500
cdef size_t MAX_TEXT_BYTES = 16 << 20
cdef size_t MAX_EVENTS_C = MAX_EVENTS


class ProtocolError(Exception):
    pass


class _Head:
    """Gathers what httptools finds in a head."""

    def __init__(self):
        self.chunked = False
        self.length = -1
        self.event_stream = False
        self.encoding = b""

    def on_header(self, name, value):
        name = name.lower()
        if name == b"transfer-encoding":
            self.chunked = value.lower().endswith(b"chunked")
        elif name == b"content-length":
            self.length = int(value)
        elif name == b"content-type":
            self.event_stream = value.lower().startswith(b"text/event-stream")
        elif name == b"content-encoding":
            self.encoding = value.lower()


cdef class ResponseReader:

    def __init__(self, int api, credit=None):
        self._api = api
        self._credit = credit
        self._state = IDLE
        self.keep_alive = True

    # Public API

    def begin(self, double now, bint keep_text=False):
        self._keep_text = keep_text
        self.status = 0
        self.keep_alive = False
        self.done = False
        self.num_bytes = 0
        self.num_events = 0
        self.start_s = now
        self.first_s = self.last_s = 0.0
        self.gaps_s.clear()
        self._state = HEAD
        self._event_stream = False
        self._event_has_data = self._event_has_text = False
        self._line.clear()
        self._usage.clear()
        self._error.clear()
        self._text.clear()

    def feed(self, bytes data not None, double now):
        return self.take(PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data), now) != 0

    def feed_eof(self, double now):
        self.keep_alive = False
        if self._state != UNTIL_CLOSE:
            return False
        self._end_message(now)
        return True

    @property
    def usage(self):
        return <bytes>self._usage

    @property
    def error(self):
        return <bytes>self._error

    @property
    def text(self):
        if self._api == API_GENERATE:
            return (<bytes>self._text).decode("utf-8", "replace")
        try:
            return orjson.loads(b'"%b"' % <bytes>self._text)
        except orjson.JSONDecodeError as error:
            raise ProtocolError("text of an event is not JSON") from error

    @property
    def gaps(self):
        return list(self.gaps_s)

    # HTTP

    cdef int take(self, const char *data, size_t size, double now) except -1:
        """feed."""
        self.num_reads += 1
        self._feed(data, size, now)
        return self._state == IDLE

    cdef int _feed(self, const char *data, size_t size, double now) except -1:
        cdef size_t step
        self.num_bytes += size
        while size:
            if self._state == CHUNK_DATA or self._state == LENGTH:
                step = size if size < self._remaining else self._remaining
                self._body(data, step, now)
                self._remaining -= step
                if self._remaining == 0:
                    if self._state == CHUNK_DATA:
                        self._state = CHUNK_END
                    else:
                        self._end_message(now)
            elif self._state == UNTIL_CLOSE:
                step = size
                self._body(data, size, now)
            elif self._state == HEAD:
                step = self._take_frame(data, size, MAX_HEAD_BYTES)
                if ends_head(self._frame):
                    self._on_head()
                    self._frame.clear()
                    if self._state == LENGTH and self._remaining == 0:
                        self._end_message(now)
            elif self._state == IDLE:
                raise ProtocolError("bytes after the end of the response")
            else:
                step = self._take_chunk_line(data, size, now)
            data += step
            size -= step
        return 0

    cdef size_t _take_frame(self, const char *data, size_t size, size_t limit) except? 0:
        """Move bytes up to and with the next line end into the frame; how many."""
        cdef const char *end = <const char *>memchr(data, c"\n", size)
        cdef size_t step = size if end == NULL else <size_t>(end - data) + 1
        if self._frame.size() + step > limit:
            raise ProtocolError("the head or a chunk line of the response is too long")
        self._frame.append(data, step)
        return step

    cdef size_t _take_chunk_line(self, const char *data, size_t size, double now) except? 0:
        """A line of the chunked framing, whole or a part of it; how many bytes."""
        cdef const char *end
        cdef size_t step
        if self._frame.empty():
            end = <const char *>memchr(data, c"\n", size)
            if end != NULL:
                step = <size_t>(end - data) + 1
                self._on_chunk_line(data, step, now)
                return step
        step = self._take_frame(data, size, MAX_CHUNK_LINE_BYTES)
        if self._frame.back() == c"\n":
            self._on_chunk_line(self._frame.data(), self._frame.size(), now)
            self._frame.clear()
        return step

    cdef int _on_chunk_line(self, const char *line, size_t size, double now) except -1:
        if size > MAX_CHUNK_LINE_BYTES:
            raise ProtocolError("a chunk line of the response is too long")
        if self._state == CHUNK_SIZE:
            if not read_chunk_size(line, size, &self._remaining):
                raise ProtocolError("bad chunk size")
            self._state = CHUNK_DATA if self._remaining else TRAILER
        elif self._state == CHUNK_END:
            if not is_blank(line, size):
                raise ProtocolError("a chunk is longer than its size says")
            self._state = CHUNK_SIZE
        elif is_blank(line, size):
            self._end_message(now)
        return 0

    cdef int _on_head(self) except -1:
        head = _Head()
        parser = httptools.HttpResponseParser(head)
        try:
            parser.feed_data(<bytes>self._frame)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError) as error:
            raise ProtocolError(f"not an HTTP response: {type(error).__name__}") from error
        self.status = parser.get_status_code()
        if self.status < 200:
            return 0  # 100 Continue and the like: the response is still to come
        if head.encoding not in (b"", b"identity"):
            raise ProtocolError("a compressed response was not asked for")
        self.keep_alive = parser.should_keep_alive()
        self._event_stream = head.event_stream
        if self.status == 204 or self.status == 304:
            self._remaining = 0
            self._state = LENGTH
        elif head.chunked:
            self._state = CHUNK_SIZE
        elif head.length >= 0:
            self._remaining = head.length
            self._state = LENGTH
        else:
            self._state = UNTIL_CLOSE
        return 0

    cdef int _end_message(self, double now) except -1:
        if self._line.size():
            self._on_line(self._line.data(), self._line.size(), now)
            self._line.clear()
        self._end_event(now)
        self._state = IDLE
        return 0

    # Server-sent events

    cdef int _body(self, const char *data, size_t size, double now) except -1:
        cdef const char *end
        cdef size_t length
        if not self._event_stream:
            if self._error.size() < MAX_ERROR_BYTES:
                length = MAX_ERROR_BYTES - self._error.size()
                self._error.append(data, length if length < size else size)
            return 0
        while size:
            end = <const char *>memchr(data, c"\n", size)
            if end == NULL:
                if self._line.size() + size > MAX_LINE_BYTES:
                    raise ProtocolError("an event is too long")
                self._line.append(data, size)
                return 0
            length = <size_t>(end - data)
            if self._line.size():
                self._line.append(data, length)
                self._on_line(self._line.data(), self._line.size(), now)
                self._line.clear()
            else:
                self._on_line(data, length, now)
            data += length + 1
            size -= length + 1
        return 0

    cdef int _on_line(self, const char *line, size_t size, double now) except -1:
        if size and line[size - 1] == c"\r":
            size -= 1
        if size == 0:
            self._end_event(now)
        elif size >= 5 and memcmp(line, b"data:", 5) == 0:
            line += 5
            size -= 5
            if size and line[0] == c" ":
                line += 1
                size -= 1
            self._on_data(line, size)
        return 0

    cdef int _on_data(self, const char *data, size_t size) except -1:
        cdef const char *text = NULL
        cdef size_t length = 0
        if self._has_shape and self._has_text_in_shape(data, size, &text, &length):
            self._event_has_data = self._event_has_text = True
            if self._keep_text and self._text.size() + length <= MAX_TEXT_BYTES:
                self._text.append(text, length)
            return 0
        if size == 6 and memcmp(data, b"[DONE]", 6) == 0:
            self.done = True
            return 0
        if self._api == API_GENERATE:
            # Several data lines of one event are the lines of its text.
            text, length = data, size
            if self._event_has_data:
                self._event_has_text = True
                if self._keep_text and self._text.size() < MAX_TEXT_BYTES:
                    self._text.push_back(c"\n")
        elif self._api == API_CHAT:
            text = string_of(data, size, b'content":', 9, &length)
            if text == NULL:
                text = string_of(data, size, b'"reasoning":', 12, &length)
        else:
            text = string_of(data, size, b'"text":', 7, &length)
        self._event_has_data = True
        if length:
            self._event_has_text = True
            if self._api == API_SGLANG:
                self._text.clear()  # each event has all of the text so far
            if self._keep_text and self._text.size() + length <= MAX_TEXT_BYTES:
                self._text.append(text, length)
        if size and data[0] == c"{":
            if object_of(data, size, b'"usage":', 8) or (
                self._api == API_SGLANG and object_of(data, size, b'"meta_info":', 12)
            ):
                self._usage.assign(data, size)
            elif length and (self._api == API_CHAT or self._api == API_COMPLETIONS):
                self._keep_shape(data, size, text, length)
            if not length and self._error.empty() and (
                object_of(data, size, b'"error":', 8)
                or memmem(data, size, b'"object":"error"', 16) != NULL
            ):
                self._error.assign(data, MAX_ERROR_BYTES if size > MAX_ERROR_BYTES else size)
        return 0

    cdef void _keep_shape(
        self, const char *data, size_t size, const char *text, size_t length
    ) noexcept:
        """Remember an event that had text, no usage and so no error."""
        self._before.assign(data, <size_t>(text - data))
        self._behind.assign(text + length, <size_t>(data + size - text) - length)
        # A key behind an opening quote would be a key that begins in the text.
        self._has_shape = self._behind.size() > 1 and self._behind[1] != c":"

    cdef bint _has_text_in_shape(
        self, const char *data, size_t size, const char **text, size_t *length
    ) noexcept:
        """Whether it is the last event but for its text, which has no quote; the text then."""
        cdef size_t before = self._before.size()
        cdef size_t behind = self._behind.size()
        cdef size_t inside
        if size <= before + behind:
            return False
        inside = size - before - behind
        if (
            data[before + inside - 1] == c"\\"
            or memcmp(data, self._before.data(), before) != 0
            or memcmp(data + before + inside, self._behind.data(), behind) != 0
            or memchr(data + before, c'"', inside) != NULL
        ):
            return False
        text[0] = data + before
        length[0] = inside
        return True

    cdef int _end_event(self, double now) except -1:
        if self._event_has_text:
            if self.num_events == 0:
                self.first_s = now
            elif self.num_events == MAX_EVENTS_C:
                raise ProtocolError("too many events in one response")
            else:
                self.gaps_s.push_back(<float>(now - self.last_s))
            self.last_s = now
            self.num_events += 1
            if self._credit is not None:
                self._credit[0] += 1
        self._event_has_data = self._event_has_text = False
        return 0
