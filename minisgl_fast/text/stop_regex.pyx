"""StopRegex: finds where a text first matches a pattern, while the text is still growing.

Pike's machine (regex_syntax.py makes its program): all ways to match are followed at once, a list
of threads with the offset where each began, so a byte costs at most one visit per instruction
(MAX_INSTRUCTIONS, some microseconds), whatever the pattern and the text are.

Rules:
- The first place where any pattern is complete counts; of the matches that end there the one that
  began first. So how tokens cut the text makes no difference, and repetition is never greedy.
- Bytes are read as UTF-8; what is no character matches nothing, and no match goes across it.
- Held back is all text from where the oldest thread began.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp.vector cimport vector

from minisgl_fast.text import regex_syntax

cdef extern from "Python.h":
    bint Py_UNICODE_ISALNUM(uint32_t character) nogil
    bint Py_UNICODE_ISDECIMAL(uint32_t character) nogil
    bint Py_UNICODE_ISSPACE(uint32_t character) nogil
    uint32_t Py_UNICODE_TOLOWER(uint32_t character) nogil
    uint32_t Py_UNICODE_TOUPPER(uint32_t character) nogil

cdef enum:  # as in regex_syntax.py
    CHAR = 0
    SPLIT = 1
    MATCH = 2
    WORD = 1
    DIGIT = 2
    SPACE = 4


cdef class StopProgram:

    def __cinit__(self, patterns):
        cdef Instruction instruction
        cdef CharSet chars
        cdef size_t at
        low = (1 << 64) - 1
        compiled = regex_syntax.compile_patterns(patterns)
        for op, x, y in compiled.code:
            instruction.op = op
            instruction.x = x
            instruction.y = y
            self.code.push_back(instruction)
        for entry in compiled.classes:
            chars.ascii_low = entry.ascii & low
            chars.ascii_high = entry.ascii >> 64
            chars.ranges = [bound for pair in entry.ranges for bound in pair]
            chars.without = list(entry.without)
            chars.categories = entry.categories
            chars.negated = entry.negated
            chars.folds = entry.folds
            self.sets.push_back(chars)
        search = StopRegex(self)
        for at in search.first():
            if self.code[at].op == CHAR:
                self.first_low |= self.sets[self.code[at].x].ascii_low
                self.first_high |= self.sets[self.code[at].x].ascii_high


cdef class StopRegex:

    def __cinit__(self, StopProgram program not None):
        self.program = program
        self.marks.resize(program.code.size())
        self.mark = 1
        self.matched = -1

    def first(self):
        """The instructions that a match can begin with."""
        self._new_mark()
        self.next.clear()
        self._add(self.next, 0, 0)
        return [thread.at for thread in self.next]

    def feed(self, bytes data not None):
        cdef Py_ssize_t i
        for i in range(len(data)):
            if self.push(<uint8_t>data[i]):
                return i + 1
        return len(data)

    @property
    def held(self):
        return self.num_held()

    @property
    def start(self):
        return self.matched_start

    cdef bint push(self, uint8_t byte) noexcept nogil:
        """Read one byte; True when a match ends with it."""
        self.offset += 1
        if self.num_missing:
            if self.low <= byte <= self.high:
                self.character = self.character << 6 | (byte & 0x3F)
                self.low = 0x80
                self.high = 0xBF
                self.num_missing -= 1
                if self.num_missing == 0:
                    self._step(self.character, self.character_start)
                return self.matched >= 0
            self.num_missing = 0
            self._forget()
        if byte < 0x80:
            self._step(byte, self.offset - 1)
            return self.matched >= 0
        # Lead bytes as in stream.pyx (Unicode 3.9, table 3-7).
        self.low = 0x80
        self.high = 0xBF
        self.character_start = self.offset - 1
        if 0xC2 <= byte <= 0xDF:
            self.num_missing = 1
            self.character = byte & 0x1F
        elif 0xE0 <= byte <= 0xEF:
            self.num_missing = 2
            self.character = byte & 0x0F
            if byte == 0xE0:
                self.low = 0xA0
            elif byte == 0xED:
                self.high = 0x9F
        elif 0xF0 <= byte <= 0xF4:
            self.num_missing = 3
            self.character = byte & 0x07
            if byte == 0xF0:
                self.low = 0x90
            elif byte == 0xF4:
                self.high = 0x8F
        else:
            self._forget()
        return False

    cdef int64_t num_held(self) noexcept nogil:
        if self.threads.empty():
            return 0
        return self.offset - self.threads.front().start

    cdef int64_t num_matched(self) noexcept nogil:
        """Bytes of the match that is complete."""
        return self.offset - self.matched_start

    cdef void _step(self, uint32_t character, int64_t start) noexcept nogil:
        """Advance every thread by a character, and begin one there."""
        cdef Thread thread
        cdef Instruction *instruction
        if self.threads.empty() and character < 0x80 and not _has(
            self.program.first_low, self.program.first_high, character
        ):
            return
        # The mark is still that of the list which the last step made: what is in it stays once.
        self._add(self.threads, 0, start)
        self._new_mark()
        self.next.clear()
        for thread in self.threads:
            instruction = &self.program.code[thread.at]
            if _contains(&self.program.sets[instruction.x], character):
                self._add(self.next, thread.at + 1, thread.start)
                if self.matched >= 0:
                    return
        self.threads.swap(self.next)

    cdef void _forget(self) noexcept nogil:
        self.threads.clear()
        self._new_mark()

    cdef void _new_mark(self) noexcept nogil:
        self.mark += 1
        if self.mark == 0:  # gone round
            self.marks.assign(self.marks.size(), 0)
            self.mark = 1

    cdef void _add(
        self, vector[Thread] &threads, int32_t at, int64_t start
    ) noexcept nogil:
        """Append a thread at every CHAR that ``at`` leads to; a MATCH there ends the search."""
        cdef Thread thread
        cdef Instruction *instruction
        self.stack.clear()
        self.stack.push_back(at)
        thread.start = start
        while not self.stack.empty():
            at = self.stack.back()
            self.stack.pop_back()
            if self.marks[at] == self.mark:
                continue
            self.marks[at] = self.mark
            instruction = &self.program.code[at]
            if instruction.op == SPLIT:
                self.stack.push_back(instruction.y)
                self.stack.push_back(instruction.x)
            elif instruction.op == MATCH:
                if self.matched < 0:
                    self.matched = instruction.x
                    self.matched_start = start
            else:
                thread.at = at
                threads.push_back(thread)


cdef inline bint _has(uint64_t low, uint64_t high, uint32_t character) noexcept nogil:
    if character < 64:
        return low >> character & 1
    return high >> (character - 64) & 1


cdef bint _contains(const CharSet *chars, uint32_t character) noexcept nogil:
    cdef bint found
    if character < 0x80:
        return _has(chars.ascii_low, chars.ascii_high, character)
    found = _in_ranges(chars, character)
    if not found and chars.folds:
        found = (
            _in_ranges(chars, Py_UNICODE_TOLOWER(character))
            or _in_ranges(chars, Py_UNICODE_TOUPPER(character))
        )
    if not found and chars.categories:
        found = _in_category(chars.categories, character)
    cdef size_t i
    for i in range(chars.without.size()):
        found = found or not _in_category(chars.without[i], character)
    return found != chars.negated


cdef bint _in_ranges(const CharSet *chars, uint32_t character) noexcept nogil:
    cdef size_t i
    for i in range(0, chars.ranges.size(), 2):
        if chars.ranges[i] <= character <= chars.ranges[i + 1]:
            return True
    return False


cdef bint _in_category(uint32_t categories, uint32_t character) noexcept nogil:
    return bool(
        (categories & WORD and Py_UNICODE_ISALNUM(character))
        or (categories & DIGIT and Py_UNICODE_ISDECIMAL(character))
        or (categories & SPACE and Py_UNICODE_ISSPACE(character))
    )
