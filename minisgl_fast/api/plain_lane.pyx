"""PlainLane: the short way from a request's body to a PlainSession.

Clients send the same body again and again, but for the prompt, and perhaps for a seed or a length.
So the body is cut into its prompt and what is around it, out of which these numbers are taken, and
if that came before, its Recipe is known: what is left is to read the prompt, and to send it to the
engine.

    {"model":"m","prompt":  [1,2,3]  ,"max_tokens":1,"seed":7}
    |------- before ------| prompt  |---- behind -----------|

Rules:
- A recipe is learnt from the two parts with a sample for a prompt between them. If that is a body
  whose prompt is the sample, then so is one with any other JSON value in its place: what stands
  before a value does not depend on it. So it is with the numbers.
- ``take`` answers what it can answer well, and leaves everything else, all errors included, to the
  way that all requests can go; until then nothing has been done.
- A body that is not seen twice is not worth a recipe; what is kept is bounded.
"""

import secrets
from array import array

import msgspec

from cpython.array cimport array as c_array
from cpython.array cimport clone
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memchr, memcpy
from libcpp.string cimport string
from libcpp.vector cimport vector

from minisgl_fast.api.plain_session cimport PlainSession, Recipe
from minisgl_fast.server.http_request cimport HttpRequest
from minisgl_fast.server.string_bytes cimport to_bytes

from minisgl_fast.api.plain_body import PlainMessage
from minisgl_fast.errors import MinisglError

cdef extern from "<string.h>" nogil:
    void *memmem(const void *where, size_t size, const void *what, size_t what_size)

cdef enum:
    MAX_KNOWN = 2048
    MAX_AROUND = 2048  # bytes around a prompt
    MAX_MESSAGES = 4096
    MAX_DIGITS = 10
    MAX_NUMBER_DIGITS = 18

cdef struct Numbers:
    # Those of a body, -1 where it has none that is plain.
    int64_t seed
    int64_t max_tokens

cdef string SEED = b'"seed"'
cdef string MAX_TOKENS = b'"max_tokens"'
cdef string MAX_COMPLETION_TOKENS = b'"max_completion_tokens"'  # wins over the other
# What stands for the numbers, and for the prompt: no JSON has such bytes.
cdef enum:
    PROMPT_MARK = 0
    SEED_MARK = 1
    MAX_TOKENS_MARK = 2
cdef int64_t SEED_SAMPLE = 10**9 + secrets.randbelow(10**9)
cdef int64_t MAX_TOKENS_SAMPLE = 10**5 + secrets.randbelow(10**5)

cdef c_array _INTS = array("i")
cdef object _texts = msgspec.json.Decoder(str)
cdef object _messages = msgspec.json.Decoder(list[PlainMessage])
cdef object _SEEN_ONCE = object()


