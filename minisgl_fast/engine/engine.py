"""Engine: scheduler and model runner as one overlapped step loop, without any I/O.

Requests come in as ADD payloads and go out as frames of results (wire.pyx), so that the engine
process (worker.py) and the Python API (llm.py) drive the same code.

The overlapped step: ``step`` schedules and launches step N+1 while the device still works on step
N, then waits for N and commits its tokens. A decode row takes its input token from the device, so
N+1 needs nothing that the host learns from N. A request that turns out to be finished in N has been
scheduled once too often; the scheduler drops that token. With ``overlap`` off every step is
committed before the next is scheduled: the same code, for comparing outputs token by token.

A step with grammars needs what N sampled before it can be sampled itself: its forward pass is
launched, then N is committed and the grammars take its tokens while the device works, then the
sampling is launched. A request whose grammar is not compiled yet is not in the scheduler yet.

Rules: at most two steps are in flight; a plan's buffer is rewritten only after its commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from minisgl_fast.config import Config
from minisgl_fast.engine.executor import StepBuffers, make_executor
from minisgl_fast.engine.grammar import Grammar, Grammars
from minisgl_fast.engine.runner import ModelRunner
from minisgl_fast.params import SamplingParams
from minisgl_fast.progress import Progress
from minisgl_fast.sched.scheduler import Scheduler
from minisgl_fast.vocabulary import Vocabulary
from minisgl_fast.wire import grammar_of, pack_add

# How long an idle engine waits for a grammar before it looks at its channels again.
COMPILE_POLL_S = 0.001


class Engine:
    """One engine on one device. All methods are to be called from one thread."""

    def __init__(
        self,
        config: Config,
        model_path: Path,
        vocab_limit: int,
        eos_ids: Iterable[int],
        progress: Progress,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Load the model, size the cache and warm up.

        ``vocab_limit``: ids from here on are never sampled (the tokenizer does not know them).
        ``eos_ids``: what the tokenizer says ends a text; the model's configuration may name more.
        ``vocabulary``: the tokenizer's, without which requests cannot have grammars.
        Raises ConfigError for what the user must change.
        """
        self._runner = ModelRunner(config, model_path, vocab_limit, progress)
        self._executor = make_executor(self._runner, config.cuda_graph_max_bs, progress)
        self._max_in_flight = 2 if config.overlap else 1
        self._in_flight: deque[StepBuffers] = deque()
        self._eos_ids = sorted({*eos_ids, *self._runner.model_config.eos_token_ids})
        self._radix_cache = not config.disable_radix_cache
        self._grammars = self._make_grammars(vocabulary)
        # Requests that wait for their grammar, in the order of their arrival.
        self._compiling: dict[tuple[int, int], tuple[bytes, Future[Grammar | None]]] = {}
        self._scheduler = self._make_scheduler()
        capacity = self._scheduler.plan_capacity()
        self._free = deque(self._executor.make_buffers(capacity, 2))
        self._warm_up(vocab_limit)

    def add(self, channel: int, payload: bytes) -> None:
        """Queue the request of one ADD payload."""
        rid, text = grammar_of(payload)
        if not text:
            self._scheduler.add(channel, payload)
        elif self._grammars is None:
            self._refuse_grammar(channel, rid, payload)
        else:
            future = self._grammars.compile(text)
            self._compiling[channel, rid] = payload, future
            self._add_compiled()

    def abort(self, channel: int, rid: int) -> None:
        """End a request in whatever state it is; unknown and finished ones are ignored."""
        waiting = self._compiling.pop((channel, rid), None)
        if waiting is not None:
            self._scheduler.add(channel, waiting[0])
        self._scheduler.abort(channel, rid)

    def abort_channel(self, channel: int) -> None:
        """End every request of a frontend that is gone."""
        for key in [key for key in self._compiling if key[0] == channel]:
            del self._compiling[key]
        self._scheduler.abort_channel(channel)

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight or self._compiling) or self._scheduler.has_work()

    def step(self) -> list[tuple[int, int, bytes]]:
        """Launch the next step if there is one, commit the oldest that is due.

        The frames that came of it: (channel, kind, payload).
        """
        if self._compiling:
            self._add_compiled()
        launched = False
        if len(self._in_flight) < self._max_in_flight:
            buffers = self._free[0]
            launched = self._scheduler.schedule(buffers.plan)
            if launched:
                self._free.popleft()
                self._launch(buffers)
        if self._in_flight and (not launched or len(self._in_flight) == self._max_in_flight):
            self._commit_oldest()
        return self._scheduler.take_frames()

    def _launch(self, buffers: StepBuffers) -> None:
        masks = buffers.plan.masks
        if not masks:
            self._executor.launch(buffers)
            self._in_flight.append(buffers)
            return
        assert self._grammars is not None
        self._executor.launch_forward(buffers)
        while self._in_flight:
            self._commit_oldest()
        self._grammars.fill(masks, buffers.mask_rows)
        self._executor.launch_sample(buffers)
        self._in_flight.append(buffers)

    def _commit_oldest(self) -> None:
        buffers = self._in_flight.popleft()
        tokens = self._executor.collect(buffers)
        self._scheduler.commit(buffers.plan, tokens, buffers.collected_outputs())
        self._free.append(buffers)

    def _add_compiled(self) -> None:
        """Hand over the requests whose grammars are ready; wait a little if all is idle."""
        if not self._in_flight and not self._scheduler.has_work():
            futures = [future for _, future in self._compiling.values()]
            wait(futures, COMPILE_POLL_S, FIRST_COMPLETED)
        for (channel, rid), (payload, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[channel, rid]
            grammar = None if future.exception() is not None else future.result()
            if grammar is None:
                self._refuse_grammar(channel, rid, payload)
            else:
                self._scheduler.add(channel, payload, grammar)

    def _refuse_grammar(self, channel: int, rid: int, payload: bytes) -> None:
        self._scheduler.add(channel, payload)
        self._scheduler.refuse_grammar(channel, rid)

    def flush_cache(self) -> bool:
        """Forget every cached prefix; only when idle."""
        return not self.has_work and self._scheduler.flush_cache()

    def check(self) -> None:
        """Assert that no page, slot or request is unaccounted for."""
        self._scheduler.check()

    def stats(self) -> dict[str, int]:
        """The payload of STATS."""
        return self._scheduler.stats()

    def facts(self) -> dict[str, Any]:
        """The payload of READY."""
        runner = self._runner
        return {
            "max_model_len": runner.sizes.max_model_len,
            "vocab_size": runner.model_config.vocab_size,
            "hidden_size": runner.model_config.hidden_size,
            "num_pages": runner.sizes.num_pages,
            "page_size": runner.sizes.page_size,
            "max_running_requests": runner.sizes.max_seqs,
            "dtype": str(runner.dtype).removeprefix("torch."),
            "device": runner.device.type,
            "grammars": self._grammars is not None,
            "architecture": runner.model_config.architecture,
            "num_parameters": runner.model_config.num_parameters,
        }

    def close(self) -> None:
        """Wait for what is in flight and release the device."""
        self._executor.close()
        if self._grammars is not None:
            self._grammars.close()

    def _make_grammars(self, vocabulary: Vocabulary | None) -> Grammars | None:
        if vocabulary is None or not self._executor.takes_masks:
            return None
        size = min(len(vocabulary), self._runner.model_config.vocab_size)
        if min(self._eos_ids, default=size) >= size:
            return None  # no token could tell that a text is complete
        return Grammars(vocabulary.truncated(size), self._eos_ids)

    def _make_scheduler(self) -> Scheduler:
        sizes = self._runner.sizes
        return Scheduler(
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            max_seqs=sizes.max_seqs,
            max_model_len=sizes.max_model_len,
            max_step_tokens=sizes.max_step_tokens,
            eos_ids=self._eos_ids,
            radix_cache=self._radix_cache,
        )

    def _warm_up(self, vocab_limit: int) -> None:
        """Run one short request, so that the first real one meets no lazy initialisation.

        The scheduler is made anew after it: nothing of the warm-up is cached or counted.
        """
        params = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9, ignore_eos=True)
        prompt = [min(token, vocab_limit - 1) for token in range(1, 5)]
        self.add(0, pack_add(0, params, prompt, seed=0, max_tokens=2))
        while self.has_work:
            self.step()
        self.check()
        self._scheduler = self._make_scheduler()
