"""Grammars: what a request's next token may be, as bits. llguidance does it, behind ``Grammar``.

    ADD with a grammar --Grammars.compile--> worker thread --copy of the start--> Scheduler.add
    step N+1: forward launched | tokens of N: advance | masks filled | sampling launched

Rules: a grammar's text is compiled once, off the engine's thread, and kept; each request gets a
copy of its start. A state belongs to one request, sees each of its committed tokens once, and
outlives preemption. All work on a state is bounded: by llguidance's limits for one step, by
``CPU_CREDIT_S`` for a request. A grammar that cannot go on ends its own request and nothing else.

The text was checked by the frontend, in a process of its own (api/grammar_check.py) and with the
same limits: text that recurses deeply enough can exhaust a stack, so stacks here are no smaller.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from minisgl_fast.engine.ruled_grammar import RuledGrammar, avoid
from minisgl_fast.token_rules import TokenRules, split
from minisgl_fast.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

MAX_CACHED_GRAMMARS = 64
# Twice what grammar_check.py compiles with; virtual memory alone.
COMPILE_STACK_BYTES = 256 << 20
FILL_STACK_BYTES = 16 << 20
# A step of an ordinary grammar takes some 50 us; what goes beyond this is paid from the credit.
FREE_CPU_S = 0.001
CPU_CREDIT_S = 0.5
# Fewer masks are filled faster than threads are woken.
MIN_PARALLEL_MASKS = 8
MAX_FILL_THREADS = 8


class MaskRow(NamedTuple):
    """One row of a step's masks: where it is, and its bytes."""

    address: int
    data: memoryview


class Grammar(Protocol):
    """The state of one request's grammar.

    has_ended: no token may follow. The request ends, and well if ``is_accepting``.
    """

    is_accepting: bool
    has_ended: bool

    def advance(self, token: int) -> bool:
        """Take the next token of the text; False if the grammar cannot go on with it."""

    def fill_mask(self, row: MaskRow, avoided: Sequence[int]) -> None:
        """Set the bits of the ids that may come next, bit id % 8 of byte id / 8.

        ``avoided`` are left out unless nothing else may come. Ends of text may come where the
        grammar is complete. No bit is set when ``has_ended``. May run in any thread.
        """


class LLGrammar:
    """``Grammar`` over llguidance's matcher."""

    def __init__(
        self, matcher: LLMatcher, num_mask_bytes: int, on_failure: Callable[[], None]
    ) -> None:
        self.is_accepting = False
        self.has_ended = False
        self._matcher = matcher
        self._no_bits = bytes(num_mask_bytes)
        self._on_failure = on_failure
        self._credit_s = CPU_CREDIT_S

    def advance(self, token: int) -> bool:
        start = time.thread_time()
        went_on = self._matcher.consume_token(token)
        self._pay(start)
        if not went_on:
            self._on_failure()
        return went_on

    def fill_mask(self, row: MaskRow, avoided: Sequence[int]) -> None:
        start = time.thread_time()
        num_bytes = len(self._no_bits)
        data = row.data[:num_bytes]
        self._matcher.unsafe_compute_mask_ptr(row.address, num_bytes)
        # A matcher that has failed would have the text end here.
        failed = self._matcher.is_error() or self._credit_s <= 0
        if failed:
            data[:] = self._no_bits
        else:
            avoid(data, avoided)
        self._pay(start)
        if data == self._no_bits:
            self.has_ended = True
            self.is_accepting = not failed and self._matcher.is_accepting()
            if failed:
                self._on_failure()

    def _pay(self, start: float) -> None:
        self._credit_s -= max(0.0, time.thread_time() - start - FREE_CPU_S)


