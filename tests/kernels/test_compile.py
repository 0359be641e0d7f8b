"""Compiling kernels without a GPU: includes, the cache, resource reports, errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minisgl_fast.backend import compile as compiler
from minisgl_fast.backend.kernels_table import ALL_ARCHS, SPECS, KernelSpec, find_spec
from minisgl_fast.backend.nvrtc import CompileError, _candidates, load_nvrtc
from minisgl_fast.errors import ConfigError

try:
    load_nvrtc()
    HAS_NVRTC = True
except ConfigError:
    HAS_NVRTC = False

needs_nvrtc = pytest.mark.skipif(not HAS_NVRTC, reason="no NVRTC: pip install nvidia-cuda-nvrtc")

SCALE = """
#include "helper.cuh"  // defines: FACTOR
extern "C" __global__ void scale(float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= FACTOR * EXTRA;
}
"""
SPEC = KernelSpec("scale", "scale.cu", ("scale",), (("EXTRA", 3),))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernels folder of our own, and an empty cache beside it."""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "scale.cu").write_text(SCALE)
    (kernels / "helper.cuh").write_text("#pragma once\n#define FACTOR 2.0f\n")
    monkeypatch.setattr(compiler, "kernels_folder", lambda: kernels)
    (tmp_path / "cache").mkdir()
    return tmp_path


def test_every_source_of_the_table_exists_and_names_are_unique():
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    for spec in SPECS:
        assert (compiler.kernels_folder() / spec.source).is_file(), spec.name
        assert find_spec(spec.name) is spec
    with pytest.raises(KeyError):
        find_spec("no such kernel")


def test_architectures_are_those_of_the_device():
    assert compiler.arch_of(9, 0) == "sm_90a"
    assert compiler.arch_of(8, 0) == "sm_80"
    assert compiler.arch_of(12, 1) == "sm_121"
    with pytest.raises(ConfigError, match="7.5"):
        compiler.arch_of(7, 5)


def test_includes_are_pasted_once_and_lines_keep_their_numbers(tmp_path: Path):
    (tmp_path / "a.cuh").write_text('#include "b.cuh"\nint a;\n')
    (tmp_path / "b.cuh").write_text("int b;\n")
    (tmp_path / "k.cu").write_text('#include "a.cuh"  // defines: a\n#include "b.cuh"\nint k;\n')
    text = compiler.expand("k.cu", tmp_path)
    assert text.count("int b;") == text.count("int a;") == 1
    assert re.search(r'#line 3 "k.cu"\nint k;', text)
    assert text.index("int b;") < text.index("int a;") < text.index("int k;")


def test_includes_from_elsewhere_are_refused(tmp_path: Path):
    (tmp_path / "k.cu").write_text("int x;\n#include <cuda_bf16.h>\n")
    with pytest.raises(CompileError, match=r"k.cu:2: cuda_bf16.h"):
        compiler.expand("k.cu", tmp_path)


@needs_nvrtc
def test_cache_serves_what_did_not_change_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = folder / "cache"
    first = compiler.compile_spec(SPEC, "sm_90a", folder=cache)
    assert first.cubin.read_bytes()[:4] == b"\x7fELF"
    assert "scale" in first.log

    nvrtc = load_nvrtc()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compile", None)  # a hit must not compile
        assert compiler.compile_spec(SPEC, "sm_90a", folder=cache) == first

    other_arch = compiler.compile_spec(SPEC, "sm_80", folder=cache)
    (folder / "kernels" / "helper.cuh").write_text("#define FACTOR 5.0f\n")
    other_include = compiler.compile_spec(SPEC, "sm_90a", folder=cache)
    other_define = compiler.compile_spec(
        KernelSpec("scale", "scale.cu", ("scale",), (("EXTRA", 4),)), "sm_90a", folder=cache
    )
    paths = {first.cubin, other_arch.cubin, other_include.cubin, other_define.cubin}
    assert len(paths) == 4
    assert sorted(path.suffix for path in cache.iterdir()) == [".cubin"] * 4 + [".log"] * 4


