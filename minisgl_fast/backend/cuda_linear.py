"""The matrix products of a step on the GPU: our own for a handful of rows, cuBLAS for the rest.

For few rows the time is that of reading the weight, and what surrounds a product (norm, SiLU,
residual) costs more as a launch of its own than inside (``cuda_gemm.py``). cuBLAS adds the residual
in its epilogue, before the one rounding to bfloat16; ours rounds the product first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl_fast.backend.cuda_gemm import MAX_NORM_ROWS, SmallGemm
from minisgl_fast.backend.interface import MIN_LOGIT_ROWS, Matrix, Norm
from minisgl_fast.backend.kernel import get_kernel

SILU_BLOCK = 128


class Linears:
    """Products of [num_rows, in] with a Matrix [out, in], all bfloat16, and their surroundings."""

    def __init__(self, device: torch.device, max_samples: int, vocab_size: int) -> None:
        self._gemm = SmallGemm(device)
        self._rms_norm = get_kernel("rms_norm", "rms_norm")
        self._silu_mul = get_kernel("silu_mul", "silu_mul")
        # Rows of whole 16-byte loads, at one address for all CUDA graphs and the sampler.
        stride = -(-vocab_size // 8) * 8
        num_rows = max(max_samples, MIN_LOGIT_ROWS)
        self._logits = torch.empty(num_rows, stride, dtype=torch.bfloat16, device=device)

    def linear(self, x: Tensor, matrix: Matrix, norm: Norm | None = None) -> Tensor:
        """[num_rows, out]."""
        weight, bias = matrix.weight, matrix.bias
        if norm is not None and len(x) > MAX_NORM_ROWS:
            x, norm = self.rms_norm(x, *norm), None
        if self._gemm.fits(len(x), *weight.shape):
            return self._gemm.linear(x, weight, bias, norm)
        return F.linear(x if norm is None else self.rms_norm(x, *norm), weight, bias)

    def linear_add(self, x: Tensor, matrix: Matrix, residual: Tensor) -> Tensor:
        """residual, in place."""
        weight, bias = matrix.weight, matrix.bias
        if self._gemm.fits(len(x), *weight.shape):
            return self._gemm.linear_add(x, weight, residual, bias)
        if bias is not None:
            return residual.add_(F.linear(x, weight, bias))
        return residual.addmm_(x, weight.T)

    def linear_silu_mul(self, x: Tensor, matrix: Matrix, norm: Norm) -> Tensor:
        """[num_rows, out / 2]."""
        weight = matrix.weight
        fits = self._gemm.fits(len(x), *weight.shape)
        if fits and len(x) <= MAX_NORM_ROWS:
            return self._gemm.linear_silu_mul(x, weight, norm)
        x = self.rms_norm(x, *norm)
        if fits:
            return self._gemm.linear_silu_mul(x, weight)
        return self.silu_mul(F.linear(x, weight))

    def logits(self, x: Tensor, matrix: Matrix, norm: Norm) -> Tensor:
        """[num_rows, vocab] with a row stride of a multiple of 8: the same memory in every call."""
        weight = matrix.weight
        out = self._logits[: len(x), : len(weight)]
        fits = self._gemm.fits(len(x), *weight.shape) and out.is_contiguous()
        if fits and len(x) <= MAX_NORM_ROWS:
            return self._gemm.linear(x, weight, norm=norm, out=out)
        x = self.rms_norm(x, *norm)
        if fits:
            return self._gemm.linear(x, weight, out=out)
        return torch.mm(x, weight.T, out=out)

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

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[n, 2 I] -> [n, I]: silu(first half) * second half."""
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
        self._silu_mul.launch(
            (num_rows, -(-width // (8 * SILU_BLOCK))),
            SILU_BLOCK,
            (out.data_ptr(), gate_up.data_ptr(), width),
            pdl=True,
        )
        return out


def row_block(hidden: int) -> int:
    """Threads of a block that takes one row, 8 values a thread, in whole warps."""
    return -(-hidden // 256) * 32
