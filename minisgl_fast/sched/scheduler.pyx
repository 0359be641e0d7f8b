"""Scheduler: which tokens of which requests the next step computes, and what came of the last one.

Sans I/O: ADD payloads go in, plans are filled, sampled tokens are committed, STEP payloads come
out. Everything that moves a request from one state to another is in this file:

    add -> WAITING -> admit -> RUNNING -> stop, abort -> FINISHED -> (nothing in flight) -> gone
              ^                   |
              |                preempt
              |                   v
              +---------------- PREEMPTED   (when nothing of it is in flight)

One step, within a budget of max_step_tokens: every running request that decodes gets its one token;
then the request being prefilled gets its next chunk; then waiting requests are admitted while
slots, pages, bias entries, updates and budget last. Waiting requests go by priority (higher first),
then by arrival; the running list has the same order, its last is the first to give way.

Rules:
- Pages are admitted for the tokens that exist, plus one page per running request as a margin for
  their growth; never for max_tokens. When a decode finds no page, the last of the running list is
  preempted: it keeps its tokens and is computed again later, mostly from the prefix cache.
- A request that is alone and still finds no page ends with LENGTH. Nothing waits for ever.
- Steps may overlap: schedule(N + 1) may come before commit(N), commits come in order. A request
  counts its launched steps (inflight); its slot and its pages are given back in ``_settle`` alone,
  when it left the running list and nothing of it is in flight. So no page in which an uncommitted
  step writes ever belongs to anyone else, and a token for a finished request meets nothing.
- At least one token of a request is always computed: a match covers at most all tokens but one.
- Pages of a prompt are published when the step that fills them is planned, so requests that arrive
  together share a prefix; those of an output when its tokens are committed.
- A request that needs no token (max_tokens 0, embeddings) ends when its prompt is committed.
"""

from cython.operator cimport dereference
from libcpp.algorithm cimport find

