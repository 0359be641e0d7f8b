"""A device without a model: it keeps page table, KV, last tokens and token histories as a real one
does, reads its context through them alone, and "samples" a hash of that context. So the text of a
request depends on its own tokens only, and any wrong page, position, slot or order changes it.
"""

import random
from array import array
from collections import deque

from minisgl_fast.params import SamplingParams
from minisgl_fast.sched.plan import StepPlan
from minisgl_fast.sched.scheduler import Scheduler
from minisgl_fast.wire import FinishReason, pack_add, unpack_step

VOCAB = 97
EOS = 1


def next_token(context, seed, banned=()):
    """The fake model: a hash of all tokens and the seed; EOS about once in 20 tokens."""
    value = hash((*context, seed))
    token = EOS if value % 20 == 0 else value // 20 % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def expected(prompt, params, *, seed, max_tokens, max_model_len, eos_ids=(EOS,)):
    """(tokens, reason) by a loop over ``next_token``."""
    tokens = list(prompt)
    stops = set(params.stop_token_ids)
    ends = stops if params.ignore_eos else stops | set(eos_ids)
    while True:
        short = len(tokens) - len(prompt) < params.min_tokens
        token = next_token(tokens, seed, ends if short else ())
        tokens.append(token)
        output = tokens[len(prompt) :]
        if token in eos_ids and not params.ignore_eos:
            return output, FinishReason.EOS
        if token in stops:
            return output, FinishReason.STOP_TOKEN
        if len(output) == max_tokens or len(tokens) == max_model_len:
            return output, FinishReason.LENGTH


def make_plan(scheduler, **changes):
    """(plan, its memory) of the scheduler's own capacity or a changed one."""
    capacity = scheduler.plan_capacity()
    if changes:
        names = ("max_tokens", "max_seqs", "max_updates", "max_bias")
        capacity = type(capacity)(**{name: getattr(capacity, name) for name in names} | changes)
    memory = array("i", bytes(4 * capacity.num_words))
    return StepPlan(memory.buffer_info()[0], capacity), memory


class PlanView:
    """The filled parts of a plan's sections as Python lists."""

    def __init__(self, plan, memory):
        self.plan = plan
        view = memoryview(memory)
        words = {name: view[a : a + n] for name, (a, n) in plan.offsets().items()}
        floats = {
            name: words[name].cast("B").cast("f")
            for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
        }
        self.sections = words | floats | {"bias_value": words["bias_value"].cast("B").cast("f")}

    def __getattr__(self, name):
        return self.sections[name]


