"""Request: one generation inside the scheduler, as explicit counters. Channel: where its rows go.

    tokens   | prompt .................... | output, committed ... |  pending  |
             0                        num_prompt             tokens.size()  num_tokens()

    0 <= num_committed <= num_computed <= num_tokens()

num_tokens() counts the tokens that exist or will exist once the steps in flight are committed; the
last num_pending of them (at most 2) are known to the device alone. KV is computed, or launched, for
[0, num_computed) and committed for [0, num_committed); full pages are published as soon as their
tokens are known and the step that fills them is planned. num_prefill is how many tokens stood there
at (re)admission: below it the request is prefilled in chunks from ``tokens``, from there on it
decodes one pending token after the other.
A preempted request keeps its tokens, starts again with all other counters at 0, and goes on.

A request may ask for more than tokens: log-probabilities of its prompt, or an embedding. For that
the hidden states at positions next_row .. end_row - 1 are still due. They are launched once and in
order; what comes of them is sent even if the request is preempted meanwhile, so a preempted request
goes on from there. A match in the prefix cache never covers a position that is due.

Its row of pages and the path of nodes it references are explained in radix.pyx. A row grows by
``append_page`` alone, which also tells the device's page table.
"""

from cpython.array cimport array as c_array
from cpython.array cimport clone
from cpython.bytes cimport PyBytes_AS_STRING
from libc.string cimport memcpy

from array import array

from minisgl_fast.errors import EngineError
from minisgl_fast.wire import logprobs_header, pack_embedding
from minisgl_fast.sched.plan cimport HAS_PENALTIES, NUM_SAMPLES, NUM_SEQS, NUM_TOKENS
from minisgl_fast.wire cimport EMBED_MEAN, EOS, GENERATE, IGNORE_EOS, LENGTH, STOP_TOKEN, AddHeader
from minisgl_fast.wire cimport RUNNING as GOES_ON

cdef c_array NO_TOKENS = array("i")
cdef float MINUS_INFINITY = float("-inf")


cdef class Channel:
    """One frontend: its live requests by rid, and the rows of its next STEP frame."""

    def __init__(self, int64_t number):
        self.number = number
        self.rows = StepRows()
        self.logprobs = []
        self.embeddings = []
        self.requests = {}