@needs_nvrtc
def test_cubin_without_the_log_beside_it_never_appears(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []
    write = compiler._write

    def record(path: Path, data: bytes) -> None:
        written.append(path.suffix)
        write(path, data)

    monkeypatch.setattr(compiler, "_write", record)
    compiler.compile_spec(SPEC, "sm_90a", folder=folder / "cache")
    assert written == [".log", ".cubin"]


@needs_nvrtc
def test_compile_error_carries_file_line_and_log(folder: Path):
    (folder / "kernels" / "scale.cu").write_text('#include "helper.cuh"\n\nint x = nothing;\n')
    with pytest.raises(CompileError) as caught:
        compiler.compile_spec(SPEC, "sm_90a", folder=folder / "cache")
    assert "scale.cu(3)" in caught.value.message
    assert "nothing" in caught.value.message
    assert list((folder / "cache").iterdir()) == []


@needs_nvrtc
def test_failures_keep_their_place_and_progress_counts_all(folder: Path):
    (folder / "kernels" / "broken.cu").write_text("this is not C++\n")
    broken = KernelSpec("broken", "broken.cu", ("broken",))
    calls: list[tuple[int, int]] = []
    results = compiler.compile_specs(
        [(SPEC, "sm_80"), (broken, "sm_80"), (SPEC, "sm_90a")],
        lambda stage, done, total: calls.append((done, total)),
        folder=folder / "cache",
    )
    assert [isinstance(result, CompileError) for result in results] == [False, True, False]
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_usage_is_read_from_ptxas():
    log = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function 'one' for 'sm_90a'\n"
        "ptxas info    : Function properties for one\n"
        "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem\n"
        "ptxas info    : Compiling entry function 'two' for 'sm_90a'\n"
        "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers\n"
    )
    assert compiler.usage_of(log) == [
        compiler.Usage("one", registers=40, shared=1024, stack=8, spill=28),
        compiler.Usage("two", registers=8, shared=0, stack=0, spill=0),
    ]


@needs_nvrtc
def test_command_fails_on_an_error_and_on_a_spill_in_a_hot_kernel(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # 200 values that live across a barrier, in at most 32 registers a thread.
    (folder / "kernels" / "spill.cu").write_text("""
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x) {
    float v[200];
#pragma unroll
    for (int i = 0; i < 200; i++) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 200; i++) x[i * 1024 + threadIdx.x] = v[199 - i];
}
""")
    monkeypatch.setattr(compiler, "cache_folder", lambda: folder / "cache")
    spill = KernelSpec("spill", "spill.cu", ("spill",))
    monkeypatch.setattr(compiler, "SPECS", (SPEC,))
    assert compiler.main(["--arch", "sm_90a"]) == 0
    monkeypatch.setattr(compiler, "SPECS", (SPEC, spill))
    assert compiler.main(["--arch", "sm_90a"]) == 1
    assert "SPILLS" in capsys.readouterr().out
    cold = KernelSpec("spill", "spill.cu", ("spill",), hot=False)
    monkeypatch.setattr(compiler, "SPECS", (SPEC, cold))
    assert compiler.main(["--arch", "sm_90a"]) == 0
    wrong_entry = KernelSpec("wrong", "scale.cu", ("other",), (("EXTRA", 1),))
    monkeypatch.setattr(compiler, "SPECS", (wrong_entry,))
    assert compiler.main(["--arch", "sm_90a"]) == 1
    assert "has no entry other" in capsys.readouterr().out


def test_cache_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choose = compiler.cache_folder.__wrapped__
    folder = choose()
    assert folder == tmp_path / "minisgl_fast" / "kernels"
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)  # others could plant a cubin
    elsewhere = choose()
    assert elsewhere != folder
    assert elsewhere.stat().st_mode & 0o077 == 0
    elsewhere.rmdir()


def test_nvrtc_of_torchs_major_version_comes_first(monkeypatch: pytest.MonkeyPatch):
    class Version:
        cuda = "12.8"

    class Torch:
        version = Version

    monkeypatch.setitem(sys.modules, "torch", Torch)
    names = [Path(candidate).name for candidate in _candidates()]
    assert names[0] == "libnvrtc.so.12"
    assert "libnvrtc.so.13" in names


@needs_nvrtc
# One variant a source file: all of them take minutes, and are what the command is for.
@pytest.mark.parametrize(
    "spec", {spec.source: spec for spec in reversed(SPECS)}.values(), ids=lambda spec: spec.name
)
def test_kernels_compile_for_hopper_without_spills(spec: KernelSpec):
    arch = "sm_90a" if spec.serves("sm_90a") else ALL_ARCHS[0]
    compiled = compiler.compile_spec(spec, arch)
    usages = {usage.entry: usage for usage in compiler.usage_of(compiled.log)}
    assert set(spec.entries) <= set(usages)
    if spec.hot:
        assert all(usage.spill == 0 for usage in usages.values())


def test_compiling_does_not_need_cupy():
    code = (
        "import sys; from minisgl_fast.backend import nvrtc, kernels_table; "
        "import minisgl_fast.backend.compile; "
        "assert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
