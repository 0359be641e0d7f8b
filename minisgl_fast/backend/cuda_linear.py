"""The matrix products of a step on the GPU: our own for few rows, cuBLAS for the rest.

For few rows the time is that of reading the weight, and what surrounds a product (norm, SiLU,
residual) costs more as a launch of its own than inside: ``cuda_gemm.py`` for a handful of rows,
``cuda_wide.py`` for up to 64 and a large or medium matrix. That one and cuBLAS add the residual in
float, before the one rounding to bfloat16; ``cuda_gemm.py`` rounds the product first.

The norm before a product is no launch: its weight is multiplied into the matrix at load, and the
1 / rms of a row scales the row's product: in our products' float sums, or after cuBLAS (and where a
bias follows a wide product) in the kernel that takes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl_fast.backend.cuda_gemm import SmallGemm
from minisgl_fast.backend.cuda_wide import WideGemm
from minisgl_fast.backend.interface import MIN_LOGIT_ROWS, Matrix, Norm
from minisgl_fast.backend.kernel import get_kernel

SILU_BLOCK = 128
SILU_MIN_BLOCKS = 1500


def make_matrix(
    weight: Tensor, bias: Tensor | None, norm: Norm | None, *, may_fold: bool
) -> Matrix:
    """A Matrix of bfloat16 [out, in]; with ``may_fold`` the tensor may be overwritten."""
    if norm is None or not may_fold:
        return Matrix(weight, bias, norm)
    scale, eps = norm
    return Matrix(weight.mul_(scale), bias, (torch.ones_like(scale), eps), unit_norm=True)


class Linears:
    """Products of [num_rows, in] with a Matrix [out, in], all bfloat16, and their surroundings."""

    def __init__(self, device: torch.device, max_samples: int, vocab_size: int) -> None:
        self._gemm = SmallGemm(device)
        self._wide = WideGemm(device)
        self._rms_norm = get_kernel("rms_norm", "rms_norm")
        self._silu_mul = get_kernel("silu_mul", "silu_mul")
        # Rows of whole 16-byte loads, at one address for all CUDA graphs and the sampler.
        stride = -(-vocab_size // 8) * 8
        num_rows = max(max_samples, MIN_LOGIT_ROWS)
        self._logits = torch.empty(num_rows, stride, dtype=torch.bfloat16, device=device)

    def unscaled(self, x: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor | None, float]:
        """(product, rows, eps): if there are rows, the product is still to be scaled by their
        1 / rms, and then the matrix's bias to be added.
        """
        weight, bias, norm = matrix.weight, matrix.bias, matrix.norm
        if norm is not None and not matrix.unit_norm:
            x, norm = self.rms_norm(x, *norm), None
        eps = None if norm is None else norm[1]
        if self._gemm.fits(len(x), *weight.shape):
            return self._gemm.linear(x, weight, bias, eps), None, 0.0
        if eps is None:
            return self._linear(x, weight, bias), None, 0.0
        if bias is None and self._wide.fits(len(x), *weight.shape):
            return self._wide.linear(x, weight, norm_eps=eps), None, 0.0
        return self._linear(x, weight, None), x, eps

    def linear_add(self, x: Tensor, matrix: Matrix, residual: Tensor) -> Tensor:
        """residual, in place."""
        weight, bias = matrix.weight, matrix.bias
        if self._gemm.fits(len(x), *weight.shape):
            return self._gemm.linear_add(x, weight, residual, bias)
        if bias is not None:
            return residual.add_(F.linear(x, weight, bias))
        if self._wide.fits(len(x), *weight.shape):
            return self._wide.linear_add(x, weight, residual)
        return residual.addmm_(x, weight.T)

    def linear_silu_mul(self, x: Tensor, matrix: Matrix) -> Tensor:
        """[num_rows, out / 2]."""
        weight, norm = matrix.weight, matrix.norm
        if norm is None or matrix.unit_norm:
            eps = None if norm is None else norm[1]
            if self._gemm.fits(len(x), *weight.shape):
                return self._gemm.linear_silu_mul(x, weight, eps)
            if self._wide.fits(len(x), *weight.shape, gated=True):
                return self._wide.linear_silu_mul(x, weight, eps)
        return self.silu_mul(*self.unscaled(x, matrix))

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        """[num_rows, vocab] with a row stride of a multiple of 8: the same memory in every call."""
        weight, norm = matrix.weight, matrix.norm
        out = self._logits[: len(x), : len(weight)]
        if norm is not None:
            x = self.rms_norm(x, *norm)
        if self._gemm.fits(len(x), *weight.shape) and out.is_contiguous():
            return self._gemm.linear(x, weight, out=out)
        if self._wide.fits(len(x), *weight.shape):
            return self._wide.linear(x, weight, out)
        return torch.mm(x, weight.T, out=out)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            return F.linear(x, weight, bias)
        if self._wide.fits(len(x), *weight.shape):
            return self._wide.linear(x, weight)
        return torch.mm(x, weight.T)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Of each row; rounded before the weight, as transformers does it."""
        out = torch.empty_like(x)
        hidden = x.shape[1]
        self._rms_norm.launch(
            (len(x),),
            row_block(hidden),
            (out.data_ptr(), x.data_ptr(), weight.data_ptr(), hidden, eps),
            pdl=True,
        )
        return out

    def silu_mul(self, gate_up: Tensor, rows: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """[n, 2 I] -> [n, I]: silu(first half) * second half; ``rows`` as of ``unscaled``."""
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
        num_blocks = -(-width // (8 * SILU_BLOCK))  # of a row
        if rows is not None:  # each block reads the row: no more of them than fill the device
            num_blocks = min(num_blocks, max(2, -(-SILU_MIN_BLOCKS // max(num_rows, 1))))
        self._silu_mul.launch(
            (num_rows, num_blocks),
            SILU_BLOCK,
            (
                out.data_ptr(),
                gate_up.data_ptr(),
                0 if rows is None else rows.data_ptr(),
                width,
                0 if rows is None else rows.shape[1],
                eps,
            ),
            pdl=True,
        )
        return out


def row_block(hidden: int) -> int:
    """Threads of a block that takes one row, 8 values a thread, in whole warps."""
    return -(-hidden // 256) * 32
