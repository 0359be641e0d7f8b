"""Where the GPU's time goes in a decode step: a table of kernels, and how long the GPU was idle.

"idle before" is the time in which nothing ran until the kernel began.

    python tools/profile_decode.py --model tests/data/configs/Qwen3-0.6B.json --dummy-weight \
        --batch-size 256 --context 512

Profiles some decode steps of a batch that runs at full size the whole time. Kernels that run beside
each other count once towards the busy time.
"""

from __future__ import annotations

from collections import defaultdict
from random import Random

from bench_offline import argument_parser, make_engine
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from minisgl_fast.engine.engine import Engine
from minisgl_fast.params import SamplingParams
from minisgl_fast.wire import pack_add

NAME_WIDTH = 60


def start_batch(engine: Engine, batch_size: int, context: int, num_output: int) -> None:
    """Add a batch and step until every request is in decode."""
    random = Random(0)
    params = SamplingParams(max_tokens=num_output, temperature=0.6, ignore_eos=True)
    for rid in range(batch_size):
        prompt = [random.randint(0, 10000) for _ in range(context)]
        engine.add(0, pack_add(rid, params, prompt, seed=rid, max_tokens=num_output))
    num_started = 0
    while num_started < batch_size:
        engine.step()
        stats = engine.stats()
        num_started = min(stats["running"], stats["generated_tokens"])
    for _ in range(8):
        engine.step()


def busy_time_us(events: list[FunctionEvent]) -> float:
    """Length of the union of the events' intervals, in microseconds."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


def idle_before_us(events: list[FunctionEvent]) -> dict[str, float]:
    """Idle microseconds by the kernel that ended them."""
    idle: dict[str, float] = defaultdict(float)
    end = float("inf")
    for event in sorted(events, key=lambda e: e.time_range.start):
        idle[event.name] += max(0.0, event.time_range.start - end)
        end = event.time_range.end if end == float("inf") else max(end, event.time_range.end)
    return idle


def profile_steps(engine: Engine, steps: int, rows: int) -> None:
    """Run so many steps, and print the kernels that took longest."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            engine.step()
    kernels = [e for e in profiled.events() if str(e.device_type).endswith("CUDA")]
    if not kernels:
        raise SystemExit("the profiler saw no kernel: it needs a GPU, and the right to count on it")
    start = min(e.time_range.start for e in kernels)
    end = max(e.time_range.end for e in kernels)
    times: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        times[event.name].append(event.time_range.elapsed_us())
    idle = idle_before_us(kernels)
    print(f"{'us/step':>9} {'launches':>8} {'us each':>8} {'idle before':>11}  kernel")
    for name, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:rows]:
        each = sum(spent) / len(spent)
        print(
            f"{sum(spent) / steps:9.1f} {len(spent) / steps:8.1f} {each:8.2f} "
            f"{idle[name] / steps:11.1f}  {name[:NAME_WIDTH]}"
        )
    busy = busy_time_us(kernels)
    print(
        f"{(end - start) / steps:.1f} us a step, GPU busy {busy / steps:.1f} us, "
        f"idle {100 * (1 - busy / (end - start)):.1f} %"
    )


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=20, help="kernels to show")
    arguments = parser.parse_args()
    engine = make_engine(arguments)
    start_batch(engine, arguments.batch_size, arguments.context, arguments.steps + 64)
    print(f"batch {arguments.batch_size}, context {arguments.context}:")
    profile_steps(engine, arguments.steps, arguments.rows)


if __name__ == "__main__":
    main()
