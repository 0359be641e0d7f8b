"""Starts the servers that bench_front.py measures, pins them, and reads what they cost."""

from __future__ import annotations

import gzip
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "tests" / "data" / "qwen3-tokenizer"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 15.0
OURS = "minisgl_fast"
FLOOR = "floor"  # the bare writer in C
FLOOR_MERGED, NUM_MERGED = "floor-8", 8  # the same, of that many events a write
MAX_STREAMS = 16_384  # at once; the server's own limit is lower


@dataclass
class Server:
    """A running server; ``credit`` is the file in which a client counts what it has read."""

    name: str
    port: int
    pid: int
    credit: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cpu_s(self) -> Cpu:
        return cpu_of(self.pid)

    def rss_kb(self) -> int:
        """Resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


@dataclass
class Cpu:
    """Seconds of all threads: of CPU in all by the scheduler's clock, user and system by ticks.

    waited: ready to run, while the core was busy with something else.
    """

    total: float
    user: float
    system: float
    waited: float = 0.0

    def since(self, before: Cpu) -> Cpu:
        """The difference; user and system share the exact total as the ticks say."""
        total = self.total - before.total
        user, system = self.user - before.user, self.system - before.system
        share = user / (user + system) if user + system else 0.0
        return Cpu(total, total * share, total * (1 - share), self.waited - before.waited)


def cpu_of(pid: int) -> Cpu:
    tasks = [
        (task / "schedstat").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    total, waited = (sum(int(task[index]) for task in tasks) / 1e9 for index in (0, 1))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) / TICKS_PER_SECOND, int(fields[12]) / TICKS_PER_SECOND
    return Cpu(total, *ticks, waited)


def available_peers() -> list[str]:
    """Those that this machine can run."""
    found = [FLOOR] if shutil.which("gcc") else []
    if all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        found += ["fastapi-vllm", "fastapi-sglang"]
    return found


def compiled(name: str, folder: Path) -> Path:
    """The program of a C file beside this one."""
    program = folder / name
    if not program.exists():
        source = HERE / f"{name}.c"
        subprocess.run(["gcc", "-O2", "-o", str(program), str(source)], check=True)
    return program


@contextmanager
def started(
    name: str,
    folder: Path,
    server_cpu: int,
    client_cpu: int,
    tick_us: int,
    paced: bool = True,
    small: bool = False,
) -> Iterator[Server]:
    """A server on its core. ``paced``: it never runs far ahead of the count in the credit file.
    ``small``: with the small tokenizer that is its own, which leaves no freed memory behind."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        credit, port_file = Path(own) / "credit", Path(own) / "port"
        credit.write_bytes(bytes(8))
        credit_name = str(credit) if paced else "-"
        if name == OURS:
            with _ours(folder, server_cpu, client_cpu, tick_us, credit_name, small) as (port, pid):
                yield Server(name, port, pid, credit)
            return
        if name in (FLOOR, FLOOR_MERGED):
            command = [str(compiled("floor", folder)), str(port_file), str(server_cpu)]
            num_merged = 1 if name == FLOOR else NUM_MERGED
            command += [str(tick_us * num_merged), credit_name, str(num_merged)]
        else:
            command = [sys.executable, str(HERE / "fastapi_app.py"), name.partition("-")[2]]
            command += [str(port_file), str(server_cpu), str(tick_us)]
        process = subprocess.Popen(command)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not (port_file.exists() and port_file.read_text().endswith("\n")):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start")
                time.sleep(0.02)
            time.sleep(0.5)
            yield Server(name, int(port_file.read_text()), process.pid, credit)
        finally:
            process.kill()
            process.wait()


@contextmanager
def _ours(
    folder: Path, server_cpu: int, client_cpu: int, tick_us: int, credit: str, small: bool
) -> Iterator[tuple[int, int]]:
    """``minisgl-fast --fake-engine`` with Qwen3's tokenizer; its engine on the client's core."""
    model = folder / "qwen3"
    if not model.exists():
        unpack_tokenizer(model)
    command = [sys.executable, "-m", "minisgl_fast", "--fake-engine"]
    if not small:
        command += ["--model", str(model)]
    command += ["--served-model-name", "fake", "--port", "0", "--tick-us", str(tick_us)]
    command += ["--max-queued-requests", str(MAX_STREAMS)]
    if credit != "-":
        command += ["--credit-file", credit]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        port = 0
        for line in process.stdout:
            if "ready to serve on" in line:
                port = int(line.rpartition(":")[2])
                break
        if not port:
            raise RuntimeError("minisgl-fast --fake-engine did not start")
        _wait_until_quiet(process.pid)
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {server_cpu})
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                os.sched_setaffinity(int(child), {client_cpu})
        yield port, process.pid
    finally:
        end(process)


def unpack_tokenizer(folder: Path) -> None:
    """Make a model folder with Qwen3's tokenizer."""
    folder.mkdir()
    text = gzip.decompress((TOKENIZER / "tokenizer.json.gz").read_bytes())
    (folder / "tokenizer.json").write_bytes(text)
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)


def end(process: subprocess.Popen[str]) -> None:
    """Ask a server to end, and make it."""
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_quiet(pid: int) -> None:
    """Until it has checked fastokens, in a thread, and does nothing any more."""
    deadline = time.monotonic() + START_TIMEOUT_S
    before = cpu_of(pid).total
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = cpu_of(pid).total
        if now - before < 0.02:
            return
        before = now
