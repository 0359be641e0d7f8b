"""Scheduler: which tokens of which requests the next step computes, and what came of the last one.

Sans I/O: ADD payloads go in, plans are filled, sampled tokens are committed, STEP payloads come
out. Who waits, who runs and in what order is kept in the roster (roster.pyx), which also moves a
request from one state to another; when that happens is decided here.

One step, within a budget of max_step_tokens: every running request that decodes gets its one token;
then the request being prefilled gets its next chunk; then waiting requests are admitted while
slots, pages, bias entries, updates and budget last.

Rules:
- Pages are admitted for the tokens that exist, plus one page per running request as a margin for
  their growth; never for max_tokens. When a decode finds no page, the last of the running list is
  preempted: it keeps its tokens and is computed again later, mostly from the prefix cache.
- A request that is alone and still finds no page ends with LENGTH. Nothing waits for ever.
- Steps may overlap: schedule(N + 1) may come before commit(N), commits come in order. A token for
  a finished request meets nothing; its slot and pages are its own until its last step is committed.
- At least one token of a request is always computed: a match covers at most all tokens but one.
- Pages of a prompt are published when the step that fills them is planned, so requests that arrive
  together share a prefix; those of an output when its tokens are committed.
- A request that needs no token (max_tokens 0, embeddings) ends when its prompt is committed.
"""

from minisgl_fast.errors import EngineError
from minisgl_fast.sched.pages cimport PagePool
from minisgl_fast.sched.plan cimport (
    HAS_PENALTIES, NUM_SAMPLES, NUM_SEQS, NUM_TOKENS, NUM_UPDATES, STEP, PlanCapacity, Span,
)
from minisgl_fast.sched.request cimport FINISHED, RUNNING, WAITING
from minisgl_fast.wire cimport ABORTED, EOS, ERROR, GRAMMAR, LENGTH
from minisgl_fast.wire cimport RUNNING as GOES_ON

# Room for a full set of users' biases (params.MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS) beside the bans
# that ordinary requests with min_tokens need.
cdef int32_t BIAS_OF_ONE_REQUEST = 2048
cdef int32_t BIAS_PER_SEQ = 16


