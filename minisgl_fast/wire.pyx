"""The frames that frontends and the engine exchange, packed and unpacked.

A frame is ``u32 length, u8 kind, payload``, little-endian; length counts kind and payload. Frames
travel over one AF_UNIX stream socketpair per frontend (channel.py).

    CONFIG    frontend -> engine   JSON {"config", "model_path", "vocab_limit", "eos_ids",
                                   "vocabulary"}, first
    ADD       frontend -> engine   AddHeader and its arrays (wire.pxd)
    ABORT     frontend -> engine   u32 rid
    JOIN      frontend -> engine   nothing, but a socket comes with it: another frontend's channel
    FLUSH     frontend -> engine   u32 ticket: forget all cached prefixes
    PROGRESS  engine -> frontend   JSON {"stage", "done", "total"} while the engine starts
    READY     engine -> frontend   JSON with what a frontend must know of the model and the cache
    STEP      engine -> frontend   StepHeader and its arrays: every token of one engine step
    STATS     engine -> frontend   JSON with scheduler and cache counters
    FATAL     engine -> frontend   JSON {"message", "exit_code"}; the engine exits after it
    LOGPROBS  engine -> frontend   records of LogprobsHeader and its arrays, one after another
    EMBEDDING engine -> frontend   u32 rid, float32 vector
    FLUSHED   engine -> frontend   u32 ticket of a FLUSH, u8: 1 if it was done, 0 if there is work

Rules: a rid is chosen by the frontend and unique among its unfinished requests. Every ADD is
answered by rows that end in exactly one row with a reason other than RUNNING, unless the frontend
sent ABORT first; after ABORT no more rows of that rid are promised and late ones are dropped. A
row's token is -1 when the request ended without one. The first row of a request stands together
with a ``first`` entry that tells how many prompt tokens came from the prefix cache.

What an ADD asks for beside tokens comes in frames of its own, which go out before the STEP frame
with the row they belong to, so that a reader of a row has it all:

- num_top_logprobs >= 0: every sampled token brings one LOGPROBS record with its log-probability
  and that many of the largest. prompt_logprobs_from = p >= 0: records with is_prompt bring, in
  order and each once, the positions from max(p, 1) to the prompt's end, before its first row. In
  every record stand the log-probabilities of all logprob_ids, in the order of the ADD. Values are
  the log-softmax of the model's logits as they are, before penalties, bias, mask and temperature;
  top ids descend, lowest id first on a tie, -1 where the vocabulary has no more.
- max_tokens 0: the request ends with LENGTH and no token once its prompt is computed.
- task EMBED_*: the same, with an EMBEDDING frame: the pooled hidden state after the last norm.
- grammar: what the tokens must match, as engine/grammar.py reads it; empty for anything.
"""

from array import array
from typing import NamedTuple

from cpython.array cimport array as c_array
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.string cimport memcpy

from minisgl_fast.errors import EngineError

FRAME_HEADER_BYTES = 5


def frame(int kind, bytes payload not None):
    """One whole frame."""
    cdef size_t size = <size_t>len(payload)
    cdef uint32_t length = <uint32_t>size + 1
    cdef uint8_t kind_byte = <uint8_t>kind
    cdef bytes whole = PyBytes_FromStringAndSize(NULL, FRAME_HEADER_BYTES + size)
    cdef char *out = _put(PyBytes_AS_STRING(whole), &length, 4)
    out = _put(out, &kind_byte, 1)
    _put(out, PyBytes_AS_STRING(payload), size)
    return whole


_NO_INTS = array("i")
_NO_FLOATS = array("f")


cdef inline c_array _ints(values):
    """The ids of a sequence, or the keys of a dict; most requests have none."""
    return array("i", values) if values else _NO_INTS