from minisgl_fast.errors import EngineError
from minisgl_fast.sched.pages cimport PagePool
from minisgl_fast.sched.plan cimport (
    HAS_PENALTIES, NUM_SAMPLES, NUM_SEQS, NUM_TOKENS, NUM_UPDATES, STEP, PlanCapacity, Span,
)
from minisgl_fast.sched.request cimport FINISHED, PREEMPTED, RUNNING, WAITING, Channel
from minisgl_fast.wire cimport ABORTED, EMBEDDING, EOS, ERROR, GRAMMAR, LENGTH, LOGPROBS
from minisgl_fast.wire cimport RUNNING as GOES_ON
from minisgl_fast.wire cimport STEP as STEP_FRAME

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
        self.channels = {}
        self.slots = [None] * max_seqs
        for slot in range(max_seqs - 1, -1, -1):
            self.free_slots.push_back(slot)
        self.running.reserve(max_seqs)
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
        cdef Request request
        cdef int32_t slot, position
        cdef size_t i = 0
        while i < self.running.size() and self.budget:
            slot = self.running[i]
            request = <Request>self.slots[slot]
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
            if i < self.running.size() and self.running[i] == slot:
                i += 1

    cdef void _schedule_chunks(self, StepPlan plan):
        cdef Request request
        cdef size_t i
        for i in range(self.running.size()):
            if not self.budget:
                return
            request = <Request>self.slots[self.running[i]]
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
        # A step writes all its KV before it reads any, so whoever comes next may read it already.
        request.publish(self.cache, last)
        self.budget -= last - first
        request.add_due_rows(plan, first, last)
        if last == request.num_prefill and request.num_tokens() < request.max_total:
            request.add_sample(plan)

    cdef void _admit_waiting(self, StepPlan plan):
        cdef Request request
        while (
            self.budget and not self.free_slots.empty() and not self.waiting.empty()
            # One token of the budget for each: neither a decode nor a chunk is ever left out.
            and <int32_t>self.running.size() < min(self.max_step_tokens, plan.capacity.max_tokens)
        ):
            request = <Request>dereference(self.waiting.begin()).second
            if self._admit(request, plan):
                self._schedule_chunk(request, plan)
            elif request.state == WAITING:
                return

    cdef bint _admit(self, Request request, StepPlan plan):
        """Admit the head of the waiting requests if it fits; one that never will ends here."""
        cdef int32_t num_tokens = <int32_t>request.tokens.size()
        cdef int32_t num_pages = (num_tokens + self.page_size - 1) >> self.page_shift
        cdef bint alone = self.running.empty() and self.num_leaving == 0
        cdef int32_t num_matched
        if plan.header[NUM_UPDATES] + num_pages > plan.capacity.max_updates:
            return False
        if self.reserved_bias + request.num_bias() > plan.capacity.max_bias:
            if self.reserved_bias == 0:
                self._finish(request, -1, ERROR)
            return False
        num_matched = self.cache.match_pages(
            request.tokens.data(), request.num_matchable() >> self.page_shift, request.salt,
            self.scratch_path.data(),
        )
        if num_pages - num_matched + <int32_t>self.running.size() > (
            self.cache.num_available()
            - self.cache.count_unreferenced(self.scratch_path.data(), num_matched)
        ):
            if alone:
                self._finish(request, -1, LENGTH)
            return False
        self._enter(request, num_matched, plan)
        return True

    cdef void _enter(self, Request request, int32_t num_matched, StepPlan plan):
        """From waiting to running, with a slot and pages for all tokens that exist."""
        cdef int32_t num_tokens = <int32_t>request.tokens.size()
        cdef int32_t num_pages = (num_tokens + self.page_size - 1) >> self.page_shift
        cdef int32_t slot = self.free_slots.back()
        cdef vector[int32_t].iterator place
        self.waiting.erase(WaitingKey(-<int64_t>request.priority, request.arrival))
        self.free_slots.pop_back()
        self.slots[slot] = request
        request.slot = slot
        request.state = RUNNING
        place = self.running.end()
        while place != self.running.begin() and (
            (<Request>self.slots[dereference(place - 1)]).priority < request.priority
        ):
            place -= 1
        self.running.insert(place, slot)
        self.reserved_bias += request.num_bias()

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
            if self.num_leaving:
                return False
            if self.running.size() == 1:
                # All pages are its own: what it has in flight, if anything, is its last token.
                request.max_total = request.num_tokens()
                if request.inflight == 0:
                    self._finish(request, -1, LENGTH)
                return False
            self.num_preemptions += 1
            self._leave(<Request>self.slots[self.running.back()], PREEMPTED)
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
            self._finish(request, -1, ERROR)
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
            self._finish(request, -1, reason)
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
            self._finish(request, token, reason)

    # State changes

    cdef void _finish(self, Request request, int32_t token, int reason):
        """Answer the last row of a live request, in whatever state it is."""
        request.emit(token, reason)
        del request.channel.requests[request.rid]
        if request.state == WAITING:
            self.waiting.erase(WaitingKey(-<int64_t>request.priority, request.arrival))
            request.state = FINISHED
        elif request.state == RUNNING:
            self._leave(request, FINISHED)
        else:
            request.state = FINISHED

    cdef void _leave(self, Request request, RequestState state):
        """Out of the running list."""
        request.state = state
        self.running.erase(find(self.running.begin(), self.running.end(), request.slot))
        self.num_leaving += 1
        self._settle(request)

    cdef void _settle(self, Request request):
        """Give back slot and pages of a request that left, once nothing of it is in flight."""
        if request.inflight:
            return
        self.num_leaving -= 1
        self.reserved_bias -= request.num_bias()
        self.free_slots.push_back(request.slot)
        self.slots[request.slot] = None
        request.let_go(self.cache)
        if request.state == PREEMPTED:
            self._wait(request)

    cdef void _wait(self, Request request):
        request.state = WAITING
        self.waiting[WaitingKey(-<int64_t>request.priority, request.arrival)] = <void *>request

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
        cdef Channel home = self.channels.get(channel)
        cdef Request request
        if home is None:
            home = self.channels[channel] = Channel(channel)
        request = Request.unpack(home, payload, self.max_model_len, self.eos_ids, grammar)
        if request.rid in home.requests:
            raise EngineError(f"A frontend sent request {request.rid} twice.")
        home.requests[request.rid] = request
        request.arrival = self.num_arrivals
        self.num_arrivals += 1
        self._wait(request)
        if request.num_prompt >= self.max_model_len or (
            (request.num_prompt - 1) >> self.page_shift >= self.cache.pool.num_pages
        ):
            self._finish(request, -1, ERROR)

    def abort(self, int64_t channel, uint32_t rid):
        """End a request wherever it is; it answers one ABORTED row. Unknown rids are ignored."""
        cdef Channel home = self.channels.get(channel)
        if home is not None and rid in home.requests:
            self.num_aborted += 1
            self._finish(<Request>home.requests[rid], -1, ABORTED)

    def refuse_grammar(self, int64_t channel, uint32_t rid):
        """End a request whose grammar cannot be followed: it answers one GRAMMAR row."""
        cdef Channel home = self.channels.get(channel)
        if home is not None and rid in home.requests:
            self._finish(<Request>home.requests[rid], -1, GRAMMAR)

    def abort_channel(self, int64_t channel):
        """End all requests of a frontend that is gone; nothing is answered any more."""
        cdef Channel home = self.channels.pop(channel, None)
        if home is not None:
            for request in list(home.requests.values()):
                self.num_aborted += 1
                self._finish(<Request>request, -1, ABORTED)

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
        if not self.page_shortage or self.running.empty():
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
            request = <Request>self.slots[plan.seq_slot[i]]
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
                self._finish(request, -1, LENGTH)
            if left:
                self._settle(request)

    def take_frames(self):
        """[(channel, frame kind, payload)] of all that came of steps since the last call."""
        cdef Channel home
        frames = []
        for home in self.channels.values():
            if home.logprobs:
                frames.append((home.number, LOGPROBS, b"".join(home.logprobs)))
                home.logprobs = []
            if home.embeddings:
                frames += [(home.number, EMBEDDING, payload) for payload in home.embeddings]
                home.embeddings = []
            if not home.rows.rids.empty():
                frames.append((home.number, STEP_FRAME, home.rows.pack()))
        return frames

    def has_work(self):
        """Whether any request waits, runs, or has a step in flight."""
        return bool(not self.waiting.empty() or not self.running.empty() or self.num_leaving)

    def flush_cache(self):
        """Forget all cached pages; only when idle, else False."""
        if self.has_work():
            return False
        self.cache.flush()
        return True

    def stats(self):
        """Counters since the start, and what is held now (the STATS frame)."""
        cdef int32_t num_pages = self.cache.pool.num_pages
        cdef int64_t queued_tokens = 0
        for entry in self.waiting:
            queued_tokens += (<Request>entry.second).num_tokens()
        return {
            "running": self.running.size(),
            "queued": self.waiting.size(),
            "queued_tokens": queued_tokens,
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
