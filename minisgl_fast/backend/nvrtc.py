"""NVRTC through ctypes: CUDA C++ text in, cubin and compiler log out. Needs no GPU and no driver.

Our own call instead of CuPy's, because CuPy picks the architecture itself (it cannot name sm_90a
before NVRTC 12.9), asks the device for it, and caches without looking at included files. Any NVRTC
from 12.4 to 13.x serves: the one of torch's wheels, of ``nvidia-cuda-nvrtc`` or of a CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from minisgl_fast.errors import ConfigError, EngineError


class CompileError(EngineError):
    """NVRTC refused a kernel; the message is its log."""


class Nvrtc:
    """One loaded libnvrtc."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def compile(self, source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
        """(cubin, log) of one translation unit; CompileError with the log if it does not compile.

        ``options`` must name a real architecture (``--gpu-architecture=sm_..``); NVRTC is
        thread-safe and ctypes releases the GIL, so units may be compiled side by side.
        """
        library = self._library
        program = ctypes.c_void_p()
        text = source.encode()
        created = library.nvrtcCreateProgram(
            ctypes.byref(program), text, name.encode(), 0, None, None
        )
        self._check(created)
        try:
            encoded = [option.encode() for option in options]
            status = library.nvrtcCompileProgram(
                program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
            )
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status != 0:
                reason = library.nvrtcGetErrorString(status).decode()
                raise CompileError(f"{name}: {reason}\n{log}")
            return self._read(program, "CUBIN"), log
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status != 0:
            raise EngineError(f"NVRTC: {self._library.nvrtcGetErrorString(status).decode()}")


@functools.cache
def load_nvrtc() -> Nvrtc:
    """The NVRTC of this machine; ConfigError with what to install if there is none."""
    for candidate in _candidates():
        path = Path(candidate)
        # It looks for these by name when it compiles, and some wheels do not say where.
        builtins = path.parent.glob("libnvrtc-builtins.so.*") if path.is_absolute() else ()
        try:
            for library in builtins:
                ctypes.CDLL(str(library))
            return Nvrtc(ctypes.CDLL(candidate))
        except OSError:
            continue
    raise ConfigError(
        "NVRTC was not found, and the CUDA kernels are compiled with it: "
        "pip install nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12"
    )


def _candidates() -> Iterator[str]:
    """Library paths and names, best first: the major version that torch was built for leads.

    A cubin of a newer major version than the driver's would not load, and torch's own is one that
    the driver knows.
    """
    majors = ["13", "12"]
    torch = sys.modules.get("torch")
    cuda_version = getattr(getattr(torch, "version", None), "cuda", None)
    if cuda_version is not None and cuda_version.split(".")[0] in majors:
        majors.sort(key=lambda major: major != cuda_version.split(".")[0])
    spec = importlib.util.find_spec("nvidia")
    wheels = list(spec.submodule_search_locations or []) if spec is not None else []
    toolkit = os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for major in majors:
        for folder in wheels:
            yield from map(str, sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}")))
        yield from map(str, sorted(Path(toolkit).glob(f"lib64/libnvrtc.so.{major}")))
        yield f"libnvrtc.so.{major}"