cdef class AddTemplate:

    def __init__(
        self, params, *, uint64_t cache_salt=0, int32_t priority=0, int16_t num_top_logprobs=-1,
        int32_t prompt_logprobs_from=-1, logprob_ids=(), uint8_t task=GENERATE,
        bytes grammar not None=b"",
    ):
        """``params`` is a SamplingParams, whose seed and max_tokens are each request's own. The
        others are those of AddHeader."""
        cdef AddHeader *header = &self.header
        cdef c_array stop_ids = _ints(params.stop_token_ids)
        banned = params.banned_token_ids
        bias = {**params.logit_bias, **dict.fromkeys(banned, float("-inf"))} if banned else (
            params.logit_bias
        )
        cdef c_array bias_ids = _ints(bias)
        cdef c_array bias_values = array("f", bias.values()) if bias else _NO_FLOATS
        cdef c_array ids = _ints(logprob_ids)
        header.flags = IGNORE_EOS if params.ignore_eos else 0
        header.cache_salt = cache_salt
        header.temperature = params.temperature
        header.top_p = params.top_p
        header.min_p = params.min_p
        header.presence_penalty = params.presence_penalty
        header.frequency_penalty = params.frequency_penalty
        header.repetition_penalty = params.repetition_penalty
        header.top_k = max(params.top_k, 0)
        header.min_tokens = params.min_tokens
        header.priority = priority
        header.num_stop_ids = len(stop_ids)
        header.num_bias = len(bias_ids)
        header.num_logprob_ids = len(ids)
        header.num_grammar_bytes = len(grammar)
        header.prompt_logprobs_from = prompt_logprobs_from
        header.num_top_logprobs = num_top_logprobs
        header.task = task
        header.unused = 0
        self.tail = b"".join((
            stop_ids.tobytes(), bias_ids.tobytes(), bias_values.tobytes(), ids.tobytes(), grammar,
        ))

    cpdef bytes pack(self, uint32_t rid, prompt, uint64_t seed, int32_t max_tokens):
        """The payload of one request; ``prompt`` is a sequence of token ids."""
        cdef c_array ids = prompt if _is_int_array(prompt) else array("i", prompt)
        cdef size_t num_prompt = <size_t>len(ids)
        cdef size_t tail_size = <size_t>len(self.tail)
        cdef bytes payload = PyBytes_FromStringAndSize(
            NULL, sizeof(AddHeader) + 4 * num_prompt + tail_size
        )
        cdef char *out = PyBytes_AS_STRING(payload)
        cdef AddHeader *header = <AddHeader *>out
        out = _put(out, &self.header, sizeof(AddHeader))
        header.rid = rid
        header.seed = seed
        header.max_tokens = max_tokens
        header.num_prompt = <uint32_t>num_prompt
        out = _put(out, ids.data.as_voidptr, 4 * num_prompt)
        _put(out, PyBytes_AS_STRING(self.tail), tail_size)
        return payload


cdef inline bint _is_int_array(values):
    return type(values) is array and (<c_array>values).typecode == "i"


def pack_add(
    uint32_t rid, params, prompt, *, uint64_t seed, int32_t max_tokens, **options
):
    """The payload of an ADD that has nothing in common with others. ``options``: the arguments of
    AddTemplate."""
    return AddTemplate(params, **options).pack(rid, prompt, seed, max_tokens)


def grammar_of(bytes payload not None):
    """The rid and the grammar of an ADD payload; the grammar is empty where there is none."""
    cdef const AddHeader *header = <const AddHeader *>PyBytes_AS_STRING(payload)
    cdef size_t size = len(payload)
    if size < sizeof(AddHeader) or size - sizeof(AddHeader) < header.num_grammar_bytes:
        raise EngineError("A frontend sent a malformed ADD frame.")
    return header.rid, payload[size - header.num_grammar_bytes :]


def add_summary(bytes payload not None):
    """(rid, max_tokens, task, num_top_logprobs, prompt_logprobs_from) of an ADD payload."""
    cdef const AddHeader *header = <const AddHeader *>PyBytes_AS_STRING(payload)
    if <size_t>len(payload) < sizeof(AddHeader):
        raise EngineError("A frontend sent a malformed ADD frame.")
    return (
        header.rid, header.max_tokens, header.task, header.num_top_logprobs,
        header.prompt_logprobs_from,
    )


cdef class StepRows:

    cdef void add(self, uint32_t rid, int32_t token, uint8_t reason) noexcept:
        self.rids.push_back(rid)
        self.tokens.push_back(token)
        self.reasons.push_back(reason)

    cdef void add_first(self, uint32_t rid, uint32_t num_cached) noexcept:
        self.first_rids.push_back(rid)
        self.first_cached.push_back(num_cached)

    cpdef bytes pack(self):
        """The payload of STEP."""
        cdef StepHeader header
        header.num_rows = <uint32_t>self.rids.size()
        header.num_first = <uint32_t>self.first_rids.size()
        cdef size_t rows = header.num_rows
        cdef size_t firsts = header.num_first
        cdef bytes payload = PyBytes_FromStringAndSize(
            NULL, sizeof(StepHeader) + rows * 9 + firsts * 8
        )
        cdef char *out = PyBytes_AS_STRING(payload)
        out = _put(out, &header, sizeof(StepHeader))
        out = _put(out, self.rids.data(), rows * 4)
        out = _put(out, self.tokens.data(), rows * 4)
        out = _put(out, self.first_rids.data(), firsts * 4)
        out = _put(out, self.first_cached.data(), firsts * 4)
        _put(out, self.reasons.data(), rows)
        self.rids.clear()
        self.tokens.clear()
        self.reasons.clear()
        self.first_rids.clear()
        self.first_cached.clear()
        return payload


cdef inline char *_put(char *out, const void *source, size_t num_bytes) noexcept nogil:
    if num_bytes:
        memcpy(out, source, num_bytes)
    return out + num_bytes


