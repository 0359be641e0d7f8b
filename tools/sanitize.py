"""compute-sanitizer over a small run of every kernel: memcheck, then racecheck.

    python tools/sanitize.py [NAME ...] [--tool memcheck] [--seconds 300]

Needs a GPU, pytest and compute-sanitizer. A part is some of the kernels' own tests, the smallest
ones, and only our kernels are watched: under racecheck a launch takes a thousand times as long.
torch's memory is allocated anew for every tensor, so that what lies beside one belongs to nobody.
Prints a line a part and tool; exit code 1 if there was an error, or a part for which no test was
left.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = (
    "attention_",
    "kv_store",
    "sample",
    "gemm_",
    "copy_box",
    "rms_norm",
    "silu_mul",
    "embed",
    "apply_updates",
    "copy_ranges",
    "reset_counts",
)
TOOLS = ("memcheck", "racecheck")
# Tests of kernels by file and expression (pytest -k). Those of decode have so few tiles that no
# block uses its ring twice, which racecheck would call a race (docs/benchmarks.md).
PARTS = {
    "prefill": ("test_attention_prefill.py", "nan_row"),
    "prefill_mixed": ("test_attention_prefill.py", "decode_rows"),
    "prefill_cached": ("test_attention_prefill.py", "cached_prefix and 63"),
    "prefill_split": ("test_attention_prefill.py", "few_rows and lengths0"),
    "mixed": ("test_attention_mixed.py", "splits and shape2-wgmma"),
    "decode": (
        "test_attention_decode.py",
        "sequence_alone and (64 or 1024) or nan_of or all_rows or (made_as and 576 and smollm2)"
        " or begin_late and 1000-24-30",
    ),
    "kv_store": ("test_kv_store.py", "(matches and 7) or (rows_of and 64)"),
    "sample": (
        "test_sample.py",
        "(tokens_are and 17-28) or (masks and 3-75) or (logprobs and 14-11) or (history and 5003)",
    ),
    "sample_broken": ("test_sample.py", "broken_rows"),
    "gemm_small": ("test_gemm_small.py", "48-512 or said"),
    "gemm_wide": ("test_gemm_wide.py", "(8464x1984 or 1040x16192) and 17 or 1936x1152"),
    "tensor_map": ("test_tensor_map.py", "box_arrives"),
    "small_ops": ("test_small_ops.py", "(rms_norm or silu or embed) and 7 and not 7168 or updates"),
    "copies": ("../engine/test_cuda_copy.py", "copied"),
}


def run(part: str, tool: str, seconds: float) -> tuple[bool, str]:
    """(whether it is clean, what was seen)."""
    file, expression = PARTS[part]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += ["--target-processes", "all", "--print-limit", "5"]
    for name in KERNELS:
        command += ["--kernel-name", f"kernel_substring={name}"]
    command += [sys.executable, "-m", "pytest"]
    command += ["-m", "gpu", "-q", "-x", "--noconftest", "-p", "no:cacheprovider"]
    command += ["--timeout", "0", "-k", expression, str(ROOT / "tests" / "kernels" / file)]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return False, f"not done after {seconds:.0f} s"
    passed = re.search(r"(\d+) passed", done.stdout)
    summary = re.findall(r"========= (.*SUMMARY: .*)", done.stdout)
    text = f"{passed[0] if passed else 'no test passed'}, {'; '.join(summary) or 'no summary'}"
    text += f", {time.monotonic() - begin:.0f} s"
    if done.returncode or not passed:
        return False, f"{text}\n{done.stdout[-3000:]}"
    return True, text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], metavar="NAME")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="(default: both)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of a part and tool at most")
    options = parser.parse_args()
    failures = 0
    for tool in options.tool or TOOLS:
        for part in options.parts or PARTS:
            clean, text = run(part, tool, options.seconds)
            failures += not clean
            print(f"{tool:10} {part:14} {'clean' if clean else 'NOT CLEAN'}: {text}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