class Grammars:
    """Compiles grammars for one vocabulary, and fills masks."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int]) -> None:
        """Takes up to a second for a large vocabulary, and keeps the interpreter lock.

        ``vocabulary`` has the ids that may be sampled. ImportError without llguidance.
        """
        from llguidance import LLMatcher

        self._matcher = LLMatcher
        self._tokenizer = make_tokenizer(vocabulary, eos_ids)
        self._limits = limits()
        self._vocabulary = vocabulary
        self._num_ids = len(vocabulary)
        self._num_mask_bytes = -(-len(vocabulary) // 32) * 4
        self._cache: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._compiler = make_pool(1, COMPILE_STACK_BYTES, "grammar")
        num_threads = min(MAX_FILL_THREADS, len(os.sched_getaffinity(0)) // 2)
        self._fillers = (
            make_pool(num_threads, FILL_STACK_BYTES, "mask") if num_threads > 1 else None
        )

    def compile(self, text: bytes) -> Future[Grammar | None]:
        """The start of a grammar, soon; None if the text is no grammar or beyond the limits.

        Token rules (token_rules.py) may stand before it.
        """
        rules, text = split(text)
        if rules is not None:
            return self._ruled(rules, text)
        future: Future[Grammar | None] = Future()
        with self._lock:
            start = self._cache.get(text)
            if start is not None:
                self._cache.move_to_end(text)
        if start is not None:
            future.set_result(self._copy(text, start))
            return future
        return self._compiler.submit(self._compile, text)

    def fill(self, masks: Sequence[tuple[Grammar, Sequence[int]]], rows: Sequence[MaskRow]) -> None:
        """Fill row i with mask i (``StepPlan.masks``), in several threads where that is faster."""

        def fill(index: int) -> None:
            grammar, avoided = masks[index]
            grammar.fill_mask(rows[index], avoided)

        if self._fillers is None or len(masks) < MIN_PARALLEL_MASKS:
            for index in range(len(masks)):
                fill(index)
        else:
            list(self._fillers.map(fill, range(len(masks))))

    def close(self) -> None:
        """End the threads once they are idle."""
        for pool in (self._compiler, self._fillers):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ruled(self, rules: TokenRules, text: bytes) -> Future[Grammar | None]:
        future: Future[Grammar | None] = Future()
        if not text:
            future.set_result(self._with_rules(rules, None))
            return future

        def finish(inner: Future[Grammar | None]) -> None:
            grammar = None if inner.exception() is not None else inner.result()
            future.set_result(None if grammar is None else self._with_rules(rules, grammar))

        self.compile(text).add_done_callback(finish)
        return future

    def _with_rules(self, rules: TokenRules, grammar: Grammar | None) -> RuledGrammar:
        return RuledGrammar(rules, grammar, self._num_ids, self._is_blank)

    def _is_blank(self, token: int) -> bool:
        text = self._vocabulary.tokens[token] if token < self._num_ids else b""
        return bool(text) and text.isspace()

    def _compile(self, text: bytes) -> Grammar | None:
        start = self._matcher(self._tokenizer, text.decode(), log_level=0, limits=self._limits)
        if start.is_error():
            return None
        start.compute_bitmask()  # what it takes lazily, it takes here
        if start.is_error():
            return None
        with self._lock:
            self._cache[text] = start
            while len(self._cache) > MAX_CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return self._copy(text, start)

    def _copy(self, text: bytes, start: LLMatcher) -> LLGrammar:
        return LLGrammar(start.deep_copy(), self._num_mask_bytes, lambda: self._forget(text))

    def _forget(self, text: bytes) -> None:
        """Copies share what they have learned of their lexer, and its limit: begin anew."""
        with self._lock:
            self._cache.pop(text, None)


def limits() -> LLParserLimits:
    """What one compilation and one step may cost at most: some 20 ms and 10 ms."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_grammar_size=200_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )


def make_tokenizer(
    vocabulary: Vocabulary, eos_ids: Sequence[int], slices: list[str] | None = None
) -> Any:
    """llguidance's view of a vocabulary, which must have one of ``eos_ids``.

    ``slices``: [] is faster to make and slower to fill.
    """
    from llguidance import LLTokenizer

    ends = [token for token in eos_ids if token < len(vocabulary)]
    wrapper = _Wrapper(vocabulary, ends)
    tokenizer = LLTokenizer(
        wrapper,  # type: ignore[arg-type]
        n_vocab=len(vocabulary),
        eos_token=ends,
        slices=slices,
    )
    wrapper.encode = tokenizer.greedy_tokenize
    return tokenizer


def make_pool(num_threads: int, stack_bytes: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads exist already, with stacks of that size."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    barrier = threading.Barrier(num_threads + 1)
    before = threading.stack_size(stack_bytes)
    try:
        for _ in range(num_threads):
            pool.submit(barrier.wait)
    finally:
        threading.stack_size(before)
    barrier.wait()
    return pool


class _Wrapper:
    """What llguidance asks of a tokenizer in Python.

    Called with forced text, to find its tokens; with ``no_forcing``, which every grammar of
    api/grammar_text.py has, that does not happen: any tokens that spell the text will do.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
        self.tokens = list(vocabulary.tokens)
        # An end of text that is not among the special ids would be text to llguidance.
        self.special_token_ids = sorted({*vocabulary.special_ids, *ends})
        self.eos_token_id = ends[0]
        self.encode: Callable[[str], list[int]] = lambda text: []

    def __call__(self, text: str | bytes) -> list[int]:
        return self.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