def pack_step(rows, first=()):
    """STEP from Python: rows of (rid, token, reason), first of (rid, num_cached). For fakes."""
    cdef StepRows gathered = StepRows()
    for rid, token, reason in rows:
        gathered.add(rid, token, reason)
    for rid, num_cached in first:
        gathered.add_first(rid, num_cached)
    return gathered.pack()


def unpack_step(bytes payload not None):
    """The (rows, first) of a STEP payload, as ``pack_step`` takes them."""
    cdef const char *data = PyBytes_AS_STRING(payload)
    cdef const StepHeader *header = <const StepHeader *>data
    cdef size_t size = len(payload)
    if size < sizeof(StepHeader) or size != (
        sizeof(StepHeader) + <size_t>header.num_rows * 9 + <size_t>header.num_first * 8
    ):
        raise EngineError("The engine sent a malformed STEP frame.")
    cdef size_t rows = header.num_rows
    cdef size_t firsts = header.num_first
    cdef const uint32_t *rids = <const uint32_t *>(data + sizeof(StepHeader))
    cdef const int32_t *tokens = <const int32_t *>(rids + rows)
    cdef const uint32_t *first_rids = <const uint32_t *>(tokens + rows)
    cdef const uint32_t *first_cached = first_rids + firsts
    cdef const uint8_t *reasons = <const uint8_t *>(first_cached + firsts)
    cdef size_t i
    return (
        [(rids[i], tokens[i], reasons[i]) for i in range(rows)],
        [(first_rids[i], first_cached[i]) for i in range(firsts)],
    )


class LogprobsRecord(NamedTuple):
    """One record of a LOGPROBS frame. The tokens stand at ``position`` and behind it.

    For token i: ``chosen[i]``, the ``num_top`` pairs from ``top_ids[i * num_top]`` and
    ``top_values[i * num_top]`` on, and as many ``id_values`` as the ADD named ids.
    """

    rid: int
    is_prompt: bool
    position: int
    num_top: int
    tokens: array
    chosen: array
    top_ids: array
    top_values: array
    id_values: array


def logprobs_header(
    uint32_t rid, bint is_prompt, uint32_t position, uint32_t num_tokens, uint32_t num_top,
    uint32_t num_ids,
):
    """The head of one record; its arrays follow."""
    cdef LogprobsHeader header
    header.rid = rid
    header.is_prompt = is_prompt
    header.position = position
    header.num_tokens = num_tokens
    header.num_top = num_top
    header.num_ids = num_ids
    return PyBytes_FromStringAndSize(<char *>&header, sizeof(LogprobsHeader))


def pack_logprobs(records):
    """The payload of LOGPROBS from LogprobsRecords."""
    parts = []
    for record in records:
        num_tokens = len(record.tokens)
        parts.append(logprobs_header(
            record.rid, record.is_prompt, record.position, num_tokens, record.num_top,
            len(record.id_values) // max(num_tokens, 1),
        ))
        parts += [values.tobytes() for values in record[4:]]
    return b"".join(parts)


def unpack_logprobs(bytes payload not None):
    """The LogprobsRecords of a LOGPROBS payload."""
    cdef const char *data = PyBytes_AS_STRING(payload)
    cdef size_t size = len(payload)
    cdef size_t at = 0
    cdef LogprobsHeader header
    cdef size_t num_tops, num_values
    records = []
    while at < size:
        if size - at < sizeof(LogprobsHeader):
            raise EngineError("The engine sent a malformed LOGPROBS frame.")
        memcpy(&header, data + at, sizeof(LogprobsHeader))
        at += sizeof(LogprobsHeader)
        num_tops = <size_t>header.num_tokens * header.num_top
        num_values = <size_t>header.num_tokens * header.num_ids
        # The products stay below 2^64; their sum is checked one by one, since it might not.
        if (
            header.num_tokens > size or num_tops > size or num_values > size
            or size - at < 4 * (2 * <size_t>header.num_tokens + 2 * num_tops + num_values)
        ):
            raise EngineError("The engine sent a malformed LOGPROBS frame.")
        arrays = []
        for code, count in (
            ("i", header.num_tokens), ("f", header.num_tokens), ("i", num_tops), ("f", num_tops),
            ("f", num_values),
        ):
            values = array(code)
            values.frombytes(payload[at : at + 4 * count])
            at += 4 * count
            arrays.append(values)
        records.append(LogprobsRecord(
            header.rid, bool(header.is_prompt), header.position, header.num_top, *arrays
        ))
    return records


def pack_embedding(uint32_t rid, bytes vector not None):
    """The payload of EMBEDDING from float32 values."""
    return (<object>rid).to_bytes(4, "little") + vector


def unpack_embedding(bytes payload not None):
    """The (rid, array of float32) of an EMBEDDING payload."""
    if len(payload) < 4 or len(payload) % 4:
        raise EngineError("The engine sent a malformed EMBEDDING frame.")
    vector = array("f")
    vector.frombytes(payload[4:])
    return int.from_bytes(payload[:4], "little"), vector
