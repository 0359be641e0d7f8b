"""Compiled kernels on a device: loaded by CuPy, launched on torch's current stream.

    kernel = get_kernel("kv_store_d128", "kv_store")
    kernel.launch((num_tokens, 2), 256, (qkv.data_ptr(), out.data_ptr(), num_tokens, 1e-6))

Rules:
- Arguments: an int for every pointer (``tensor.data_ptr()``), int32, uint32 or int64 parameter; a
  float for every ``float`` parameter; the bytes of ``tensor_map`` for a structure of 128 bytes
  passed by value. No other parameter types exist in our kernels.
- The stream is asked for at each launch, so a kernel always lands in the capture that is under way.
- Loading a module inside a capture is an error of the driver: ``warm`` every kernel before.
- A kernel that is launched with ``pdl=True`` (programmatic dependent launch, sm_90 and newer) runs
  ``griddepcontrol.wait`` before it first touches memory that another kernel of the stream writes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch

from minisgl_fast.backend.compile import arch_of, compile_spec, compile_specs
from minisgl_fast.backend.kernels_table import KernelSpec, find_spec
from minisgl_fast.backend.nvrtc import CompileError
from minisgl_fast.errors import ConfigError, EngineError
from minisgl_fast.progress import Progress, silent

try:
    from minisgl_fast.backend.launcher import launch as _launch
    from minisgl_fast.backend.launcher import max_active_clusters as _max_active_clusters
    from minisgl_fast.backend.launcher import tensor_map as _tensor_map
except ImportError:  # a checkout whose extension modules are not built: CuPy launches, without PDL
    _launch = _max_active_clusters = _tensor_map = None  # type: ignore[assignment]

HAS_LAUNCHER = _launch is not None  # without it there are no clusters to count and no tensor maps
UNWRITTEN = -1  # an int32 of a workspace: message.cuh
DEFAULT_SHARED_BYTES = 48 * 1024  # more than this must be asked for, per function


class _Stream:
    """What CuPy accepts as a stream: an object with a ``ptr``."""

    __slots__ = ("ptr",)

    def __init__(self, pointer: int) -> None:
        self.ptr = pointer


class Kernel:
    """One function of one cubin on one device."""

    __slots__ = ("_device", "_function", "_pdl", "_raw", "name")

    def __init__(self, name: str, raw: Any, device: int, *, pdl: bool) -> None:
        self.name = name
        self._raw = raw
        self._function: int = raw.kernel.ptr
        self._device = device
        self._pdl = pdl

    @property
    def num_registers(self) -> int:
        """Registers per thread."""
        return int(self._raw.num_regs)

    def allow_shared(self, shared_bytes: int) -> None:
        """Let launches use up to ``shared_bytes`` of dynamic shared memory. Never in a capture."""
        if shared_bytes > DEFAULT_SHARED_BYTES:
            self._raw.max_dynamic_shared_size_bytes = shared_bytes

    def max_clusters(self, cluster: int, block: int, shared_bytes: int) -> int | None:
        """How many clusters of so many blocks run at once; None where that cannot be told."""
        if _max_active_clusters is None:
            return None
        try:
            return _max_active_clusters(self._function, cluster, block, shared_bytes)
        except RuntimeError:
            return None

    def launch(
        self,
        grid: tuple[int, ...],
        block: int,
        args: tuple[int | float | bytes, ...],
        shared_bytes: int = 0,
        pdl: bool = False,
    ) -> None:
        """Enqueue the kernel on torch's current stream. An empty grid launches nothing.

        ``grid`` is (x,), (x, y) or (x, y, z); ``pdl`` is ignored by devices that have none.
        """
        num = len(grid)
        grid_x, grid_y, grid_z = grid[0], grid[1] if num > 1 else 1, grid[2] if num > 2 else 1
        if grid_x * grid_y * grid_z == 0:
            return
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        if _launch is None:
            boxed = tuple(_cupy().float32(a) if type(a) is float else a for a in args)
            shape = (grid_x, grid_y, grid_z)
            self._raw(shape, (block,), boxed, shared_mem=shared_bytes, stream=_Stream(stream))
            return
        try:
            _launch(
                self._function,
                stream,
                grid_x,
                grid_y,
                grid_z,
                block,
                shared_bytes,
                pdl and self._pdl,
                args,
            )
        except RuntimeError as error:
            shape = f"grid {grid}, block {block}, {shared_bytes} bytes of shared memory"
            raise EngineError(f"launch of {self.name} ({shape}): {error}") from None


def tensor_map(tensor: torch.Tensor, box_rows: int, box_columns: int) -> bytes:
    """A CUtensorMap of a bfloat16 matrix [rows, columns] whose ``stride(1)`` is 1: an argument.

    Boxes of so many rows and columns, coordinates (column, row), 128-byte swizzle, zeros from
    outside of the matrix. The map holds the tensor's address, not the tensor. EngineError where the
    driver refuses (see ``launcher.tensor_map``), or where the launcher is not built.
    """
    if _tensor_map is None:
        raise EngineError("Tensor maps need the compiled launcher: run `make build`.")
    num_rows, num_columns = tensor.shape
    stride = tensor.stride(0) * tensor.element_size()
    try:
        return _tensor_map(tensor.data_ptr(), num_rows, num_columns, stride, box_rows, box_columns)
    except RuntimeError as error:
        shape = f"{num_rows} x {num_columns}, {stride} bytes a row, box {box_rows} x {box_columns}"
        raise EngineError(f"tensor map of a matrix ({shape}): {error}") from None


def get_kernel(spec: str | KernelSpec, entry: str, shared_bytes: int = 0) -> Kernel:
    """The kernel ``entry`` of a variant (by name or spec), on torch's current device, loaded once.

    ``shared_bytes``: the most dynamic shared memory that a launch will ask for.
    """
    return _get_kernel(spec, entry, shared_bytes, torch.cuda.current_device())


def device_arch(device: int) -> str:
    """The architecture that kernels are compiled for on this device."""
    return arch_of(*torch.cuda.get_device_capability(device))


def warm(specs: Sequence[KernelSpec], progress: Progress = silent) -> None:
    """Compile and load all of ``specs`` for the current device; raises the first CompileError."""
    device = torch.cuda.current_device()
    arch = device_arch(device)
    for result in compile_specs([(spec, arch) for spec in specs if spec.serves(arch)], progress):
        if isinstance(result, CompileError):
            raise result
    for spec in specs:
        if spec.serves(arch):
            _load_module(spec, device)


@functools.cache
def _get_kernel(spec: str | KernelSpec, entry: str, shared_bytes: int, device: int) -> Kernel:
    found = find_spec(spec) if isinstance(spec, str) else spec
    raw = _load_module(found, device).get_function(entry)
    pdl = torch.cuda.get_device_capability(device)[0] >= 9
    kernel = Kernel(f"{found.name}:{entry}", raw, device, pdl=pdl)
    kernel.allow_shared(shared_bytes)
    return kernel


@functools.cache
def _load_module(spec: KernelSpec, device: int) -> Any:
    cupy = _cupy()
    compiled = compile_spec(spec, device_arch(device))
    with cupy.cuda.Device(device):
        module = cupy.RawModule(path=str(compiled.cubin))
        for entry in spec.entries:  # get_function loads the module; a wrong name fails here
            module.get_function(entry)
    return module


def require_cupy() -> None:
    """ConfigError with what to install where CuPy is missing."""
    _cupy()


@functools.cache
def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError:
        major = (torch.version.cuda or "13").split(".")[0]
        raise ConfigError(
            f"The GPU backend needs CuPy: pip install 'minisgl_fast[cuda{major}]' "
            f"(cupy-cuda{major}x, for this torch), or take --device cpu."
        ) from None
