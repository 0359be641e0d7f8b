"""Streams through the real server on a GPU: tokens a second, latencies, the server's CPU a token.

    python tools/bench_streaming.py [--json FILE]

Starts ``minisgl-fast`` with random weights and Qwen3's tokenizer, and loads it with ``minisgl-fast
bench`` on a core of its own: 1, 16, 64 and 256 clients at once, each of which asks again as soon as
it has its answer. A request is one streamed chat completion of 256 tokens, greedy, after the same
prompt of 400 words, which is cached after the first. Then the same with two frontends, and last the
same batch offline: the engine alone, in this process, without a server.

CPU is that of the server's processes without the engine's, and of the engine's, a token streamed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "front"))

from front_servers import cpu_of, end, unpack_tokenizer  # noqa: E402

PROMPT = (
    "the quick brown fox jumps over the lazy dog while a small server streams tokens to many "
    "readers at once and keeps every one of them on time"
)
NUM_WORDS = 400
# Clients: requests of each. Enough that start-up is not the figure.
ROUNDS = {1: 10, 16: 6, 64: 5, 256: 3}
QUIET_TIMEOUT_S = 15.0
RUN_TIMEOUT_S = 120.0
LOG = "server.log"


class Server:
    """A running server and what its processes have cost."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def cpu_s(self) -> tuple[float, float]:
        """(frontends, engine) so far."""
        engine = frontends = 0.0
        for pid in _tree(self.process.pid):
            cpu = cpu_of(pid)  # by ticks: the scheduler's clock forgets threads that have ended
            seconds = cpu.user + cpu.system
            if b"minisgl_fast.engine" in Path(f"/proc/{pid}/cmdline").read_bytes():
                engine += seconds
            else:
                frontends += seconds
        return frontends, engine

    def wait_until_quiet(self) -> None:
        """Until the frontends have tried their fast tokenizer, in a thread."""
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        before = self.cpu_s()[0]
        while time.monotonic() < deadline:
            time.sleep(0.7)
            now = self.cpu_s()[0]
            if now - before < 0.02:
                return
            before = now

    def keep_off(self, cpu: int) -> None:
        """Leave a core to the client."""
        others = os.sched_getaffinity(0) - {cpu} or {cpu}
        for pid in _tree(self.process.pid):
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), others)


def _tree(root: int) -> list[int]:
    """A process and its descendants."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def model_folder(config: Path, folder: Path) -> Path:
    """A model folder of a config.json and Qwen3's tokenizer; a folder is taken as it is."""
    if config.is_dir():
        return config
    model = folder / config.stem
    unpack_tokenizer(model)
    shutil.copy(config, model / "config.json")
    return model


@contextmanager
def started(model: Path, folder: Path, options: argparse.Namespace, *more: str) -> Iterator[Server]:
    """The server, ready; what it says goes to a log, which is shown if it does not start."""
    command = [sys.executable, "-m", "minisgl_fast", "--model", str(model), "--dummy-weight"]
    command += ["--port", "0", "--device", options.device, *more]
    begin = time.monotonic()
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "ready to serve on" in line:
                break
        else:
            raise SystemExit(f"the server did not start:\n{(folder / LOG).read_text()[-3000:]}")
        url = "http://" + line.split()[-1]
        print(
            f"{' '.join(more) or 'one frontend'}: ready in {time.monotonic() - begin:.1f} s",
            flush=True,
        )
        server = Server(process, url)
        server.wait_until_quiet()
        server.keep_off(options.client_cpu)
        yield server
    finally:
        end(process)