class FakeDevice:
    def __init__(self, page_size, max_seqs):
        self.page_size = page_size
        self.page_table = {}
        self.last_token = {}
        self.kv = {}
        self.histories = {}
        self.nan_tokens = set()

    def run(self, view):
        """Run one step; int32 tokens of its samples."""
        plan = view.plan
        assert plan.num_seqs > 0 and plan.num_tokens > 0
        assert plan.num_decode <= min(plan.num_seqs, plan.num_samples)
        updated = set()
        for i in range(plan.num_updates):
            place = view.update_slot[i], view.update_column[i]
            assert place not in updated
            updated.add(place)
            self.page_table[place] = view.update_page[i]
        for slot, tokens, num_prompt in plan.histories:
            assert 0 < num_prompt <= len(tokens)
            self.histories[slot] = list(tokens)
        slots = list(view.seq_slot[: plan.num_seqs])
        assert len(set(slots)) == len(slots)
        assert view.q_start[0] == 0 and view.q_start[plan.num_seqs] == plan.num_tokens
        # All KV of the step is written before any of it is read, as in a layer of a model.
        lengths = []
        for i, slot in enumerate(slots):
            first, last = view.q_start[i], view.q_start[i + 1]
            lengths.append(last - first)
            assert first < last and (i >= plan.num_decode or last - first == 1)
            for row in range(first, last):
                token = view.input_id[row]
                if token == -1:
                    assert i < plan.num_decode
                    token = self.last_token[slot]
                position = view.position[row]
                assert position == view.context_len[i] - (last - row)
                assert view.kv_slot[row] == self.kv_slot(slot, position)
                self.kv[view.kv_slot[row]] = position, token
        assert plan.max_q_len == max(lengths)
        assert plan.max_context == max(view.context_len[plan.num_decode : plan.num_seqs], default=0)
        return array("i", [self.sample(view, j) for j in range(plan.num_samples)])

    def kv_slot(self, slot, position):
        page = self.page_table[slot, position // self.page_size]
        return page * self.page_size + position % self.page_size

    def sample(self, view, j):
        slot, row, position = view.sample_slot[j], view.sample_row[j], view.sample_position[j]
        starts = list(view.q_start[1 : view.plan.num_seqs + 1])
        i = starts.index(row + 1)
        assert view.seq_slot[i] == slot and view.context_len[i] == position
        assert j >= view.plan.num_decode or j == i
        context = []
        for p in range(position):
            held, token = self.kv[self.kv_slot(slot, p)]
            assert held == p
            context.append(token)
        flags = view.sample_flags[j]
        if flags & 1:
            assert self.histories[slot] == context
        entries = range(view.bias_start[j], view.bias_start[j + 1])
        assert bool(flags & 2) == bool(len(entries))
        banned = {view.bias_id[k] for k in entries if view.bias_value[k] == float("-inf")}
        seed = view.seed_lo[j] % 2**32 | view.seed_hi[j] % 2**32 << 32
        token = next_token(context, seed, banned)
        if self.nan_tokens.intersection(context):
            token = -1
        self.last_token[slot] = token
        if flags & 1:
            self.histories[slot].append(token)
        return token


class FakeEngine:
    """Scheduler and FakeDevice, with up to ``overlap`` launched steps not committed."""

    def __init__(self, *, overlap=1, check_every=1, plan_changes=None, **config):
        self.scheduler = Scheduler(**({"eos_ids": [EOS]} | config))
        self.device = FakeDevice(config["page_size"], config["max_seqs"])
        self.overlap = overlap
        self.check_every = check_every
        self.plans = deque(
            PlanView(*make_plan(self.scheduler, **(plan_changes or {}))) for _ in range(overlap + 1)
        )
        self.in_flight = deque()
        self.tokens = {}
        self.reasons = {}
        self.cached = {}
        self.num_steps = 0
        self.max_rows = 0

    def add(self, rid, prompt, params=None, *, seed=0, max_tokens=8, channel=0, **more):
        payload = pack_add(
            rid, params or SamplingParams(), prompt, seed=seed, max_tokens=max_tokens, **more
        )
        self.scheduler.add(channel, payload)

    def step(self):
        """Schedule, launch, then commit the oldest step as soon as enough are in flight."""
        view = self.plans[0]
        launched = self.scheduler.schedule(view.plan)
        if launched:
            self.plans.popleft()
            self.check_pages(view)
            self.num_steps += 1
            self.max_rows = max(self.max_rows, view.plan.num_seqs)
            self.in_flight.append((view, self.device.run(view)))
        elif not self.in_flight:
            assert not self.scheduler.has_work(), "work is left and nothing runs"
        if self.in_flight and (not launched or len(self.in_flight) > self.overlap):
            view, tokens = self.in_flight.popleft()
            self.scheduler.commit(view.plan, tokens)
            self.plans.append(view)
        self.take()
        if self.check_every and self.num_steps % self.check_every == 0:
            self.scheduler.check()

    def check_pages(self, view):
        """No page that an uncommitted step writes is written by another slot."""
        written = {}
        for step in (*(earlier for earlier, _ in self.in_flight), view):
            for i in range(step.plan.num_seqs):
                for row in range(step.q_start[i], step.q_start[i + 1]):
                    page = step.kv_slot[row] // self.device.page_size
                    assert written.setdefault(page, step.seq_slot[i]) == step.seq_slot[i]

    def take(self):
        for channel, _, payload in self.scheduler.take_frames():
            rows, firsts = unpack_step(payload)
            for rid, num_cached in firsts:
                assert (channel, rid) not in self.cached
                self.cached[channel, rid] = num_cached
            for rid, token, reason in rows:
                key = channel, rid
                assert key in self.cached and key not in self.reasons
                if token >= 0:
                    self.tokens.setdefault(key, []).append(token)
                if reason != FinishReason.RUNNING:
                    self.reasons[key] = FinishReason(reason)
                    self.tokens.setdefault(key, [])

    def drain(self, limit=100_000):
        while self.scheduler.has_work():
            self.step()
            limit -= 1
            assert limit, "no end"
        self.scheduler.check()


def random_prompt(rng, groups, *, longest):
    """A prompt that shares a prefix with others of its group."""
    prefix = groups[min(rng.randrange(len(groups)), rng.randrange(len(groups)))]
    shared = prefix[: rng.randrange(len(prefix) + 1)]
    tail = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, max(longest - len(shared), 1)))]
    return (shared + tail)[:longest]


def random_groups(rng, *, count, longest):
    return [[rng.randrange(2, VOCAB) for _ in range(longest)] for _ in range(count)]


def random_params(rng):
    params = SamplingParams(
        min_tokens=rng.choice((0, 0, 0, 1, 3)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        stop_token_ids=tuple(rng.sample(range(2, VOCAB), rng.choice((0, 0, 2)))),
        ignore_eos=rng.random() < 0.2,
        logit_bias=rng.choice(({}, {}, {5: 1.0, 6: -1.0})),
    )
    return params, random.Random(rng.random()).getrandbits(64)
