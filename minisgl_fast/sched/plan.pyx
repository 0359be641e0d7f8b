"""StepPlan: everything the device has to know of one step, packed in one int32 buffer.

The scheduler writes a plan; the runner copies its buffer to the device in one piece (and to the
other ranks in one send) and reads it through views whose offsets never change, because CUDA graphs
need fixed addresses. With S = max_seqs, N = max_tokens, U = max_updates, B = max_bias:

    header[16]         step, num_tokens, num_decode, num_seqs, num_samples, num_updates, num_bias,
                       graph_size, max_q_len, max_context, 0...
    per sequence       seq_slot[S]   row of the page table
                       q_start[S+1]  first token of the sequence in this step
                       context_len[S]  KV length, this step's tokens included
    per sample         sample_row[S] (token whose hidden state is sampled), sample_slot[S],
                       sample_position[S] (absolute position of the sampled token), temperature[S]f,
                       top_k[S], top_p[S]f, min_p[S]f, seed_lo[S], seed_hi[S], presence[S]f,
                       frequency[S]f, repetition[S]f, sample_flags[S] (SampleFlag),
                       mask_row[S] (with HAS_MASK: which of the step's grammar masks)
    bias, CSR          bias_start[S+1], bias_id[B], bias_value[B]f
    page table         update_slot[U], update_column[U], update_page[U]
    per token          input_id[N] (-1: take last_token[slot]), position[N],
                       kv_slot[N] (page * page_size + offset; -1: write nothing)

f marks float32 bits. Rules: decode rows come first, so token i is sequence i and sample i for
i < num_decode; every section starts on 16 bytes; words past a section's count are leftovers of
earlier steps; a plan may be filled again only after its step was committed.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

cdef enum:
    ALIGNMENT_WORDS = 4


cdef class PlanCapacity:
    """Upper bounds of one plan; ``num_words`` is the size of its buffer in int32."""

    def __init__(self, int32_t max_tokens, int32_t max_seqs, int32_t max_updates, int32_t max_bias):
        if min(max_tokens, max_seqs, max_updates) < 1 or max_bias < 0 or max_tokens < max_seqs:
            raise ValueError(
                "a plan needs room for at least one sequence and update, and max_tokens >= max_seqs"
            )
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        self.max_updates = max_updates
        self.max_bias = max_bias
        self.sections = {}
        offset = 0
        for name, length in self._lengths().items():
            self.sections[name] = (offset, length)
            offset += -(-length // ALIGNMENT_WORDS) * ALIGNMENT_WORDS
        self.num_words = offset

    def _lengths(self):
        tokens, seqs, updates, bias = (
            self.max_tokens, self.max_seqs, self.max_updates, self.max_bias
        )
        return {
            "header": HEADER_WORDS,
            "seq_slot": seqs, "q_start": seqs + 1, "context_len": seqs,
            "sample_row": seqs, "sample_slot": seqs, "sample_position": seqs,
            "temperature": seqs, "top_k": seqs, "top_p": seqs, "min_p": seqs,
            "seed_lo": seqs, "seed_hi": seqs,
            "presence": seqs, "frequency": seqs, "repetition": seqs, "sample_flags": seqs,
            "mask_row": seqs,
            "bias_start": seqs + 1, "bias_id": bias, "bias_value": bias,
            "update_slot": updates, "update_column": updates, "update_page": updates,
            "input_id": tokens, "position": tokens, "kv_slot": tokens,
        }

    def offsets(self):
        """{section: (offset, length)} in int32 words."""
        return dict(self.sections)

    def __repr__(self):
        return (
            f"PlanCapacity(max_tokens={self.max_tokens}, max_seqs={self.max_seqs}, "
            f"max_updates={self.max_updates}, max_bias={self.max_bias})"
        )


cdef class Span:
    """Rows of one sequence in a step whose results are more than a token. In order of ``seq``.

    sample >= 0: the log-probabilities of the token that this sample brings. Else task GENERATE:
    those of ``targets``, which stand at ``position`` and behind it, each from the hidden state one
    before, in rows first_row .. first_row + num_rows - 1 of the step. Else an embedding: the last
    of the rows, or the sum of all, after the last norm; ``position`` is that of the first row.

    With log-probabilities come the ``num_top`` largest and those of ``ids`` (int32).
    """

    def __repr__(self):
        return (
            f"Span(seq={self.seq}, sample={self.sample}, task={self.task}, "
            f"rows={self.first_row}+{self.num_rows}, position={self.position})"
        )


cdef class StepPlan:
    """One step over memory that the caller owns and keeps alive.

    ``address`` is the ``data_ptr`` of at least ``capacity.num_words`` int32 on a 4-byte boundary (a
    pinned tensor, or an ``array.array``). ``histories`` lists (slot, tokens, num_prompt) of the
    requests with penalties that were admitted in this step: the runner resets the token counts of
    those slots before it samples. ``spans`` lists what the step brings beside tokens. ``masks``
    lists (grammar, ids to avoid) of the samples with HAS_MASK: the mask of entry i is to be in row
    i of the masks that go with the plan before the step is sampled (``Grammar.fill_mask``), once
    the tokens of all steps before it are committed.
    """

    def __init__(self, uintptr_t address, PlanCapacity capacity not None):
        if address == 0 or address % sizeof(int32_t):
            raise ValueError("a plan needs the address of int32 memory")
        self.capacity = capacity
        cdef int32_t *base = <int32_t *>address
        self.header = base + self._offset("header")
        self.seq_slot = base + self._offset("seq_slot")
        self.q_start = base + self._offset("q_start")
        self.context_len = base + self._offset("context_len")
        self.sample_row = base + self._offset("sample_row")
        self.sample_slot = base + self._offset("sample_slot")
        self.sample_position = base + self._offset("sample_position")
        self.temperature = <float *>(base + self._offset("temperature"))
        self.top_k = base + self._offset("top_k")
        self.top_p = <float *>(base + self._offset("top_p"))
        self.min_p = <float *>(base + self._offset("min_p"))
        self.seed_lo = base + self._offset("seed_lo")
        self.seed_hi = base + self._offset("seed_hi")
        self.presence = <float *>(base + self._offset("presence"))
        self.frequency = <float *>(base + self._offset("frequency"))
        self.repetition = <float *>(base + self._offset("repetition"))
        self.sample_flags = base + self._offset("sample_flags")
        self.mask_row = base + self._offset("mask_row")
        self.bias_start = base + self._offset("bias_start")
        self.bias_id = base + self._offset("bias_id")
        self.bias_value = <float *>(base + self._offset("bias_value"))
        self.update_slot = base + self._offset("update_slot")
        self.update_column = base + self._offset("update_column")
        self.update_page = base + self._offset("update_page")
        self.input_id = base + self._offset("input_id")
        self.position = base + self._offset("position")
        self.kv_slot = base + self._offset("kv_slot")
        self.begin(0)

    cdef int32_t _offset(self, str name) except -1:
        return self.capacity.sections[name][0]

    # Writers, called by the scheduler. Their asserts are about its arithmetic, not about input.

    cdef void begin(self, int32_t step):
        cdef int32_t word
        for word in range(HEADER_WORDS):
            self.header[word] = 0
        self.header[STEP] = step
        self.q_start[0] = 0
        self.bias_start[0] = 0
        self.histories = []
        self.spans = []
        self.masks = []

    cdef void add_update(self, int32_t slot, int32_t column, int32_t page) noexcept:
        cdef int32_t i = self.header[NUM_UPDATES]
        assert i < self.capacity.max_updates
        self.update_slot[i] = slot
        self.update_column[i] = column
        self.update_page[i] = page
        self.header[NUM_UPDATES] = i + 1

    cdef void add_decode(self, int32_t slot, int32_t position, int32_t kv_slot) noexcept:
        """A row of one token whose id is still on the device."""
        cdef int32_t i = self.header[NUM_SEQS]
        assert i == self.header[NUM_TOKENS] == self.header[NUM_DECODE] < self.capacity.max_seqs
        self.seq_slot[i] = slot
        self.q_start[i + 1] = i + 1
        self.context_len[i] = position + 1
        self.input_id[i] = -1
        self.position[i] = position
        self.kv_slot[i] = kv_slot
        self.header[NUM_SEQS] = i + 1
        self.header[NUM_TOKENS] = i + 1
        self.header[NUM_DECODE] = i + 1
        self.header[MAX_Q_LEN] = 1

    cdef void add_chunk(
        self, int32_t slot, const int32_t *tokens, int32_t first, int32_t last,
        const int32_t *pages, int32_t page_size,
    ) noexcept:
        """The tokens [first, last) of one sequence, whose pages are the row ``pages``."""
        cdef int32_t i = self.header[NUM_SEQS]
        cdef int32_t row = self.header[NUM_TOKENS]
        cdef int32_t position, stop, kv_slot
        assert first < last and i < self.capacity.max_seqs
        assert row + last - first <= self.capacity.max_tokens
        memcpy(self.input_id + row, tokens + first, (last - first) * sizeof(int32_t))
        position = first
        while position < last:
            stop = min(last, (position // page_size + 1) * page_size)
            kv_slot = pages[position // page_size] * page_size + position % page_size
            while position < stop:
                self.position[row] = position
                self.kv_slot[row] = kv_slot
                row += 1
                position += 1
                kv_slot += 1
        self.seq_slot[i] = slot
        self.q_start[i + 1] = row
        self.context_len[i] = last
        self.header[NUM_SEQS] = i + 1
        self.header[NUM_TOKENS] = row
        self.header[MAX_Q_LEN] = max(self.header[MAX_Q_LEN], last - first)
        self.header[MAX_CONTEXT] = max(self.header[MAX_CONTEXT], last)

    cdef void add_sample(self, int32_t slot, int32_t position, const Sampling *sampling) noexcept:
        """Sample after the last token row; the new token will stand at ``position``."""
        cdef int32_t j = self.header[NUM_SAMPLES]
        assert j < self.header[NUM_SEQS]
        self.sample_row[j] = self.header[NUM_TOKENS] - 1
        self.sample_slot[j] = slot
        self.sample_position[j] = position
        self.temperature[j] = sampling.temperature
        self.top_k[j] = sampling.top_k
        self.top_p[j] = sampling.top_p
        self.min_p[j] = sampling.min_p
        self.seed_lo[j] = sampling.seed_lo
        self.seed_hi[j] = sampling.seed_hi
        self.presence[j] = sampling.presence
        self.frequency[j] = sampling.frequency
        self.repetition[j] = sampling.repetition
        self.sample_flags[j] = sampling.flags
        self.bias_start[j + 1] = self.header[NUM_BIAS]
        self.header[NUM_SAMPLES] = j + 1

    cdef void add_bias(self, int32_t token, float value) noexcept:
        """One more bias of the latest sample."""
        cdef int32_t j = self.header[NUM_SAMPLES]
        cdef int32_t k = self.header[NUM_BIAS]
        assert j > 0 and k < self.capacity.max_bias
        self.bias_id[k] = token
        self.bias_value[k] = value
        self.bias_start[j] = k + 1
        self.header[NUM_BIAS] = k + 1
        self.sample_flags[j - 1] |= HAS_BIAS

    cdef void add_mask(self, object grammar, tuple avoided):
        """Let a grammar say what the latest sample may be."""
        cdef int32_t j = self.header[NUM_SAMPLES]
        assert j > 0
        self.sample_flags[j - 1] |= HAS_MASK
        self.mask_row[j - 1] = <int32_t>len(self.masks)
        self.masks.append((grammar, avoided))

    # Public API

    def offsets(self):
        """{section: (offset, length)} in int32 words."""
        return self.capacity.offsets()

    def pad(self, int32_t graph_size):
        """Fill the rows num_seqs..graph_size-1 of a pure decode plan with rows that harm nothing.

        They read and write no page (context_len 0, kv_slot -1) and sample greedily into the scratch
        row ``max_seqs`` of the device's tables. The counts in the header stay; ``graph_size`` is
        set. ValueError when the plan has other rows than decodes or more than ``graph_size``.
        """
        cdef int32_t max_seqs = self.capacity.max_seqs
        cdef int32_t num_seqs = self.header[NUM_SEQS]
        cdef int32_t i
        if self.header[NUM_DECODE] != num_seqs:
            raise ValueError("only a plan of decodes alone can be padded")
        if not num_seqs <= graph_size <= max_seqs:
            raise ValueError(f"cannot pad {num_seqs} rows to {graph_size}, max_seqs is {max_seqs}")
        for i in range(num_seqs, graph_size):
            self.seq_slot[i] = max_seqs
            self.q_start[i + 1] = i + 1
            self.context_len[i] = 0
            self.sample_row[i] = i
            self.sample_slot[i] = max_seqs
            self.sample_position[i] = 0
            self.temperature[i] = 0.0
            self.top_k[i] = 0
            self.top_p[i] = 1.0
            self.min_p[i] = 0.0
            self.seed_lo[i] = 0
            self.seed_hi[i] = 0
            self.presence[i] = 0.0
            self.frequency[i] = 0.0
            self.repetition[i] = 1.0
            self.sample_flags[i] = 0
            self.mask_row[i] = 0
            self.bias_start[i + 1] = self.header[NUM_BIAS]
            self.input_id[i] = 0  # not -1: the scratch row may hold a token that is no id
            self.position[i] = 0
            self.kv_slot[i] = -1
        self.header[GRAPH_SIZE] = graph_size

    @property
    def step(self):
        return self.header[STEP]

    @property
    def num_tokens(self):
        return self.header[NUM_TOKENS]

    @property
    def num_decode(self):
        return self.header[NUM_DECODE]

    @property
    def num_seqs(self):
        return self.header[NUM_SEQS]

    @property
    def num_samples(self):
        return self.header[NUM_SAMPLES]

    @property
    def num_updates(self):
        return self.header[NUM_UPDATES]

    @property
    def num_bias(self):
        return self.header[NUM_BIAS]

    @property
    def graph_size(self):
        return self.header[GRAPH_SIZE]

    @property
    def max_q_len(self):
        """Longest run of tokens of one sequence in this step."""
        return self.header[MAX_Q_LEN]

    @property
    def max_context(self):
        """Largest context_len of a chunk; 0 in a step of decodes."""
        return self.header[MAX_CONTEXT]
