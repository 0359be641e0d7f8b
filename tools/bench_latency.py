"""Time per step of small batches: the wall time of a whole call over its output length.

    python tools/bench_latency.py --model tests/data/configs/Qwen3-0.6B.json --dummy-weight

Batch size 1 with 128 prompt and 512 output tokens, 16 with 512 and 256; random ids, greedy. The
prompt's time is in the figure, as in the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import json
from random import Random

from bench_offline import MAX_ID, Request, argument_parser, make_engine, run

CASES = ((1, 128, 512), (16, 512, 256))


def main() -> None:
    arguments = argument_parser(__doc__.splitlines()[0]).parse_args()
    engine = make_engine(arguments)
    random = Random(0)
    results = {}
    for batch_size, num_prompt, num_output in CASES:

        def draw(size: int = num_prompt, output: int = num_output) -> Request:
            return Request([random.randint(0, MAX_ID) for _ in range(size)], output)

        run(engine, [draw() for _ in range(batch_size)], 0.0)
        times = []
        for _ in range(arguments.repeats + 1):
            times.append(run(engine, [draw() for _ in range(batch_size)], 0.0).duration)
        ms = 1e3 * sorted(times)[len(times) // 2] / num_output
        results[f"bs{batch_size}_ms_per_step"] = round(ms, 3)
        print(
            f"bs {batch_size} ({num_prompt} in, {num_output} out): {ms:.3f} ms a step, "
            f"{batch_size * 1e3 / ms:,.0f} tok/s"
        )
    print(json.dumps({"model": arguments.model, **results}))


if __name__ == "__main__":
    main()
