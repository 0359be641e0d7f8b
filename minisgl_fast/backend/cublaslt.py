"""cuBLASLt through ctypes: every algorithm it has for a product, and the product by one of them.

    library = load_cublaslt()
    algorithms = library.algorithms(Product(num_rows, n, k, stride))
    library.run(product, algorithms[0], x, weight, out, add=False)

torch takes the algorithm that cuBLAS ranks first; the ranking is an estimate, and another one may
be faster on the card at hand. This is the library that torch itself has loaded, so there is nothing
to install. Only algorithms that sum in float32 and round once are asked for. All launches go to
torch's current stream and share one workspace, which lives as long as the process: a CUDA graph may
keep its address. An algorithm gives equal bits for equal inputs.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minisgl_fast.errors import EngineError

WORKSPACE_BYTES = 32 << 20
ALIGNMENT = 256  # bytes, of every address: what the algorithms are chosen for

# cublasLt.h and library_types.h
_COMPUTE_32F = 68
_R_32F, _R_16BF = 0, 14
_DESC_TRANSA = 3
_PREF_MAX_WORKSPACE_BYTES, _PREF_REDUCTION_SCHEME_MASK = 1, 3
_REDUCTION_IN_COMPUTE_TYPE = 2
_CONFIGURATION = {"id": 0, "tile": 1, "split": 2, "custom": 5, "stages": 6, "cluster": 8}


@dataclass(frozen=True, slots=True)
class Product:
    """out [num_rows, n] = or += x [num_rows, k] W^T, all bfloat16; x and W contiguous."""

    num_rows: int
    n: int
    k: int
    stride: int  # of out's rows, in elements
    in_out: bool = False  # W is stored [k, n] instead of [n, k]


class Algorithm(ctypes.Structure):
    """What cublasLtMatmulAlgoGetHeuristic says of one way to compute a product."""

    _fields_ = [
        ("choice", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@dataclass(frozen=True, slots=True)
class _Problem:
    """A product's descriptors."""

    operation: ctypes.c_void_p
    weight: ctypes.c_void_p
    x: ctypes.c_void_p
    out: ctypes.c_void_p


class CublasLt:
    """One device's handle, descriptors and workspace."""

    def __init__(self, library: ctypes.CDLL, device: torch.device) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        library.cublasLtMatmul.argtypes = [*[pointer] * 14, size, pointer]
        library.cublasLtMatrixLayoutCreate.argtypes = [
            pointer,
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_int64,
        ]
        library.cublasLtGetVersion.restype = size
        self._library = library
        self._device = device
        self._handle = self._make("Create")
        self._preference = self._make("MatmulPreferenceCreate")
        self._set(self._preference, _PREF_MAX_WORKSPACE_BYTES, ctypes.c_uint64(WORKSPACE_BYTES))
        scheme = ctypes.c_uint32(_REDUCTION_IN_COMPUTE_TYPE)
        self._set(self._preference, _PREF_REDUCTION_SCHEME_MASK, scheme)
        self._problems: dict[Product, _Problem] = {}
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._factors = {add: ctypes.c_float(float(add)) for add in (False, True)}

    @property
    def version(self) -> int:
        return int(self._library.cublasLtGetVersion())

    def algorithms(self, product: Product, most: int = 16) -> list[Algorithm]:
        """The best by cuBLAS's own estimate, best first; none where it has none."""
        problem = self._problem(product)
        results = (Algorithm * most)()
        count = ctypes.c_int()
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle,
            problem.operation,
            problem.weight,
            problem.x,
            problem.out,
            problem.out,
            self._preference,
            most,
            results,
            ctypes.byref(count),
        )
        if status:
            return []
        return [one for one in results[: count.value] if one.status == 0]

    def run(
        self,
        product: Product,
        algorithm: Algorithm,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        add: bool,
    ) -> None:
        """out = x W^T, or out += x W^T with one rounding; EngineError where cuBLASLt refuses."""
        problem = self._problem(product)
        address = out.data_ptr()
        status = self._library.cublasLtMatmul(
            self._handle,
            problem.operation,
            ctypes.addressof(self._factors[True]),
            weight.data_ptr(),
            problem.weight,
            x.data_ptr(),
            problem.x,
            ctypes.addressof(self._factors[add]),
            address,
            problem.out,
            address,
            problem.out,
            ctypes.addressof(algorithm),
            self._workspace.data_ptr(),
            WORKSPACE_BYTES,
            torch._C._cuda_getCurrentRawStream(self._device.index),
        )
        self._check(status, "cublasLtMatmul")

    def describe(self, algorithm: Algorithm) -> str:
        """Its configuration in numbers of cublasLt.h, for benchmarks."""
        words = []
        for name, attribute in _CONFIGURATION.items():
            value, written = ctypes.c_uint32(), ctypes.c_size_t()
            status = self._library.cublasLtMatmulAlgoConfigGetAttribute(
                ctypes.byref(algorithm),
                attribute,
                ctypes.byref(value),
                ctypes.c_size_t(2 if name == "cluster" else 4),
                ctypes.byref(written),
            )
            words.append(f"{name} {value.value if status == 0 else '-'}")
        return " ".join(words)

    def _problem(self, product: Product) -> _Problem:
        """cuBLAS's matrices are column by column: it computes out^T = W x^T."""
        problem = self._problems.get(product)
        if problem is None:
            num_rows, n, k = product.num_rows, product.n, product.k
            operation = self._make("MatmulDescCreate", _COMPUTE_32F, _R_32F)
            self._set(operation, _DESC_TRANSA, ctypes.c_int32(not product.in_out), "MatmulDesc")
            weight = (n, k, n) if product.in_out else (k, n, k)
            problem = self._problems[product] = _Problem(
                operation,
                self._make("MatrixLayoutCreate", _R_16BF, *weight),
                self._make("MatrixLayoutCreate", _R_16BF, k, num_rows, k),
                self._make("MatrixLayoutCreate", _R_16BF, n, num_rows, product.stride),
            )
        return problem

    def _make(self, function: str, *arguments: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        create = getattr(self._library, f"cublasLt{function}")
        self._check(create(ctypes.byref(made), *arguments), f"cublasLt{function}")
        return made

    def _set(
        self, target: ctypes.c_void_p, name: int, value: Any, kind: str = "MatmulPreference"
    ) -> None:
        function = f"cublasLt{kind}SetAttribute"
        size = ctypes.c_size_t(ctypes.sizeof(value))
        status = getattr(self._library, function)(target, name, ctypes.byref(value), size)
        self._check(status, function)

    def _check(self, status: int, function: str) -> None:
        if status:
            raise EngineError(f"{function} failed with status {status}")


@functools.cache
def load_cublaslt(device: torch.device) -> CublasLt | None:
    """The cuBLASLt that torch has loaded; None where there is none of that name."""
    major = (torch.version.cuda or "13").split(".")[0]
    try:
        return CublasLt(ctypes.CDLL(f"libcublasLt.so.{major}"), device)
    except (OSError, AttributeError, EngineError):
        return None
