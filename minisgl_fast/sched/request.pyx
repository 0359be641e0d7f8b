"""Request: one generation inside the scheduler, as explicit counters. Channel: where its rows go.

    tokens   | prompt .................... | output, committed ... |  pending  |
             0                        num_prompt             tokens.size()  num_tokens()

    0 <= num_committed <= num_computed <= num_tokens()

num_tokens() counts the tokens that exist or will exist once the steps in flight are committed; the
last num_pending of them (at most 2) are known to the device alone. KV is computed, or launched, for
[0, num_computed) and committed for [0, num_committed); full pages of the committed part are
published. num_prefill is how many tokens stood there at (re)admission: below it the request is
prefilled in chunks from ``tokens``, from there on it decodes one pending token after the other.
A preempted request keeps its tokens, starts again with all other counters at 0, and goes on.
"""

from libc.string cimport memcpy

from minisgl_fast.errors import EngineError
from minisgl_fast.sched.plan cimport HAS_PENALTIES
from minisgl_fast.wire cimport IGNORE_EOS, AddHeader


cdef class Channel:
    """One frontend: its live requests by rid, and the rows of its next STEP frame."""

    def __init__(self, int64_t number):
        self.number = number
        self.rows = StepRows()
        self.requests = {}


cdef class Request:

    @staticmethod
    cdef Request unpack(Channel channel, bytes payload, int32_t max_model_len, list eos_ids):
        """The request of an ADD payload (wire.AddHeader and its arrays)."""
        cdef const char *data = payload
        cdef const AddHeader *header = <const AddHeader *>data
        cdef size_t size = len(payload)
        if size < sizeof(AddHeader) or header.num_prompt == 0 or size != sizeof(AddHeader) + 4 * (
            <size_t>header.num_prompt + header.num_stop_ids + 2 * <size_t>header.num_bias
        ):
            raise EngineError("A frontend sent a malformed ADD frame.")
        cdef Request request = Request.__new__(Request)
        request.channel = channel
        request.rid = header.rid
        request.state = WAITING
        request.slot = -1
        request.priority = header.priority
        request.salt = header.cache_salt
        request.num_prompt = <int32_t>header.num_prompt
        request.num_cached = -1
        request.max_total = <int32_t>min(
            <int64_t>header.num_prompt + max(header.max_tokens, 1), <int64_t>max_model_len
        )
        request.min_total = <int32_t>min(
            <int64_t>header.num_prompt + max(header.min_tokens, 0), <int64_t>max_model_len
        )
        request.ignore_eos = header.flags & IGNORE_EOS

        data += sizeof(AddHeader)
        data = _read(data, header.num_prompt, request.tokens)
        data = _read(data, header.num_stop_ids, request.stop_ids)
        data = _read(data, header.num_bias, request.bias_ids)
        request.bias_values.resize(header.num_bias)
        if header.num_bias:
            memcpy(request.bias_values.data(), data, header.num_bias * sizeof(float))
        if request.min_total > request.num_prompt:
            request.banned_ids = request.stop_ids
            if not request.ignore_eos:
                for token in eos_ids:
                    request.banned_ids.push_back(token)

        request.sampling.temperature = header.temperature
        request.sampling.top_p = header.top_p
        request.sampling.min_p = header.min_p
        request.sampling.presence = header.presence_penalty
        request.sampling.frequency = header.frequency_penalty
        request.sampling.repetition = header.repetition_penalty
        request.sampling.top_k = header.top_k
        request.sampling.seed_lo = <int32_t><uint32_t>header.seed
        request.sampling.seed_hi = <int32_t><uint32_t>(header.seed >> 32)
        if (
            header.presence_penalty != 0 or header.frequency_penalty != 0
            or header.repetition_penalty != 1
        ):
            request.sampling.flags = HAS_PENALTIES
        return request

    cdef int32_t num_tokens(self) noexcept:
        return <int32_t>self.tokens.size() + self.num_pending

    cdef int32_t num_bias(self) noexcept:
        """Most entries of a plan's bias section that one step of this request takes."""
        return <int32_t>(self.bias_ids.size() + self.banned_ids.size())

    cdef void emit(self, int32_t token, int reason) noexcept:
        if not self.reported:
            self.reported = True
            self.channel.rows.add_first(self.rid, max(self.num_cached, 0))
        self.channel.rows.add(self.rid, token, reason)

    cdef void rewind(self) noexcept:
        """Hold nothing, have computed nothing."""
        self.slot = -1
        self.pages.clear()
        self.path.clear()
        self.num_prefill = 0
        self.num_computed = 0
        self.num_committed = 0
        self.num_published = 0


cdef const char *_read(const char *data, uint32_t count, vector[int32_t] &values) noexcept:
    values.resize(count)
    if count:
        memcpy(values.data(), data, count * sizeof(int32_t))
    return data + count * sizeof(int32_t)