cdef class Request:

    @staticmethod
    cdef Request unpack(
        Channel channel, bytes payload, int32_t max_model_len, list eos_ids, object grammar
    ):
        """The request of an ADD payload (wire.AddHeader and its arrays), with its grammar or None.

        A grammar ends by itself: its request ends with EOS, ignored or not. IGNORE_EOS and
        min_tokens only keep it going as long as the grammar has anything else to say.
        """
        cdef const char *data = payload
        cdef const AddHeader *header = <const AddHeader *>data
        cdef size_t size = len(payload)
        cdef list stop_ids
        if size < sizeof(AddHeader) or header.num_prompt == 0 or size != sizeof(AddHeader) + 4 * (
            <size_t>header.num_prompt + header.num_stop_ids + 2 * <size_t>header.num_bias
            + header.num_logprob_ids
        ) + header.num_grammar_bytes:
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
            <int64_t>header.num_prompt + max(header.max_tokens, 0), <int64_t>max_model_len
        )
        request.min_total = <int32_t>min(
            <int64_t>header.num_prompt + max(header.min_tokens, 0), <int64_t>max_model_len
        )
        if grammar is not None or not header.flags & IGNORE_EOS:
            request.eos_ids = eos_ids

        data += sizeof(AddHeader)
        data = _read(data, header.num_prompt, request.tokens)
        data = _read(data, header.num_stop_ids, request.stop_ids)
        data = _read(data, header.num_bias, request.bias_ids)
        request.bias_values.resize(header.num_bias)
        if header.num_bias:
            memcpy(request.bias_values.data(), data, header.num_bias * sizeof(float))
        data += header.num_bias * sizeof(float)
        data = _read(data, header.num_logprob_ids, request.logprob_ids)
        request.num_top = header.num_top_logprobs
        request.task = header.task
        request.next_row = request.end_row = request.num_prompt
        if header.task != GENERATE:
            request.max_total = request.num_prompt
            request.next_row = 0 if header.task == EMBED_MEAN else request.num_prompt - 1
        elif header.prompt_logprobs_from >= 0:
            request.next_row = max(header.prompt_logprobs_from - 1, 0)
            request.end_row = request.num_prompt - 1
        request.grammar = grammar
        if grammar is not None:
            request.avoided = tuple(eos_ids) if header.flags & IGNORE_EOS else ()
            stop_ids = request.stop_ids  # as a list
            request.avoided_first = tuple(eos_ids + stop_ids)
        elif request.min_total > request.num_prompt:
            request.banned_ids = request.eos_ids
            for token in request.stop_ids:
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

    # What it has and what it asks for

    cdef int32_t num_tokens(self) noexcept:
        return <int32_t>self.tokens.size() + self.num_pending

    cdef int32_t num_bias(self) noexcept:
        """Most entries of a plan's bias section that one step of this request takes."""
        return <int32_t>(self.bias_ids.size() + self.banned_ids.size())

    cdef int finish_reason(self, int32_t token) noexcept:
        """What the newest token, already among ``tokens``, means for the request."""
        cdef size_t i
        for i in range(self.eos_ids.size()):
            if self.eos_ids[i] == token:
                return EOS
        for i in range(self.stop_ids.size()):
            if self.stop_ids[i] == token:
                return STOP_TOKEN
        return LENGTH if <int32_t>self.tokens.size() >= self.max_total else GOES_ON

    cdef void emit(self, int32_t token, int reason) noexcept:
        if not self.reported:
            self.reported = True
            self.channel.rows.add_first(self.rid, max(self.num_cached, 0))
        self.channel.rows.add(self.rid, token, reason)

    cdef tuple history(self):
        """The entry of ``plan.histories``."""
        return self.slot, _copy(self.tokens.data(), self.tokens.size()), self.num_prompt

    cdef int32_t num_matchable(self) noexcept:
        """How many tokens may come from the prefix cache: not all, and none that is due."""
        cdef int32_t most = <int32_t>self.tokens.size() - 1
        return min(most, self.next_row) if self.next_row < self.end_row else most

    cdef void add_sample(self, StepPlan plan):
        """Sample one more token in this step."""
        cdef int32_t position = self.num_tokens()
        cdef size_t i
        if self.num_top >= 0:
            plan.spans.append(self.make_span(plan, plan.header[NUM_SAMPLES], 0, 1, position))
        plan.add_sample(self.slot, position, &self.sampling)
        for i in range(self.bias_ids.size()):
            plan.add_bias(self.bias_ids[i], self.bias_values[i])
        if self.grammar is not None:
            plan.add_mask(
                self.grammar, self.avoided_first if position < self.min_total else self.avoided
            )
        elif position < self.min_total:
            for i in range(self.banned_ids.size()):
                plan.add_bias(self.banned_ids[i], MINUS_INFINITY)
        self.num_pending += 1

    cdef void add_due_rows(self, StepPlan plan, int32_t first, int32_t last):
        """Ask for what is due of the chunk [first, last), the latest of the plan."""
        cdef int32_t begin = max(first, self.next_row)
        cdef int32_t end = min(last, self.end_row)
        cdef int32_t row
        cdef Span span
        if begin >= end:
            return
        row = plan.header[NUM_TOKENS] - (last - begin)
        if self.task == GENERATE:
            span = self.make_span(plan, -1, row, end - begin, begin + 1)
            span.targets = _copy(self.tokens.data() + begin + 1, end - begin)
        else:
            span = self.make_span(plan, -1, row, end - begin, begin)
        plan.spans.append(span)
        self.next_row = end

    cdef Span make_span(
        self, StepPlan plan, int32_t sample, int32_t first_row, int32_t num_rows, int32_t position
    ):
        cdef Span span = Span.__new__(Span)
        span.seq = plan.header[NUM_SEQS] - 1
        span.sample = sample
        span.task = self.task
        span.first_row = first_row
        span.num_rows = num_rows
        span.position = position
        span.num_top = max(self.num_top, 0)
        span.targets = NO_TOKENS
        span.ids = _copy(self.logprob_ids.data(), self.logprob_ids.size())
        return span

    cdef void take_output(self, Span span, int32_t token, bytes output):
        """Send what came of a span; ``token`` is that of its sample.

        ``output``: chosen, top ids, top values and values of ids (wire.LogprobsHeader), or the
        float32 vector.
        """
        cdef const float *values
        cdef size_t i, count
        if span.task == GENERATE:
            tokens = span.targets if span.sample < 0 else array("i", (token,))
            self.channel.logprobs += (
                logprobs_header(
                    self.rid, span.sample < 0, span.position, span.num_rows, span.num_top,
                    len(span.ids),
                ),
                tokens.tobytes(), output,
            )
            return
        values = <const float *>PyBytes_AS_STRING(output)
        count = len(output) // sizeof(float)
        self.embedding.resize(count)
        for i in range(count):
            self.embedding[i] += values[i]
        if span.position + span.num_rows == self.num_prompt:
            divisor = self.num_prompt if self.task == EMBED_MEAN else 1
            mean = array("f", [value / divisor for value in self.embedding])
            self.channel.embeddings.append(pack_embedding(self.rid, mean.tobytes()))

    # Its row of pages

    cdef void hold(
        self, RadixCache cache, const int32_t *matched, int32_t num_matched, int32_t num_pages,
        StepPlan plan,
    ) noexcept:
        """Start a row of ``num_pages``: the matched ones, then fresh ones, which must be there."""
        cdef int32_t column
        cache.acquire_pages(matched, num_matched)
        for column in range(num_pages):
            if column < num_matched:
                self.append_page(matched[column], plan)
                self.path[column] = matched[column]
            else:
                self.append_page(cache.take_page(), plan)
        self.num_published = num_matched
        self.num_computed = num_matched * cache.page_size
        self.num_committed = self.num_computed
        self.num_prefill = <int32_t>self.tokens.size()

    cdef void append_page(self, int32_t page, StepPlan plan) noexcept:
        plan.add_update(self.slot, <int32_t>self.pages.size(), page)
        self.pages.push_back(page)
        self.path.push_back(-1)

    cdef void publish(self, RadixCache cache, int32_t num_tokens) noexcept:
        """Enter the full pages of the first tokens, all of them known, that are not in the tree."""
        cdef int32_t num_full = num_tokens >> cache.page_shift
        if num_full > self.num_published:
            self.num_published = cache.publish_pages(
                self.tokens.data(), self.pages.data(), self.path.data(),
                self.num_published, num_full, self.salt,
            )

    cdef void let_go(self, RadixCache cache) noexcept:
        """Release the row; hold nothing, have computed nothing."""
        cache.release_pages(
            self.pages.data(), self.path.data(), <int32_t>self.pages.size(), self.num_published,
            self.poisoned,
        )
        self.slot = -1
        self.pages.clear()
        self.path.clear()
        self.num_prefill = 0
        self.num_computed = 0
        self.num_committed = 0
        self.num_published = 0


cdef c_array _copy(const int32_t *values, size_t count):
    cdef c_array copied = clone(NO_TOKENS, count, False)
    if count:
        memcpy(copied.data.as_voidptr, values, count * sizeof(int32_t))
    return copied


cdef const char *_read(const char *data, uint32_t count, vector[int32_t] &values) noexcept:
    values.resize(count)
    if count:
        memcpy(values.data(), data, count * sizeof(int32_t))
    return data + count * sizeof(int32_t)