cdef class PlainLane:
    """The plain requests of one route."""

    cdef object _pipeline
    cdef object _frontend
    cdef object _learn
    cdef object _formats
    cdef string _key      # the prompt's field, in quotes
    cdef dict _known      # by what is around the prompt: a Recipe, None if there is none

    def __init__(self, pipeline, str field not None, learn, formats=None):
        """``field``: names the prompt. ``learn(before, behind)`` makes a Recipe, None if there is
        none. ``formats``: those of the answers to messages, which then are the prompt."""
        self._pipeline = pipeline
        self._frontend = pipeline.frontend
        self._learn = learn
        self._formats = formats
        self._key = f'"{field}"'.encode()
        self._known = {}

    def take(self, HttpRequest request not None, exchange, double received):
        """Run the request, which was admitted; False if it must go the other way."""
        cdef bytes body = request.body
        cdef const char *data = PyBytes_AS_STRING(body)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
        cdef Py_ssize_t start = _value_of(data, size, self._key)
        cdef Py_ssize_t end = -1
        cdef vector[int32_t] ids
        cdef Numbers numbers
        cdef Recipe recipe
        if start < 0:
            return False
        if self._formats is not None:
            end = _end_of_list(data, start, size)
        elif data[start] == c'"':
            end = _end_of_string(data, start, size)
        else:
            end = _read_ids(data, start, size, ids)
        if end < 0 or (ids.empty() and not self._frontend.tokenizer.is_short(end - start, True)):
            return False  # what is encoded elsewhere is not to be rendered twice
        recipe = self._recipe(data, start, end, size, &numbers)
        if recipe is None:
            return False
        if self._formats is not None:
            prompt = self._chat_ids(recipe, body[start:end])
        elif ids.empty():
            try:
                text = _texts.decode(body[start:end])
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return False
            prompt = self._encoded(recipe, text)
        else:
            prompt = self._checked(ids)
        return prompt is not None and self._run(recipe, prompt, numbers, exchange, received)

    cdef Recipe _recipe(
        self, const char *data, Py_ssize_t start, Py_ssize_t end, Py_ssize_t size, Numbers *numbers
    ):
        """The recipe of bodies with this around their prompt, None if there is none (yet)."""
        cdef string around
        cdef bytes key
        if start + size - end > MAX_AROUND:
            return None
        around.reserve(<size_t>(start + size - end + 2))
        around.push_back(0)
        around.append(data, <size_t>start)
        around.push_back(PROMPT_MARK)
        around.append(data + end, <size_t>(size - end))
        numbers.seed = _cut(around, SEED, SEED_MARK)
        numbers.max_tokens = _cut(around, MAX_COMPLETION_TOKENS, MAX_TOKENS_MARK)
        if numbers.max_tokens < 0:
            numbers.max_tokens = _cut(around, MAX_TOKENS, MAX_TOKENS_MARK)
        # A body that has a mark itself must not pass for one that has a number there.
        around[0] = <char>((numbers.seed >= 0) + 2 * (numbers.max_tokens >= 0))
        key = to_bytes(around)
        found = self._known.get(key, self)
        if found is self:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = _SEEN_ONCE
            return None
        if found is _SEEN_ONCE:
            try:
                found = self._learnt(key[1:], numbers[0])
            except MinisglError:  # which the other way finds in its turn
                found = None
            self._known[key] = found
        return found

    cdef Recipe _learnt(self, bytes around, Numbers numbers):
        """The recipe of bodies that were cut to this, None if there is none."""
        cdef Recipe recipe
        for mark, number, sample in (
            (SEED_MARK, numbers.seed, SEED_SAMPLE),
            (MAX_TOKENS_MARK, numbers.max_tokens, MAX_TOKENS_SAMPLE),
        ):
            around = around.replace(b"%c" % mark, b"%d" % sample, number >= 0)
        recipe = self._learn(*around.split(b"%c" % PROMPT_MARK, 1))
        if (
            recipe is None
            or (numbers.seed >= 0 and recipe.seed != SEED_SAMPLE)
            or (numbers.max_tokens >= 0 and recipe.max_tokens != MAX_TOKENS_SAMPLE)
        ):
            return None
        return recipe

    cdef object _checked(self, const vector[int32_t] &ids):
        """The ids as an array, None if the vocabulary does not have them all."""
        cdef int32_t vocab_size = self._frontend.facts.vocab_size
        cdef c_array prompt
        cdef size_t i
        for i in range(ids.size()):
            if ids[i] >= vocab_size:
                return None
        prompt = clone(_INTS, <Py_ssize_t>ids.size(), False)
        memcpy(prompt.data.as_ints, ids.data(), ids.size() * sizeof(int32_t))
        return prompt

    cdef object _chat_ids(self, Recipe recipe, bytes value):
        """The prompt of these messages, None if they are not plain."""
        try:
            messages = _messages.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        if not 1 <= len(messages) <= MAX_MESSAGES:
            return None
        text = self._frontend.template.render(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template_kwargs=recipe.template_kwargs,
        )
        if self._formats.watched(text) != recipe.watched:
            return None
        return self._encoded(recipe, text)

    cdef object _encoded(self, Recipe recipe, str text):
        """The ids of a text, None if that takes long."""
        tokenizer = self._frontend.tokenizer
        if not tokenizer.is_short(len(text), text.isascii()):
            return None
        tokenizer.check_fits(text, self._frontend.facts.max_model_len, param=recipe.param)
        return tokenizer.encode_array(text, add_special_tokens=recipe.add_special_tokens)

    cdef bint _run(
        self, Recipe recipe, prompt, Numbers numbers, exchange, double received
    ) except -1:
        cdef Py_ssize_t num_prompt = len(prompt)
        cdef int64_t room = self._frontend.facts.max_model_len - num_prompt
        cdef int64_t max_tokens = recipe.limit(room, numbers.max_tokens)
        if not num_prompt or not max_tokens:
            return False
        cdef PlainSession session = PlainSession(
            self._frontend, self._pipeline.metrics, exchange, received, recipe
        )
        session.start(prompt, max_tokens, numbers.seed)
        return True


