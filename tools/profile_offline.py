"""Where the time of bench_offline.py goes: its steps in groups, then the kernels of some of them.

    python tools/profile_offline.py --model tests/data/configs/Qwen3-14B.json --dummy-weight \
        --max-prefill-length 256 --at 60 480 780 930

The first run times every step (the host is one step ahead of the GPU, so a step's time is that of
the one before); the second is profiled for a few steps from each of ``--at`` on.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from bench_offline import Request, add_all, argument_parser, make_engine, mini_sglang_workload, run
from profile_decode import profile_steps

from minisgl_fast.engine.engine import Engine
from minisgl_fast.wire import unpack_step

GROUP = 60  # steps a line


class Step(NamedTuple):
    seconds: float
    num_output: int
    num_running: int
    num_queued: int


def time_steps(engine: Engine, requests: list[Request]) -> list[Step]:
    add_all(engine, requests)
    steps = []
    before = time.perf_counter()
    while engine.has_work:
        num_output = sum(len(unpack_step(payload)[0]) for _, _, payload in engine.step())
        now, stats = time.perf_counter(), engine.stats()
        steps.append(Step(now - before, num_output, stats["running"], stats["queued"]))
        before = now
    engine.flush_cache()
    return steps


def print_steps(steps: list[Step]) -> None:
    print(f"{'from':>5} {'ms a step':>9} {'tokens out':>10} {'running':>7} {'queued':>6}")
    for first in range(0, len(steps), GROUP):
        group = steps[first : first + GROUP]
        milliseconds = 1e3 * sum(step.seconds for step in group) / len(group)
        tokens = sum(step.num_output for step in group) / len(group)
        last = group[-1]
        print(
            f"{first:5} {milliseconds:9.2f} {tokens:10.1f} {last.num_running:7} {last.num_queued:6}"
        )
    print(f"{len(steps)} steps, {sum(step.seconds for step in steps):.2f} s")


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--at", type=int, nargs="*", default=[], help="steps, in ascending order")
    parser.add_argument("--steps", type=int, default=6, help="to profile from each on")
    parser.add_argument("--rows", type=int, default=14, help="kernels to show")
    arguments = parser.parse_args()
    requests = mini_sglang_workload()
    engine = make_engine(arguments)
    run(engine, [Request(request.prompt[:64], 8) for request in requests])
    print_steps(time_steps(engine, requests))
    if not arguments.at:
        return
    add_all(engine, requests)
    done = 0
    for first in arguments.at:
        for _ in range(first - done):
            engine.step()
        print(f"\nsteps {first} to {first + arguments.steps - 1}:")
        profile_steps(engine, arguments.steps, arguments.rows)
        done = first + arguments.steps


if __name__ == "__main__":
    main()
