"""C layouts of the two hot frames; see wire.pyx for the whole protocol."""

from libc.stdint cimport int16_t, int32_t, uint8_t, uint32_t, uint64_t
from libcpp.vector cimport vector

cpdef enum FrameKind:
    # frontend -> engine
    ADD = 1
    ABORT = 2
    CONFIG = 3
    FLUSH = 4
    JOIN = 5
    # engine -> frontend
    PROGRESS = 16
    READY = 17
    STEP = 18
    STATS = 19
    FATAL = 20
    LOGPROBS = 21
    EMBEDDING = 22
    FLUSHED = 23

cpdef enum FinishReason:
    RUNNING = 0
    EOS = 1
    LENGTH = 2
    STOP_TOKEN = 3
    ABORTED = 4
    ERROR = 5
    GRAMMAR = 6  # no token can go on with the request's grammar

cpdef enum AddFlag:
    IGNORE_EOS = 1

cpdef enum Task:
    GENERATE = 0
    EMBED_LAST = 1  # the hidden state of the prompt's last token
    EMBED_MEAN = 2  # the mean of the hidden states of all its tokens

cdef packed struct AddHeader:
    # followed by: int32 prompt[num_prompt], int32 stop_ids[num_stop_ids],
    # int32 bias_ids[num_bias], float bias_values[num_bias], int32 logprob_ids[num_logprob_ids],
    # uint8 grammar[num_grammar_bytes]
    uint32_t rid
    uint32_t flags
    uint64_t seed
    uint64_t cache_salt
    float temperature
    float top_p
    float min_p
    float presence_penalty
    float frequency_penalty
    float repetition_penalty
    int32_t top_k
    int32_t max_tokens
    int32_t min_tokens
    int32_t priority
    uint32_t num_prompt
    uint32_t num_stop_ids
    uint32_t num_bias
    uint32_t num_logprob_ids
    uint32_t num_grammar_bytes
    int32_t prompt_logprobs_from
    int16_t num_top_logprobs
    uint8_t task
    uint8_t unused


cdef class AddTemplate:
    """All of an ADD payload that many requests have in common."""
    cdef AddHeader header
    cdef bytes tail  # the arrays behind the prompt

    cpdef bytes pack(self, uint32_t rid, prompt, uint64_t seed, int32_t max_tokens)


cdef packed struct StepHeader:
    # followed by: uint32 rid[num_rows], int32 token[num_rows], uint32 first_rid[num_first],
    # uint32 first_cached[num_first], uint8 reason[num_rows]
    uint32_t num_rows
    uint32_t num_first

cdef packed struct LogprobsHeader:
    # followed by: int32 token[num_tokens], float chosen[num_tokens],
    # int32 top_id[num_tokens * num_top], float top_value[num_tokens * num_top],
    # float id_value[num_tokens * num_ids]
    uint32_t rid
    uint32_t is_prompt
    uint32_t position
    uint32_t num_tokens
    uint32_t num_top
    uint32_t num_ids


cdef class StepRows:
    """The rows of one STEP frame while they are gathered; ``pack`` empties it."""
    cdef vector[uint32_t] rids
    cdef vector[int32_t] tokens
    cdef vector[uint8_t] reasons
    cdef vector[uint32_t] first_rids
    cdef vector[uint32_t] first_cached

    cdef void add(self, uint32_t rid, int32_t token, uint8_t reason) noexcept
    cdef void add_first(self, uint32_t rid, uint32_t num_cached) noexcept
    cpdef bytes pack(self)
