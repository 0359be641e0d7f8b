"""The frames that frontends and the engine exchange, packed and unpacked.

A frame is ``u32 length, u8 kind, payload``, little-endian; length counts kind and payload. Frames
travel over one AF_UNIX stream socketpair per frontend (channel.py).

    CONFIG    frontend -> engine   JSON {"config", "model_path", "vocab_limit", "eos_ids"}, first
    ADD       frontend -> engine   AddHeader and its arrays (wire.pxd)
    ABORT     frontend -> engine   u32 rid
    PROGRESS  engine -> frontend   JSON {"stage", "done", "total"} while the engine starts
    READY     engine -> frontend   JSON with what a frontend must know of the model and the cache
    STEP      engine -> frontend   StepHeader and its arrays: every token of one engine step
    STATS     engine -> frontend   JSON with scheduler and cache counters
    FATAL     engine -> frontend   JSON {"message", "exit_code"}; the engine exits after it

Rules: a rid is chosen by the frontend and unique among its unfinished requests. Every ADD is
answered by rows that end in exactly one row with a reason other than RUNNING, unless the frontend
sent ABORT first; after ABORT no more rows of that rid are promised and late ones are dropped. A
row's token is -1 when the request ended without one. The first row of a request stands together
with a ``first`` entry that tells how many prompt tokens came from the prefix cache.
"""

from array import array

from cpython.array cimport array as c_array
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.string cimport memcpy

from minisgl_fast.errors import EngineError

FRAME_HEADER_BYTES = 5


def frame(int kind, bytes payload not None):
    """One whole frame."""
    return (len(payload) + 1).to_bytes(4, "little") + bytes((kind,)) + payload


def pack_add(
    uint32_t rid, params, prompt, *, uint64_t seed, int32_t max_tokens,
    uint64_t cache_salt=0, int32_t priority=0,
):
    """The payload of ADD.

    ``params`` is a SamplingParams; ``seed`` and ``max_tokens`` are its values with the defaults
    filled in. ``prompt`` is a sequence of token ids.
    """
    cdef AddHeader header
    cdef c_array prompt_ids = array("i", prompt)
    cdef c_array stop_ids = array("i", params.stop_token_ids)
    cdef c_array bias_ids = array("i", params.logit_bias.keys())
    cdef c_array bias_values = array("f", params.logit_bias.values())
    header.rid = rid
    header.flags = IGNORE_EOS if params.ignore_eos else 0
    header.seed = seed
    header.cache_salt = cache_salt
    header.temperature = params.temperature
    header.top_p = params.top_p
    header.min_p = params.min_p
    header.presence_penalty = params.presence_penalty
    header.frequency_penalty = params.frequency_penalty
    header.repetition_penalty = params.repetition_penalty
    header.top_k = max(params.top_k, 0)
    header.max_tokens = max_tokens
    header.min_tokens = params.min_tokens
    header.priority = priority
    header.num_prompt = len(prompt_ids)
    header.num_stop_ids = len(stop_ids)
    header.num_bias = len(bias_ids)
    return b"".join((
        PyBytes_FromStringAndSize(<char *>&header, sizeof(AddHeader)),
        prompt_ids.tobytes(), stop_ids.tobytes(), bias_ids.tobytes(), bias_values.tobytes(),
    ))


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