def load(server: Server, clients: int, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run of ``minisgl-fast bench``; its report with the server's CPU beside it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = ["taskset", "-c", str(options.client_cpu), sys.executable, "-m", "minisgl_fast"]
        command += ["bench", "--base-url", server.url, "--dataset", "fixed"]
        words = PROMPT.split()
        command += ["--prompt", " ".join(words[i % len(words)] for i in range(NUM_WORDS))]
        command += ["--num-prompts", str(clients * rounds), "--max-concurrency", str(clients)]
        command += ["--output-len", str(options.tokens), "--warm-up", "0", "--quiet"]
        command += ["--extra-body", '{"temperature": 0}', "--json", str(file)]
        before = server.cpu_s()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=RUN_TIMEOUT_S)
        after = server.cpu_s()
        report: dict[str, Any] = json.loads(file.read_text())
    if report["failed"]:
        raise SystemExit(f"requests failed: {report['minisgl_fast']['error_messages']}")
    tokens = report["total_output_tokens"]
    frontend, engine = (1e6 * (b - a) / tokens for a, b in zip(before, after, strict=True))
    return {
        "clients": clients,
        "requests": report["completed"],
        "tok_s": report["output_throughput"],
        "ttft_p50_ms": report["median_ttft_ms"],
        "ttft_p99_ms": report["p99_ttft_ms"],
        "itl_p50_ms": report["median_itl_ms"],
        "itl_p99_ms": report["p99_itl_ms"],
        "server_us": frontend,
        "engine_us": engine,
        "tokens_per_event": report["minisgl_fast"]["tokens_per_event"],
        "client_share": report["minisgl_fast"]["client"]["cpu_share"],
        "prompt_tokens": report["total_input_tokens"] // report["completed"],
    }


HEAD = (
    f"{'clients':>8}{'requests':>9}{'tok/s':>9}{'TTFT p50 / p99 ms':>20}{'ITL p50 / p99 ms':>19}"
    f"{'server us':>10}{'engine us':>10}{'merged':>8}{'client':>8}"
)


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['clients']:8}{row['requests']:9}{row['tok_s']:9,.0f}"
        f"{row['ttft_p50_ms']:11.1f} /{row['ttft_p99_ms']:7.1f}"
        f"{row['itl_p50_ms']:10.2f} /{row['itl_p99_ms']:7.2f}"
        f"{row['server_us']:10.2f}{row['engine_us']:10.2f}{row['tokens_per_event']:8.2f}"
        f"{row['client_share']:8.0%}",
        flush=True,
    )


def offline(model: Path, num_prompt: int, clients: int, options: argparse.Namespace) -> float:
    """Tokens a second of the engine alone: the same batch, its prompt cached."""
    from bench_offline import Request, argument_parser, make_engine, run

    words = ["--model", str(model), "--dummy-weight", "--device", options.device]
    words += ["--max-prefill-length", "8192"] if options.device != "cpu" else []
    engine = make_engine(argument_parser("").parse_args(words))
    prompt = [100 + i % 900 for i in range(num_prompt)]
    run(engine, [Request(prompt, 8)], 0.0, keep_cache=True)
    runs = [
        run(engine, [Request(prompt, options.tokens)] * clients, 0.0, keep_cache=True)
        for _ in range(3)
    ]
    engine.close()
    return max(one.num_output / one.duration for one in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    config = ROOT / "tests" / "data" / "configs" / "Qwen3-0.6B.json"
    parser.add_argument("--model", type=Path, default=config, help="a config.json, or a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clients", type=int, nargs="+", default=list(ROUNDS))
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--rounds", type=int, help="requests of each client (default: by clients)")
    parser.add_argument("--client-cpu", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    most = max(options.clients)
    with tempfile.TemporaryDirectory(prefix="bench-streaming-") as name:
        folder = Path(name)
        model = model_folder(options.model, folder)
        for frontends, counts in (
            (1, options.clients),
            (2, [n for n in options.clients if n > 16]),
        ):
            if not counts:
                continue
            rows = results[f"frontends_{frontends}"] = []
            with started(model, folder, options, "--frontends", str(frontends)) as server:
                load(server, 1, 2, options)
                print(HEAD, flush=True)
                for clients in counts:
                    row = load(server, clients, options.rounds or ROUNDS.get(clients, 4), options)
                    rows.append(row)
                    show(row)
                    _write(options.json, results)
        num_prompt = results["frontends_1"][-1]["prompt_tokens"]
        alone = results["offline_tok_s"] = offline(model, num_prompt, most, options)
    _write(options.json, results)
    print(f"offline, the same batch of {most}: {alone:,.0f} tok/s")
    for frontends in (1, 2):
        for row in results.get(f"frontends_{frontends}", []):
            if row["clients"] == most:
                ratio = row["tok_s"] / alone
                print(f"online with {frontends} frontend(s) at {most} clients: {ratio:.1%} of that")


def _write(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
