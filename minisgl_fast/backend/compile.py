"""Kernel sources to cubins: includes pasted, compiled by NVRTC, kept in a cache on disk.

    python -m minisgl_fast.backend.compile --all       # every kernel for every architecture

Works without a GPU. Rules:
- Kernels include only files of ``kernels/`` (``#include "common.cuh"``), never a CUDA header: NVRTC
  alone is enough to build them. ``common.cuh`` has the integer types and the bf16 helpers.
- Includes are pasted into the source once each, so the cache key sees every byte that was compiled:
  a stale cubin is never loaded.
- The key is a hash of the pasted source, the options (architecture among them) and the version of
  NVRTC. Files are written beside and renamed, so any number of processes may share the cache.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from minisgl_fast.backend.kernels_table import ALL_ARCHS, SPECS, KernelSpec
from minisgl_fast.backend.nvrtc import CompileError, load_nvrtc
from minisgl_fast.errors import ConfigError
from minisgl_fast.progress import ConsoleProgress, Progress, silent

BASE_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "-lineinfo")
STAGE = "Compiling CUDA kernels"

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+(?:"([^"]+)"|<([^>]+)>).*$')


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin on disk and the log that NVRTC wrote for it."""

    spec: KernelSpec
    arch: str
    cubin: Path
    log: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What ptxas reports of one kernel; bytes, per thread but for ``shared``."""

    entry: str
    registers: int
    shared: int
    stack: int
    spill: int


@functools.cache
def kernels_folder() -> Path:
    """Where the .cu files are: in the installed package, or beside it in a checkout."""
    if importlib.util.find_spec("minisgl_fast.kernels") is not None:
        spec = importlib.util.find_spec("minisgl_fast.kernels")
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent
    return Path(__file__).resolve().parents[2] / "kernels"


def arch_of(major: int, minor: int) -> str:
    """The NVRTC architecture of a device's compute capability; 9.0 gets wgmma with its "a"."""
    if major < 8:
        raise ConfigError(
            f"the CUDA kernels need compute capability 8.0 or newer; this GPU has {major}.{minor}"
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def expand(source: str, folder: Path) -> str:
    """The text of ``folder/source`` with every include of the folder pasted in, once each."""
    seen: set[str] = set()

    def paste(name: str) -> list[str]:
        seen.add(name)
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((folder / name).read_text().splitlines(), 1):
            match = _INCLUDE.match(line)
            if match is None:
                lines.append(line)
                continue
            included = match[1] or match[2]
            if not (folder / included).is_file():
                raise CompileError(f"{name}:{number}: {included} is not a file of kernels/")
            if included not in seen:
                lines += paste(included)
            lines.append(f'#line {number + 1} "{name}"')
        return lines

    return "\n".join(paste(source)) + "\n"


def options_of(spec: KernelSpec, arch: str) -> tuple[str, ...]:
    """NVRTC's options for one variant on one architecture."""
    defines = (f"-D{name}={value}" for name, value in spec.defines)
    return (f"--gpu-architecture={arch}", *BASE_OPTIONS, *defines)


@functools.cache
def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/minisgl_fast/kernels``, private to the user; a temporary one if unwritable.

    Private because its files are run: one that others may write to is not used.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "minisgl_fast" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        if (
            state.st_uid == os.geteuid()
            and not state.st_mode & 0o022
            and os.access(folder, os.W_OK)
        ):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="minisgl_fast-kernels-"))


