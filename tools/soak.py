"""Minutes of mixed load with random aborts: no page may leak and memory may not grow.

    python tools/soak.py --model tests/data/configs/Qwen3-0.6B.json --dummy-weight --minutes 10

Requests of random lengths, parameters and shared prefixes come and go; a part is aborted somewhere
on its way. Once a minute everything is let run out: then every page must be free or cached, and the
memory in use is printed. Ends with exit code 1 if a page is missing or if the process or the GPU
holds over 256 MiB more than after the first minute.
"""

from __future__ import annotations

import resource
import time
from random import Random

import torch
from bench_offline import argument_parser, make_engine

from minisgl_fast.engine.engine import Engine
from minisgl_fast.params import SamplingParams
from minisgl_fast.wire import FinishReason, pack_add, unpack_step

MAX_OPEN = 400
ALLOWED_GROWTH_BYTES = 256 << 20


class Load:
    """Adds and aborts requests at random, and knows which are open."""

    def __init__(self, engine: Engine, max_prompt: int, vocab_size: int, seed: int = 0) -> None:
        self._engine = engine
        self._max_prompt = max_prompt
        self._vocab_size = vocab_size
        self._random = Random(seed)
        self._prefixes = [self._tokens(self._random.randint(16, max_prompt)) for _ in range(8)]
        self._open: set[int] = set()
        self._next_rid = 0
        self.num_ended = self.num_aborted = 0

    def step(self, *, add: bool) -> None:
        """One engine step, with what happens before it."""
        if add and len(self._open) < MAX_OPEN:
            for _ in range(self._random.randint(0, 3)):
                self._add()
        if self._open and self._random.random() < 0.2:
            rid = self._random.choice(tuple(self._open))
            self._open.discard(rid)
            self._engine.abort(0, rid)
            self.num_aborted += 1
        for _, _, payload in self._engine.step():
            for rid, _, reason in unpack_step(payload)[0]:
                if reason == FinishReason.ERROR:
                    raise SystemExit(f"request {rid} ended with an error")
                if reason != FinishReason.RUNNING and rid in self._open:
                    self._open.discard(rid)
                    self.num_ended += 1

    def _add(self) -> None:
        random = self._random
        params = SamplingParams(
            temperature=random.choice([0.0, 0.6, 1.0]),
            top_k=random.choice([0, 0, 20]),
            top_p=random.choice([1.0, 0.95]),
            min_p=random.choice([0.0, 0.05]),
            frequency_penalty=random.choice([0.0, 0.0, 0.3]),
            ignore_eos=random.random() < 0.5,
        )
        prompt = self._tokens(random.randint(1, self._max_prompt))
        if random.random() < 0.5:
            prompt = (random.choice(self._prefixes) + prompt)[: self._max_prompt]
        rid, num_output = self._next_rid, random.randint(1, 256)
        self._next_rid += 1
        self._open.add(rid)
        payload = pack_add(rid, params, prompt, seed=rid, max_tokens=num_output)
        self._engine.add(0, payload)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(count)]


def memory_bytes(device: str) -> tuple[int, int, int]:
    """Peak resident bytes of the process; bytes in use on the GPU, and those that torch holds."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device != "cuda":
        return resident, 0, 0
    return resident, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--max-prompt", type=int, default=2048)
    arguments = parser.parse_args()
    engine = make_engine(arguments)
    facts = engine.facts()
    longest = min(arguments.max_prompt, facts["max_model_len"] // 2)
    load = Load(engine, longest, facts["vocab_size"])
    first: tuple[int, int, int] | None = None
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end:
        minute = time.monotonic() + min(60.0, 15 * arguments.minutes)
        while time.monotonic() < minute:
            load.step(add=True)
        while engine.has_work:
            load.step(add=False)
        engine.check()
        stats = engine.stats()
        held = memory_bytes(facts["device"])
        print(
            f"{load.num_ended} ended, {load.num_aborted} aborted, "
            f"{stats['preemptions']} preempted; "
            f"pages {stats['pages_free']} free + {stats['pages_cached']} cached of "
            f"{stats['pages_total']}; resident {held[0] >> 20} MiB, "
            f"GPU {held[1] >> 20} of {held[2] >> 20} MiB",
            flush=True,
        )
        if stats["pages_free"] + stats["pages_cached"] != stats["pages_total"]:
            raise SystemExit("pages leaked")
        first = first or held
        if any(now > then + ALLOWED_GROWTH_BYTES for now, then in zip(held, first, strict=True)):
            raise SystemExit("memory grew")


if __name__ == "__main__":
    main()
