"""TextStream: token ids of one generation in, text that may be shown out.

A ByteLevel decoder joins the bytes of its tokens and reads the whole as UTF-8, so text grows by a
table look-up per token. Other decoders (Metaspace, ByteFallback, ...) come through a ``window``
object with ``step(token) -> str`` and ``finish() -> str`` and share everything behind it.

    pending    | ready: taken by the next take | incomplete character | start of a stop string |
                                                                      |<---- num_held -------->|

Rules:
- All pieces taken, joined, equal ``bytes.decode("utf-8", "replace")`` of all bytes before the end.
  U+FFFD is written only for bytes that no later token can complete.
- A stop string ends the text at the first byte where any of them is complete; of those complete
  at the same byte the longest counts. Text from its first byte on is dropped, or, with
  ``include_stop``, text behind its last byte. How tokens cut the text makes no difference.
- A pattern (stop_regex.pyx) ends the text in the same way where it is first complete.
- Held back is exactly the longest suffix of the output that begins a stop string (Knuth, Morris,
  Pratt: SIAM J. Comput. 6, 1977) or a match of a pattern, nothing when ``include_stop``.
- The first ``min_tokens`` - 1 tokens cannot complete a stop string, nor begin one.
- After ``finished`` further tokens are ignored.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcpy
from libcpp.string cimport string
from libcpp.utility cimport move

from minisgl_fast.text.stop_regex cimport StopProgram, StopRegex

from minisgl_fast.errors import RequestError

cdef extern from *:
    """
    static const char HEX_DIGITS[] = "0123456789abcdef";

    /* What stands for a byte in a JSON string: 0 itself, 'u' \\u00XX, else the letter behind the
       backslash (RFC 8259 section 7). Bytes from 0x80 on stand for themselves: JSON is UTF-8. */
    static inline char json_escape(uint8_t byte) {
        if (byte >= 0x20) return byte == '"' || byte == '\\\\' ? (char)byte : 0;
        switch (byte) {
            case '\\b': return 'b';
            case '\\t': return 't';
            case '\\n': return 'n';
            case '\\f': return 'f';
            case '\\r': return 'r';
            default: return 'u';
        }
    }
    """
    const char *HEX_DIGITS
    char json_escape(uint8_t byte) noexcept nogil

cdef const char *REPLACEMENT = b"\xef\xbf\xbd"  # U+FFFD


cdef class TokenTable:

    def __cinit__(self, list tokens not None, special not None):
        """``tokens``: the bytes of every id from 0 on; ``special``: the ids that are special."""
        cdef bytes token
        self.num_tokens = <int32_t>len(tokens)
        self.starts.reserve(self.num_tokens + 1)
        self.starts.push_back(0)
        for token in tokens:
            self.data.append(<const char *>token, <size_t>len(token))
            self.starts.push_back(<uint32_t>self.data.size())
            self.max_token_bytes = max(self.max_token_bytes, <int32_t>len(token))
        self.special.resize(self.num_tokens)
        for token_id in special:
            if 0 <= token_id < self.num_tokens:
                self.special[<size_t>token_id] = 1

    def __len__(self):
        return self.num_tokens

    def __getitem__(self, int32_t token):
        """The bytes of a token; empty for an id that the tokenizer does not know."""
        if not 0 <= token < self.num_tokens:
            return b""
        return PyBytes_FromStringAndSize(
            self.data.data() + self.starts[token], self.starts[token + 1] - self.starts[token]
        )

    def is_special(self, int32_t token):
        return 0 <= token < self.num_tokens and self.special[token] != 0


cdef class TextStream:

    def __cinit__(
        self, TokenTable table not None, stops=(), bint include_stop=False, bint skip_special=True,
        window=None, int32_t min_tokens=0, StopProgram patterns=None,
    ):
        """``stops``: UTF-8 bytes of stop strings; RequestError if one is not valid."""
        self.table = table
        self.window = window
        self.include_stop = include_stop
        self.skip_special = skip_special
        self.num_unstoppable = max(min_tokens - 1, 0)
        self.matched = -1
        if patterns is not None:
            self.regex = StopRegex(patterns)
        for text in stops:
            self._add_stop(text)

    cpdef TextStream fresh(self):
        """A stream with the rules of this one, to which nothing was fed."""
        cdef TextStream other = TextStream.__new__(TextStream, self.table)
        other.include_stop = self.include_stop
        other.skip_special = self.skip_special
        other.num_unstoppable = self.num_unstoppable
        if self.window is not None:
            other.window = self.window.fresh()
        if self.regex is not None:
            other.regex = StopRegex(self.regex.program)
        if not self.stops.empty():
            other.stops = self.stops
            memcpy(other.starts_stop, self.starts_stop, sizeof(self.starts_stop))
        return other

    def feed(self, int32_t token):
        """Append one token. Returns whether the text is finished."""
        return self.push(token)

    def take(self):
        """The text that became ready since the last take, as UTF-8."""
        return self._take(False)

    def take_json(self):
        """The same, escaped as the inside of a JSON string (no quotes around it)."""
        return self._take(True)

    def finish(self):
        """No token follows: what was held back becomes ready."""
        if not self.finished and self.window is not None:
            self._push_text(self.window.finish())
        self.finished = True
        self.num_held = 0

    @property
    def num_pushed(self):
        """How many bytes came, but for those that a stop cut off. ``num_taken`` counts alike."""
        return self.num_taken + <int64_t>self.pending.size()

    @property
    def stopped(self):
        """Whether a stop ended the text; ``matched`` is its index, patterns behind strings."""
        return self.matched >= 0

    # For callers in Cython

    cdef bint push(self, int32_t token) except -1:
        """feed."""
        if self.finished or not 0 <= token < self.table.num_tokens:
            return self.finished
        if self.skip_special and self.table.special[token]:
            if self.num_unstoppable:
                self.num_unstoppable -= 1
            return False
        cdef uint32_t start
        if self.window is None:
            start = self.table.starts[token]
            self._push_some(self.table.data.data() + start, self.table.starts[token + 1] - start)
        else:
            self._push_text(self.window.step(token))
        if self.num_unstoppable:
            self.num_unstoppable -= 1
        return self.finished

    cdef void push_bytes(self, const char *data, size_t size) noexcept nogil:
        """Append output bytes up to where a stop string is complete."""
        cdef size_t i
        cdef size_t keep
        if self.stops.empty() or self.num_unstoppable:
            self.pending.append(data, size)
            return
        for i in range(size):
            if not self.matching and not self.starts_stop[<uint8_t>data[i]]:
                continue
            if self._match(<uint8_t>data[i]):
                self.pending.append(data, i + 1)
                if not self.include_stop:
                    keep = self.pending.size() - self.stops[self.matched].text.size()
                    self.pending.resize(keep)
                self.finished = True
                self.num_held = 0
                return
        self.pending.append(data, size)

    cdef void _push_some(self, const char *data, size_t size) noexcept:
        if self.regex is None or self.num_unstoppable:
            self.push_bytes(data, size)
        else:
            self._push_matching(data, size)

    cdef void _push_matching(self, const char *data, size_t size) noexcept:
        """push_bytes where patterns are looked for too."""
        cdef StopRegex regex = self.regex
        cdef bint is_string
        cdef size_t i
        cdef size_t keep
        cdef size_t length = 0
        for i in range(size):
            is_string = (
                self.matching or self.starts_stop[<uint8_t>data[i]]
            ) and self._match(<uint8_t>data[i])
            if is_string:
                length = self.stops[self.matched].text.size()
            if regex.push(<uint8_t>data[i]) and regex.num_matched() > <int64_t>length:
                length = regex.num_matched()
                self.matched = <int32_t>self.stops.size() + regex.matched
            if length:
                self.pending.append(data, i + 1)
                if not self.include_stop:
                    keep = self.pending.size() - length
                    self.pending.resize(keep)
                self.finished = True
                self.num_held = 0
                return
        self.pending.append(data, size)
        if not self.include_stop:
            if not self.matching:
                self.num_held = 0
            self.num_held = max(self.num_held, <size_t>regex.num_held())

    cdef void drain(self, string &out, bint json) noexcept nogil:
        """Append the ready text to ``out`` and forget it.

        A character cut by the held part cannot be completed, because a stop string is valid UTF-8
        and so begins with no continuation byte: up to there the text counts as ended.
        """
        cdef size_t end = self.pending.size() - self.num_held
        if end == 0:
            return
        cdef bint ended = self.finished or self.num_held > 0
        cdef size_t used = _write_text(<const uint8_t *>self.pending.data(), end, ended, out, json)
        self.num_taken = self.num_taken + <int64_t>used
        if used == self.pending.size():
            self.pending.clear()
        else:
            self.pending.erase(0, used)

    cdef bint _match(self, uint8_t byte) noexcept nogil:
        """Advance all stop strings by one byte; True when one is complete, then in ``matched``."""
        cdef size_t index
        cdef uint32_t state
        cdef size_t held = 0
        cdef StopString *stop
        for index in range(self.stops.size()):
            stop = &self.stops[index]
            state = stop.matched
            while state and <uint8_t>stop.text[state] != byte:
                state = stop.fallback[state - 1]
            if <uint8_t>stop.text[state] == byte:
                state += 1
            stop.matched = state
            if state > held:
                held = state
            if state == stop.text.size() and (
                self.matched < 0 or state > self.stops[self.matched].text.size()
            ):
                self.matched = <int32_t>index
        self.matching = held > 0
        self.num_held = 0 if self.include_stop else held
        return self.matched >= 0

    # Private

    def _add_stop(self, bytes text not None):
        cdef StopString stop
        cdef uint32_t border = 0
        cdef size_t i
        try:
            if not text.decode():
                raise RequestError("A stop string must not be empty.", param="stop")
        except UnicodeDecodeError:
            raise RequestError("A stop string must be valid UTF-8.", param="stop") from None
        stop.text = text
        self.starts_stop[<uint8_t>stop.text[0]] = True
        stop.matched = 0
        stop.fallback.push_back(0)
        for i in range(1, stop.text.size()):
            while border and stop.text[border] != stop.text[i]:
                border = stop.fallback[border - 1]
            if stop.text[border] == stop.text[i]:
                border += 1
            stop.fallback.push_back(border)
        self.stops.push_back(move(stop))

    cdef int _push_text(self, str text) except -1:
        cdef Py_ssize_t size
        cdef const char *data = PyUnicode_AsUTF8AndSize(text, &size)
        self._push_some(data, <size_t>size)
        return 0

    cdef bytes _take(self, bint json):
        cdef string out
        self.drain(out, json)
        return PyBytes_FromStringAndSize(out.data(), <Py_ssize_t>out.size())


cdef size_t _write_text(
    const uint8_t *data, size_t size, bint ended, string &out, bint json
) noexcept nogil:
    """Append ``data`` to ``out`` as valid UTF-8; returns how many bytes were used.

    Maximal subparts that are no character become U+FFFD each (Unicode 3.9, table 3-7, which is what
    Python and Rust do too). Unless ``ended``, an incomplete but still valid tail is left unused.
    """
    cdef size_t run = 0       # start of the bytes that can be copied as they are
    cdef size_t i = 0
    cdef size_t length
    cdef size_t found
    cdef uint8_t byte
    cdef uint8_t low
    cdef uint8_t high
    cdef char escape
    while i < size:
        byte = data[i]
        if byte < 0x80:
            escape = json_escape(byte) if json else 0
            if escape:
                out.append(<const char *>data + run, i - run)
                out.push_back(c"\\")
                out.push_back(escape)
                if escape == c"u":
                    out.append(b"00", 2)
                    out.push_back(HEX_DIGITS[byte >> 4])
                    out.push_back(HEX_DIGITS[byte & 15])
                run = i + 1
            i += 1
            continue
        low = 0x80
        high = 0xBF
        if 0xC2 <= byte <= 0xDF:
            length = 2
        elif 0xE0 <= byte <= 0xEF:
            length = 3
            if byte == 0xE0:      # below A0: overlong
                low = 0xA0
            elif byte == 0xED:    # above 9F: surrogates
                high = 0x9F
        elif 0xF0 <= byte <= 0xF4:
            length = 4
            if byte == 0xF0:      # below 90: overlong
                low = 0x90
            elif byte == 0xF4:    # above 8F: past U+10FFFF
                high = 0x8F
        else:
            length = 1            # no lead byte: a maximal subpart of its own
        found = 1
        while found < length and i + found < size and low <= data[i + found] <= high:
            found += 1
            low = 0x80
            high = 0xBF
        if found == length and length > 1:
            i += length
            continue
        if found < length and i + found == size and not ended:
            break
        out.append(<const char *>data + run, i - run)
        out.append(REPLACEMENT, 3)
        i += found
        run = i
    out.append(<const char *>data + run, i - run)
    return i
