"""The backend of NVIDIA GPUs: kernels of ``kernels/``, and cuBLAS for the larger products.

Rules: bfloat16 only; every launch goes to torch's current stream with addresses that a CUDA graph
may keep; outputs come from torch's allocator; nothing here waits for the device. All kernels take
part in programmatic dependent launch: each begins while the one before it still drains.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from minisgl_fast.backend.cuda_attention import DecodeAttention, NewTokens
from minisgl_fast.backend.cuda_kv import KvStore
from minisgl_fast.backend.cuda_linear import Linears, make_matrix, row_block
from minisgl_fast.backend.cuda_prefill import PrefillAttention
from minisgl_fast.backend.cuda_sampler import Sampler
from minisgl_fast.backend.interface import Matrix, ModelShape, Norm
from minisgl_fast.backend.kernel import get_kernel, require_cupy, warm
from minisgl_fast.backend.kernels_table import SPECS
from minisgl_fast.backend.kv_layout import layer_shape
from minisgl_fast.backend.step import DeviceState, StepTensors
from minisgl_fast.errors import ConfigError
from minisgl_fast.progress import Progress

# One thread takes 8 values of a row.
MAX_HIDDEN = 8192


class CudaKVCache:
    """Keys and values of all layers in swizzled pages (kv_layout.py), in one allocation."""

    def __init__(self, pages: Tensor) -> None:
        self._layers: tuple[Tensor, ...] = pages.unbind()

    def layer(self, index: int) -> Tensor:
        return self._layers[index]


class Queries(NamedTuple):
    """What ``qkv`` leaves to ``attention``: ``q`` [N, H, D] has the tokens of prompts alone."""

    new: NewTokens
    q: Tensor


class CudaBackend:
    """``backend.interface.Backend`` for one GPU. ``prepare`` comes before everything else."""

    def __init__(self, device: torch.device) -> None:
        """ConfigError without CuPy: before weights are loaded, not after."""
        require_cupy()
        self.device = device
        torch.cuda.set_device(device)

    def pick_dtype(self, requested: str, checkpoint: str) -> torch.dtype:
        if requested not in ("auto", "bfloat16"):
            raise ConfigError(
                f"--dtype {requested}: the GPU kernels compute in bfloat16. "
                "Leave --dtype out, or take --device cpu."
            )
        return torch.bfloat16

    def prepare(self, shape: ModelShape, progress: Progress) -> None:
        if shape.hidden_size > MAX_HIDDEN or shape.hidden_size % 8:
            raise ConfigError(
                f"hidden_size {shape.hidden_size}: the GPU kernels need a multiple of 8 "
                f"up to {MAX_HIDDEN}."
            )
        warm(SPECS, progress)
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._decode = DecodeAttention(*heads, shape.page_size)
        self._prefill = PrefillAttention(*heads)
        self._kv_store = KvStore(*heads, shape.page_size, qk_norm=shape.qk_norm)
        self._sampler = Sampler(shape.max_seqs, shape.vocab_size, self.device)
        self._apply_updates = get_kernel("step", "apply_updates")
        self._embed = get_kernel("step", "embed")
        self._linears = Linears(self.device, shape.max_seqs, shape.vocab_size)

    def allocate_kv(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> CudaKVCache:
        shape = (num_layers, *layer_shape(num_pages, num_kv_heads, page_size, head_dim))
        return CudaKVCache(torch.zeros(shape, dtype=dtype, device=self.device))

    def apply_updates(self, step: StepTensors, state: DeviceState) -> None:
        self._apply_updates.launch(
            (1,),
            256,
            (
                state.page_table.data_ptr(),
                state.page_table.stride(0),
                step.header.data_ptr(),
                step.update_slots.data_ptr(),
                step.update_columns.data_ptr(),
                step.update_pages.data_ptr(),
            ),
            pdl=True,
        )

    def embed(self, step: StepTensors, state: DeviceState, weight: Tensor) -> Tensor:
        hidden = weight.shape[1]
        out = torch.empty(step.num_tokens, hidden, dtype=weight.dtype, device=self.device)
        self._embed.launch(
            (step.num_tokens,),
            row_block(hidden),
            (
                out.data_ptr(),
                weight.data_ptr(),
                step.input_ids.data_ptr(),
                step.seq_slots.data_ptr(),
                state.last_token.data_ptr(),
                hidden,
            ),
            pdl=True,
        )
        return out

    def make_matrix(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        *,
        may_fold: bool = False,
    ) -> Matrix:
        return make_matrix(weight, bias, norm, may_fold=may_fold)

    def linear_add(self, x: Tensor, matrix: Matrix, residual: Tensor) -> Tensor:
        return self._linears.linear_add(x, matrix, residual)

    def linear_silu_mul(self, x: Tensor, matrix: Matrix) -> Tensor:
        return self._linears.linear_silu_mul(x, matrix)

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        return self._linears.logits(x, matrix)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._linears.rms_norm(x, weight, eps)

    def qkv(
        self,
        x: Tensor,
        matrix: Matrix,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        rope_table: Tensor,
        step: StepTensors,
        kv_layer: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> Queries:
        value, rows, rows_eps = self._linears.unscaled(x, matrix)
        bias = None if rows is None else matrix.bias
        new = NewTokens(value, q_norm, k_norm, eps, rope_table, rows, rows_eps, bias)
        q = torch.empty(len(x), num_heads, head_dim, dtype=x.dtype, device=self.device)
        first = step.num_decode  # what comes before is left to decode attention
        if first < len(x):
            self._kv_store(
                value[first:],
                q_norm,
                k_norm,
                eps,
                rope_table,
                step.positions[first:],
                step.kv_slots[first:],
                q[first:],
                kv_layer,
                len(x) - first,
                pdl=True,
                rows=None if rows is None else rows[first:],
                rows_eps=rows_eps,
                bias=bias,
            )
        return Queries(new, q)

    def attention(
        self, q: Queries, kv_layer: Tensor, step: StepTensors, state: DeviceState, scale: float
    ) -> Tensor:
        num_tokens, num_heads, head_dim = q.q.shape
        out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.q.dtype, device=self.device)
        num_prefills = step.num_seqs - step.num_decode
        # First, so that it takes the places it needs, and decode streams beside it and after it.
        prefill = self._prefill.launch(
            q.q,
            kv_layer,
            out,
            step.q_start,
            step.context_lens,
            step.seq_slots,
            state.page_table,
            first_seq=step.num_decode,
            num_seqs=num_prefills,
            num_tokens=num_tokens - step.num_decode,
            max_context=step.max_context,
            scale=scale,
        )
        self._decode(
            q.new,
            kv_layer,
            out,
            step.context_lens,
            step.seq_slots,
            state.page_table,
            step.num_decode,
            scale,
            pdl=True,
            prefill=prefill,
        )
        return out

    def sample(
        self, logits: Tensor, step: StepTensors, state: DeviceState, vocab_limit: int
    ) -> Tensor:
        return self._sampler(logits, step, state, vocab_limit)

    def reset_counts(
        self, state: DeviceState, slot: int, tokens: array[int], num_prompt: int
    ) -> None:
        self._sampler.reset_counts(state, slot, tokens, num_prompt)