def compile_spec(spec: KernelSpec, arch: str, *, folder: Path | None = None) -> Compiled:
    """Compile one variant for one architecture, or find it in the cache.

    Raises CompileError with NVRTC's log, or ConfigError where there is no NVRTC.
    """
    nvrtc = load_nvrtc()
    source = expand(spec.source, kernels_folder())
    options = options_of(spec, arch)
    key = hashlib.sha256(repr((nvrtc.version, options, source)).encode()).hexdigest()[:32]
    folder = cache_folder() if folder is None else folder
    cubin_path = folder / f"{spec.name}.{arch}.{key}.cubin"
    log_path = cubin_path.with_suffix(".log")
    # The log is written first: where the cubin is, the log is too.
    if cubin_path.is_file():
        return Compiled(spec, arch, cubin_path, log_path.read_text())
    cubin, log = nvrtc.compile(source, spec.source, options)
    _write(log_path, log.encode())
    _write(cubin_path, cubin)
    return Compiled(spec, arch, cubin_path, log)


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def compile_specs(
    jobs: Sequence[tuple[KernelSpec, str]],
    progress: Progress = silent,
    *,
    folder: Path | None = None,
) -> list[Compiled | CompileError]:
    """Compile (spec, arch) pairs on all cores, in order; a failure is returned in its place."""
    results: list[Compiled | CompileError | None] = [None] * len(jobs)
    num_threads = min(len(jobs), os.cpu_count() or 1) or 1
    with ThreadPoolExecutor(num_threads) as pool:
        futures = {
            pool.submit(compile_spec, spec, arch, folder=folder): index
            for index, (spec, arch) in enumerate(jobs)
        }
        for done, future in enumerate(as_completed(futures), 1):
            try:
                results[futures[future]] = future.result()
            except CompileError as error:
                results[futures[future]] = error
            progress(STAGE, done, len(jobs))
    return [result for result in results if result is not None]


def usage_of(log: str) -> list[Usage]:
    """The kernels in NVRTC's log (ptxas -v), with their registers, memory and spills."""
    usages = []
    for part in log.split("Compiling entry function '")[1:]:
        entry = part[: part.index("'")]

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        usages.append(
            Usage(
                entry,
                registers=number(r"Used (\d+) registers"),
                shared=number(r"(\d+) bytes smem"),
                stack=number(r"(\d+) bytes stack frame"),
                spill=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            )
        )
    return usages


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile kernels, print a table of resources; 1 on an error or a spill in a hot kernel."""
    parser = argparse.ArgumentParser(prog="python -m minisgl_fast.backend.compile")
    parser.add_argument("--all", action="store_true", help="every kernel (the default)")
    parser.add_argument("--only", default="", help="kernels whose name contains this word")
    parser.add_argument("--arch", action="append", choices=ALL_ARCHS, help="may be repeated")
    options = parser.parse_args(arguments)
    archs = options.arch or list(ALL_ARCHS)
    jobs = [
        (spec, arch)
        for spec in SPECS
        if options.only in spec.name
        for arch in archs
        if spec.serves(arch)
    ]
    print(f"NVRTC {'.'.join(map(str, load_nvrtc().version))}")
    results = compile_specs(jobs, ConsoleProgress())
    failures = 0
    print(f"{'kernel':36} {'arch':7} {'registers':>9} {'shared':>7} {'stack':>6} {'spill':>6}")
    for (spec, arch), result in zip(jobs, results, strict=True):
        if isinstance(result, CompileError):
            failures += 1
            print(f"{spec.name:36} {arch:7} failed\n{result.message}")
            continue
        usages = usage_of(result.log)
        missing = set(spec.entries) - {usage.entry for usage in usages}
        if missing:
            failures += 1
            print(f"{spec.name:36} {arch:7} has no entry {', '.join(sorted(missing))}")
        for usage in usages:
            bad = spec.hot and usage.spill > 0
            failures += bad
            label = spec.name if len(usages) == 1 else f"{spec.name}:{usage.entry}"
            print(
                f"{label:36} {arch:7} {usage.registers:9} {usage.shared:7} {usage.stack:6} "
                f"{usage.spill:6}{'  SPILLS' if bad else ''}"
            )
        for line in result.log.splitlines():
            if "warning" in line.lower() or "C75" in line:
                print(f"    {line.strip()}")
    print(f"{len(jobs)} compiled, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