cdef class Scheduler:
    """Schedules over ``num_pages`` KV pages of ``page_size`` tokens (a power of two).

    At most ``max_seqs`` requests run at a time, of at most ``max_model_len`` tokens each; a step
    computes at most ``max_step_tokens`` tokens. ``eos_ids`` end every request that does not ignore
    them.
    """

    def __init__(
        self, int32_t num_pages, int32_t page_size, int32_t max_seqs, int32_t max_model_len,
        int32_t max_step_tokens, eos_ids, *, bint radix_cache=True,
    ):
        if min(max_seqs, max_model_len, max_step_tokens) < 1:
            raise ValueError("max_seqs, max_model_len and max_step_tokens must be positive")
        if <int64_t>num_pages * page_size >= 2**31:
            raise ValueError("the KV cache has more than 2**31 token slots")
        self.cache = RadixCache(PagePool(num_pages), page_size, enabled=radix_cache)
        self.page_size = page_size
        self.page_shift = self.cache.page_shift
        self.max_seqs = max_seqs
        self.max_model_len = max_model_len
        self.max_step_tokens = max_step_tokens
        self.max_pages_per_seq = (max_model_len + page_size - 1) // page_size
        self.eos_ids = sorted(set(eos_ids))
        self.roster = Roster(self.cache, max_seqs)
        self.scratch_path.resize(self.max_pages_per_seq)

    # schedule

    cdef _check_plan(self, StepPlan plan):
        cdef PlanCapacity capacity = plan.capacity
        if plan.in_flight:
            raise EngineError("The plan belongs to a step that is not committed yet.")
        if (
            capacity.max_seqs != self.max_seqs
            or capacity.max_updates < self.max_seqs + self.max_pages_per_seq
        ):
            raise ValueError(
                f"{capacity} does not suit this scheduler, which needs max_seqs={self.max_seqs} "
                f"and max_updates of at least {self.max_seqs + self.max_pages_per_seq}"
            )

    cdef void _schedule_decodes(self, StepPlan plan):
        cdef Roster roster = self.roster
        cdef Request request
        cdef int32_t slot, position
        cdef size_t i = 0
        while i < roster.running.size() and self.budget:
            slot = roster.running[i]
            request = <Request>roster.slots[slot]
            if (
                request.num_computed >= request.num_prefill
                and request.num_tokens() < request.max_total
                and self._grow(request, plan)
            ):
                position = request.num_computed
                plan.add_decode(
                    slot, position,
                    request.pages[position >> self.page_shift] * self.page_size
                    + (position & (self.page_size - 1)),
                )
                request.num_computed += 1
                request.inflight += 1
                request.add_sample(plan)
                self.budget -= 1
            if i < roster.running.size() and roster.running[i] == slot:
                i += 1

    cdef void _schedule_chunks(self, StepPlan plan):
        cdef Roster roster = self.roster
        cdef Request request
        cdef size_t i
        for i in range(roster.running.size()):
            if not self.budget:
                return
            request = <Request>roster.slots[roster.running[i]]
            if request.num_computed < request.num_prefill:
                self._schedule_chunk(request, plan)

    cdef void _schedule_chunk(self, Request request, StepPlan plan):
        cdef int32_t first = request.num_computed
        cdef int32_t last = min(request.num_prefill, first + self.budget)
        plan.add_chunk(
            request.slot, request.tokens.data(), first, last, request.pages.data(), self.page_size
        )
        request.num_computed = last
        request.inflight += 1
        # A step writes the KV of all chunks before it reads any (that of decodes comes later), so
        # whoever comes next may read it already.
        request.publish(self.cache, last)
        self.budget -= last - first
        request.add_due_rows(plan, first, last)
        if last == request.num_prefill and request.num_tokens() < request.max_total:
            request.add_sample(plan)

    cdef void _admit_waiting(self, StepPlan plan):
        # One token of the budget for each: neither a decode nor a chunk is ever left out.
        cdef size_t most = min(self.max_step_tokens, plan.capacity.max_tokens)
        cdef Request request
        while self.budget and self.roster.running.size() < most:
            request = self.roster.first_waiting()
            if request is None:
                return
            if self._admit(request, plan):
                self._schedule_chunk(request, plan)
            elif request.state == WAITING:
                return

    cdef bint _admit(self, Request request, StepPlan plan):
        """Admit the head of the waiting requests if it fits; one that never will ends here."""
        cdef int32_t num_tokens = <int32_t>request.tokens.size()
        cdef int32_t num_pages = (num_tokens + self.page_size - 1) >> self.page_shift
        cdef Roster roster = self.roster
        cdef int32_t num_matched
        if plan.header[NUM_UPDATES] + num_pages > plan.capacity.max_updates:
            return False
        if roster.reserved_bias + request.num_bias() > plan.capacity.max_bias:
            if roster.reserved_bias == 0:
                roster.finish(request, -1, ERROR)
            return False
        num_matched = self.cache.match_pages(
            request.tokens.data(), request.num_matchable() >> self.page_shift, request.salt,
            self.scratch_path.data(),
        )
        if num_pages - num_matched + <int32_t>roster.running.size() > (
            self.cache.num_available()
            - self.cache.count_unreferenced(self.scratch_path.data(), num_matched)
        ):
            if roster.is_idle():
                roster.finish(request, -1, LENGTH)
            return False
        roster.enter(request)
        # The row never outgrows this: no allocation while the request runs.
        request.tokens.reserve(request.max_total)
        request.pages.reserve(self.max_pages_per_seq)
        request.path.reserve(self.max_pages_per_seq)
        request.hold(self.cache, self.scratch_path.data(), num_matched, num_pages, plan)
        if request.num_cached < 0:
            request.num_cached = request.num_computed
            self.num_prompt_tokens += request.num_prompt
            self.num_cached_tokens += request.num_cached
        if request.sampling.flags & HAS_PENALTIES:
            plan.histories.append(request.history())
        return True

    cdef bint _grow(self, Request request, StepPlan plan):
        """See to it that the next token of a decode has a page; False if it must stand back.

        Then the request was preempted itself, was ended, or waits for pages of requests that are
        leaving.
        """
        cdef int32_t column = request.num_computed >> self.page_shift
        cdef int32_t page
        if column < <int32_t>request.pages.size():
            return True
        page = self.cache.take_page()
        while page < 0:
            self.page_shortage = True
            if self.roster.num_leaving:
                return False
            if self.roster.running.size() == 1:
                # All pages are its own: what it has in flight, if anything, is its last token.
                request.max_total = request.num_tokens()
                if request.inflight == 0:
                    self.roster.finish(request, -1, LENGTH)
                return False
            self.num_preemptions += 1
            self.roster.preempt_last()
            if request.state != RUNNING:
                return False
            page = self.cache.take_page()
        request.append_page(page, plan)
        return True

    # commit

    cdef void _take_output(self, Request request, Span span, int32_t token, object output):
        """What came of a span of a request that is not finished; None where it is not finite."""
        if output is None:
            request.poisoned = True
            self.roster.finish(request, -1, ERROR)
        elif span.sample < 0 or token >= 0:
            request.take_output(span, token, output)

    cdef void _take_token(self, Request request, int32_t token):
        """One sampled token of a request that is not finished."""
        cdef int reason
        if token < 0:
            reason = ERROR
            if request.grammar is not None:
                if request.grammar.has_ended:
                    reason = EOS if request.grammar.is_accepting else GRAMMAR
                elif not request.bias_ids.empty():
                    reason = GRAMMAR  # what it allows is banned
            request.poisoned = reason == ERROR
            self.roster.finish(request, -1, reason)
            return
        request.tokens.push_back(token)
        self.num_generated_tokens += 1
        request.publish(self.cache, request.num_committed)
        reason = request.finish_reason(token)
        if reason == GOES_ON and request.grammar is not None and (
            not request.grammar.advance(token)
        ):
            reason = GRAMMAR
        if reason == GOES_ON:
            request.emit(token, GOES_ON)
        else:
            self.roster.finish(request, token, reason)

    # Public API

    def plan_capacity(self):
        """A PlanCapacity in which every plan of this scheduler fits."""
        return PlanCapacity(
            max(self.max_step_tokens, self.max_seqs),
            self.max_seqs,
            self.max_seqs + self.max_pages_per_seq + self.max_step_tokens // self.page_size,
            max(BIAS_OF_ONE_REQUEST, BIAS_PER_SEQ * self.max_seqs),
        )

    def add(self, int64_t channel, bytes payload not None, grammar=None):
        """Queue the request of an ADD payload. EngineError when the frame is malformed.

        ``grammar``: the state of the payload's grammar (engine.grammar.Grammar), None for none.
        """
        cdef Request request = Request.unpack(
            self.roster.open_channel(channel), payload, self.max_model_len, self.eos_ids, grammar
        )
        self.roster.add(request)
        if request.num_prompt >= self.max_model_len or (
            (request.num_prompt - 1) >> self.page_shift >= self.cache.pool.num_pages
        ):
            self.roster.finish(request, -1, ERROR)

    def abort(self, int64_t channel, uint32_t rid):
        """End a request wherever it is; it answers one ABORTED row. Unknown rids are ignored."""
        cdef Request request = self.roster.find_request(channel, rid)
        if request is not None:
            self.num_aborted += 1
            self.roster.finish(request, -1, ABORTED)

    def refuse_grammar(self, int64_t channel, uint32_t rid):
        """End a request whose grammar cannot be followed: it answers one GRAMMAR row."""
        cdef Request request = self.roster.find_request(channel, rid)
        if request is not None:
            self.roster.finish(request, -1, GRAMMAR)

    def abort_channel(self, int64_t channel):
        """End all requests of a frontend that is gone; nothing is answered any more."""
        for request in self.roster.close_channel(channel):
            self.num_aborted += 1
            self.roster.finish(<Request>request, -1, ABORTED)

    def schedule(self, StepPlan plan not None):
        """Fill ``plan`` with the next step. False when there is nothing to run.

        It is also False while everything waits for the commit of a step in flight (has_work() is
        true then). Rows may have ended without a step: call take_frames() afterwards.
        """
        self._check_plan(plan)
        plan.begin(self.num_steps + 1)
        self.budget = min(self.max_step_tokens, plan.capacity.max_tokens)
        self.page_shortage = False
        self._schedule_decodes(plan)
        self._schedule_chunks(plan)
        # After a preemption the pages are for those who run.
        if not self.page_shortage or self.roster.running.empty():
            self._admit_waiting(plan)
        if plan.header[NUM_TOKENS] == 0:
            return False
        self.num_steps += 1
        plan.in_flight = True
        return True

    def commit(
        self, StepPlan plan not None, const int32_t[::1] tokens not None, outputs not None=()
    ):
        """Take the results of the oldest step in flight.

        ``tokens``: int32 [num_samples], -1 for NaN. ``outputs``: for each of ``plan.spans`` its
        bytes as Request.take_output has them, None for NaN.
        """
        cdef Roster roster = self.roster
        cdef Request request
        cdef Span span
        cdef Py_ssize_t next_span = 0
        cdef Py_ssize_t num_spans = len(plan.spans)
        cdef int32_t i
        cdef int32_t sample = 0
        cdef int32_t num_samples = plan.header[NUM_SAMPLES]
        cdef bint left
        if not plan.in_flight or plan.header[STEP] != self.num_committed_steps + 1:
            raise EngineError("Steps must be committed once, in the order they were scheduled.")
        if tokens.shape[0] < num_samples:
            raise ValueError(f"{num_samples} tokens were sampled, got {tokens.shape[0]}")
        if len(outputs) != num_spans:
            raise ValueError(f"{num_spans} outputs are due, got {len(outputs)}")
        self.num_committed_steps += 1
        plan.in_flight = False
        for i in range(plan.header[NUM_SEQS]):
            request = <Request>roster.slots[plan.seq_slot[i]]
            left = request.state != RUNNING
            request.inflight -= 1
            request.num_committed += plan.q_start[i + 1] - plan.q_start[i]
            while next_span < num_spans and (<Span>plan.spans[next_span]).seq == i:
                span = <Span>plan.spans[next_span]
                if request.state != FINISHED:
                    self._take_output(
                        request, span, tokens[sample] if span.sample >= 0 else -1,
                        outputs[next_span],
                    )
                next_span += 1
            if sample < num_samples and plan.sample_row[sample] == plan.q_start[i + 1] - 1:
                request.num_pending -= 1
                if request.state != FINISHED:
                    self._take_token(request, tokens[sample])
                sample += 1
            elif request.state != FINISHED and request.num_committed >= request.max_total:
                roster.finish(request, -1, LENGTH)
            if left:
                roster.settle(request)

    def take_frames(self):
        """[(channel, frame kind, payload)] of all that came of steps since the last call."""
        return self.roster.take_frames()

    def has_work(self):
        """Whether any request waits, runs, or has a step in flight."""
        return self.roster.has_work()

    def flush_cache(self):
        """Forget all cached pages; only when idle, else False."""
        if self.roster.has_work():
            return False
        self.cache.flush()
        return True

    def stats(self):
        """Counters since the start, and what is held now (the STATS frame)."""
        cdef int32_t num_pages = self.cache.pool.num_pages
        return {
            "running": self.roster.running.size(),
            "queued": self.roster.waiting.size(),
            "queued_tokens": self.roster.num_queued_tokens(),
            "pages_total": num_pages,
            "pages_free": self.cache.pool.num_free,
            "pages_cached": self.cache.num_unreferenced,
            "pages_used": num_pages - self.cache.num_available(),
            "preemptions": self.num_preemptions,
            "steps": self.num_committed_steps,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "generated_tokens": self.num_generated_tokens,
            "aborted": self.num_aborted,
        }

    def check(self):
        """AssertionError with what is wrong, unless all pages, slots and rids are accounted for."""
        # Imported here: audit.pyx needs this module's types first.
        from minisgl_fast.sched.audit import check_scheduler
        check_scheduler(self)