cdef Py_ssize_t _behind_white(const char *data, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    while at < size and data[at] in (c" ", c"\n", c"\r", c"\t"):
        at += 1
    return at


cdef Py_ssize_t _value_of(
    const char *data, Py_ssize_t size, const string &key
) noexcept nogil:
    """Where the value of a key may begin, -1 if nowhere. Learning finds out whether it does."""
    cdef Py_ssize_t length = <Py_ssize_t>key.size()
    cdef Py_ssize_t at
    cdef const char *found = <const char *>memmem(data, <size_t>size, key.data(), key.size())
    if found == NULL:
        return -1
    at = _behind_white(data, found - data + length, size)
    if at >= size or data[at] != c":":
        return -1
    at = _behind_white(data, at + 1, size)
    return at if at < size else -1


cdef int64_t _cut(string &body, const string &key, char mark) noexcept nogil:
    """Put ``mark`` for the value of a key, if that is a plain number; the number, or -1."""
    cdef Py_ssize_t size = <Py_ssize_t>body.size()
    cdef const char *data = body.data()
    cdef Py_ssize_t first = _value_of(data, size, key)
    cdef Py_ssize_t at = first
    cdef int64_t value = 0
    if first < 0:
        return -1
    while at < size and c"0" <= data[at] <= c"9" and at - first < MAX_NUMBER_DIGITS:
        value = 10 * value + (data[at] - c"0")
        at += 1
    if at == first or (data[first] == c"0" and at - first > 1):
        return -1
    if at == size or data[at] not in (c",", c"}", c" ", c"\n", c"\r", c"\t"):
        return -1
    body.replace(<size_t>first, <size_t>(at - first), 1, mark)
    return value


cdef Py_ssize_t _end_of_string(
    const char *data, Py_ssize_t start, Py_ssize_t size
) noexcept nogil:
    """Behind the string that begins here, -1 if it does not end."""
    cdef const char *found
    cdef Py_ssize_t at = start + 1
    cdef Py_ssize_t first
    while True:
        found = <const char *>memchr(data + at, c'"', <size_t>(size - at))
        if found == NULL:
            return -1
        first = at = found - data
        while data[first - 1] == c"\\":
            first -= 1
        if not (at - first) & 1:
            return at + 1
        at += 1


cdef Py_ssize_t _end_of_list(const char *data, Py_ssize_t start, Py_ssize_t size) noexcept nogil:
    """Behind the list that begins here, -1 if none does, or if it does not end."""
    cdef Py_ssize_t depth = 0
    cdef Py_ssize_t at = start
    if data[at] != c"[":
        return -1
    while at < size:
        if data[at] == c'"':
            at = _end_of_string(data, at, size)
            if at < 0:
                return -1
            continue
        if data[at] == c"[":
            depth += 1
        elif data[at] == c"]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return -1


cdef Py_ssize_t _read_ids(
    const char *data, Py_ssize_t start, Py_ssize_t size, vector[int32_t] &ids
) noexcept nogil:
    """Read a list of token ids; behind it, -1 if it is anything else, or empty."""
    cdef Py_ssize_t at = start
    cdef Py_ssize_t first
    cdef int64_t value
    if data[at] != c"[":
        return -1
    while True:
        first = at = _behind_white(data, at + 1, size)
        value = 0
        while at < size and c"0" <= data[at] <= c"9" and at - first < MAX_DIGITS:
            value = 10 * value + (data[at] - c"0")
            at += 1
        if at == first or value > 0x7FFFFFFF or (data[first] == c"0" and at - first > 1):
            return -1
        ids.push_back(<int32_t>value)
        at = _behind_white(data, at, size)
        if at >= size:
            return -1
        if data[at] == c"]":
            return at + 1
        if data[at] != c",":
            return -1
