"""The backend in plain torch: what runs on a CPU, and the oracle for the CUDA kernels.

A layer of the cache is one tensor [num_pages, page_size, 2, num_kv_heads, head_dim], keys before
values, so that a page is one contiguous run and a step gathers both with one copy.

Attention works on batches of sequences of similar length: their pages are gathered to
[n, num_keys, ...] and one fused kernel runs over them under a mask. How sequences fall into
batches, all index tensors and the masks are made once a step, in the first layer, and kept in
``step.scratch``; no layer loops over tokens or sequences.
"""

from __future__ import annotations

import os
import platform
from array import array
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl_fast.backend import sampling
from minisgl_fast.backend.interface import Matrix, ModelShape, Norm
from minisgl_fast.backend.reference_linear import make_matrix, product
from minisgl_fast.backend.step import DeviceState, StepTensors
from minisgl_fast.progress import Progress

# Keys gathered at once: bounds the copy (128 MiB for Qwen3-0.6B in float32) whatever the batch.
MAX_GATHERED_KEYS = 16384
# Sequences share a batch while the shorter ones waste less than half of it; below this many keys
# the waste costs less than another call.
MIN_SPLIT_KEYS = 256


class ReferenceKVCache:
    """Keys and values of all layers."""

    def __init__(self, layers: list[Tensor]) -> None:
        self._layers = layers

    def layer(self, index: int) -> Tensor:
        return self._layers[index]


class ReferenceBackend:
    """``backend.interface.Backend`` for one CPU."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def pick_dtype(self, requested: str, checkpoint: str) -> torch.dtype:
        """The dtype by name; ``auto`` is what this CPU multiplies fastest."""
        if requested == "auto":
            return pick_cpu_dtype()
        dtype: torch.dtype = getattr(torch, requested)
        return dtype

    def prepare(self, shape: ModelShape, progress: Progress) -> None:
        """Nothing: torch is ready for any shape."""

    def allocate_kv(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> ReferenceKVCache:
        shape = (num_pages, page_size, 2, num_kv_heads, head_dim)
        return ReferenceKVCache(
            [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(num_layers)]
        )

    def apply_updates(self, step: StepTensors, state: DeviceState) -> None:
        if len(step.update_slots):
            state.page_table[step.update_slots.long(), step.update_columns.long()] = (
                step.update_pages
            )

    def embed(self, step: StepTensors, state: DeviceState, weight: Tensor) -> Tensor:
        ids = step.input_ids
        if step.num_decode:
            ids = ids.clone()
            decode = ids[: step.num_decode]
            last = state.last_token[step.seq_slots[: step.num_decode].long()]
            torch.where(decode < 0, last, decode, out=decode)
        return F.embedding(ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Of the last dimension; rounded before the weight, as transformers does it."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x, weight.shape, None, eps).mul_(weight)

    def make_matrix(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        *,
        may_fold: bool = False,
    ) -> Matrix:
        return make_matrix(weight, bias, norm)

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """[n, out]: the product."""
        return product(x if matrix.norm is None else self.rms_norm(x, *matrix.norm), matrix)

    def linear_add(self, x: Tensor, matrix: Matrix, residual: Tensor) -> Tensor:
        return self.linear(x, matrix).add_(residual)

    def linear_silu_mul(self, x: Tensor, matrix: Matrix) -> Tensor:
        gate, up = self.linear(x, matrix).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        return self.linear(x, matrix)

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
    ) -> Tensor:
        heads = num_heads, num_kv_heads, head_dim
        qkv = self.linear(x, matrix)
        return self.prepare_qkv(qkv, q_norm, k_norm, eps, rope_table, step, kv_layer, *heads)

    def prepare_qkv(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        rope_table: Tensor,
        step: StepTensors,
        kv_layer: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> Tensor:
        """``qkv`` from the product on; overwrites it."""
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
        if q_norm is not None and k_norm is not None:
            heads[:, :num_heads] = self.rms_norm(heads[:, :num_heads], q_norm, eps)
            keys = heads[:, num_heads:-num_kv_heads]
            keys.copy_(self.rms_norm(keys, k_norm, eps))
        cos, sin = _rotation(step, rope_table, qkv.dtype)
        turned = heads[:, : num_heads + num_kv_heads]
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        turned.mul_(cos).addcmul_(swapped, sin)
        _store(heads[:, num_heads:], step, kv_layer)
        return heads[:, :num_heads]

    def attention(
        self, q: Tensor, kv_layer: Tensor, step: StepTensors, state: DeviceState, scale: float
    ) -> Tensor:
        batches = step.scratch.get("attention")
        if batches is None:
            batches = _make_batches(step, state, kv_layer.shape[1], q.dtype)
            step.scratch["attention"] = batches
        if batches[0].is_whole_step:
            return _attend(q, kv_layer, batches[0], scale)
        out = q.new_empty(step.num_tokens, q.shape[1] * q.shape[2])
        for batch in batches:
            values = _attend(q.index_select(0, batch.q_rows), kv_layer, batch, scale)
            if batch.kept is not None:
                values = values.index_select(0, batch.kept)
            out.index_copy_(0, batch.out_rows, values)
        return out

    def sample(
        self, logits: Tensor, step: StepTensors, state: DeviceState, vocab_limit: int
    ) -> Tensor:
        return sampling.sample(logits, step, state, vocab_limit)

    def reset_counts(
        self, state: DeviceState, slot: int, tokens: array[int], num_prompt: int
    ) -> None:
        sampling.reset_counts(state, slot, tokens, num_prompt)


def pick_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively (AMX, AVX512-BF16, Arm BF16), else float32.

    SmolLM2-135M on a CPU with AMX: bfloat16 decodes 8 sequences twice as fast as float32 and
    prefills four times as fast; emulated, it is slower than float32 in every shape.
    """
    if not torch._C._has_mkldnn:
        native = False
    elif platform.machine() in ("x86_64", "AMD64"):
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if native else torch.float32


def pick_num_threads(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Threads for torch: every core this process may use, a container's CPU quota included.

    One thread too many is far worse than one too few: all threads meet after every operation, and
    then wait for the one that has no core (measured: a decode step of 2 threads on 2 busy cores
    takes 2.5 times as long as with 1 thread).
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_cores = num_cores or 1
    try:
        quota, period = cgroup.read_text().split()
        num_cores = min(num_cores, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max": no quota
        pass
    return max(1, num_cores)


def _rotation(step: StepTensors, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [N, 1, D]; the first half of sin is negated, as rotate_half negates x."""
    rotation: tuple[Tensor, Tensor] | None = step.scratch.get("rotation")
    if rotation is None:
        cos, sin = table.index_select(0, step.positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)
        rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        step.scratch["rotation"] = rotation
    return rotation


def _store(kv: Tensor, step: StepTensors, kv_layer: Tensor) -> None:
    """Write kv [N, 2 * num_kv_heads, head_dim] (keys, then values) to the step's cache slots."""
    where = step.scratch.get("kv_slots")
    if where is None:
        slots = step.kv_slots.long()
        rows = None if bool((slots >= 0).all()) else (slots >= 0).nonzero().flatten()
        where = (slots if rows is None else slots[rows]), rows
        step.scratch["kv_slots"] = where
    slots, rows = where
    if rows is not None:
        kv = kv.index_select(0, rows)
    # A NaN in the cache would reach whoever gets the page next: a masked value counts 0 * NaN.
    kv = kv.nan_to_num_()
    kv_layer.view(-1, *kv.shape[1:]).index_copy_(0, slots, kv)


@dataclass(slots=True)
class _Batch:
    """Sequences that attend in one call: n, padded to q_len new tokens and num_keys keys."""

    num_seqs: int
    q_len: int
    pages: Tensor  # [n * pages of a sequence] int64
    mask: Tensor  # [n, 1, q_len, num_keys] 0 or -inf, in the dtype of q
    q_rows: Tensor  # [n * q_len] token row of each padded row
    out_rows: Tensor  # token row of each kept row
    kept: Tensor | None  # padded rows that are real; None: all
    is_whole_step: bool  # the rows are the step's, in order and without padding


def _make_batches(
    step: StepTensors, state: DeviceState, page_size: int, dtype: torch.dtype
) -> list[_Batch]:
    """Sort sequences by (new tokens, context) and cut where the padding would outgrow the work."""
    starts = step.q_start.tolist()
    lengths = [
        (starts[i + 1] - starts[i], max(context, 1), i)
        for i, context in enumerate(step.context_lens.tolist())
    ]
    if len({q_len for q_len, _, _ in lengths}) > 1 or _is_uneven(lengths):
        lengths.sort(reverse=True)
    groups: list[list[tuple[int, int, int]]] = []
    for item in lengths:
        if not groups or not _fits(groups[-1], item, page_size):
            groups.append([])
        groups[-1].append(item)
    return [_make_batch(step, state, group, len(groups) == 1, page_size, dtype) for group in groups]


def _is_uneven(lengths: list[tuple[int, int, int]]) -> bool:
    contexts = [context for _, context, _ in lengths]
    longest = max(contexts, default=0)
    return len(lengths) * longest > MAX_GATHERED_KEYS or (
        longest > MIN_SPLIT_KEYS and 2 * min(contexts) < longest
    )


def _fits(group: list[tuple[int, int, int]], item: tuple[int, int, int], page_size: int) -> bool:
    longest_q = group[0][0]
    longest = max(context for _, context, _ in group)
    q_len, context, _ = item
    if (q_len == 1) != (longest_q == 1) or 2 * q_len < longest_q:
        return False
    if longest > MIN_SPLIT_KEYS and 2 * context < longest:
        return False
    longest = -(-max(longest, context) // page_size) * page_size
    return (len(group) + 1) * longest <= MAX_GATHERED_KEYS


def _make_batch(
    step: StepTensors,
    state: DeviceState,
    group: list[tuple[int, int, int]],
    is_only: bool,
    page_size: int,
    dtype: torch.dtype,
) -> _Batch:
    q_len = max(item[0] for item in group)
    num_columns = -(-max(item[1] for item in group) // page_size)
    seqs = torch.tensor([item[2] for item in group])
    lengths = torch.tensor([item[0] for item in group]).unsqueeze(1)
    table = state.page_table[step.seq_slots[seqs].long(), :num_columns]
    offsets = torch.arange(q_len)
    rows = step.q_start[seqs].long().unsqueeze(1) + torch.minimum(offsets, lengths - 1)
    is_real = (offsets < lengths).flatten()
    q_rows = rows.flatten()
    limits = step.positions[q_rows].view(len(group), 1, q_len, 1).clamp(min=0)
    visible = torch.arange(num_columns * page_size) <= limits
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    in_order = is_only and len(q_rows) == step.num_tokens and bool(is_real.all())
    if in_order:
        in_order = bool((q_rows == torch.arange(step.num_tokens)).all())
    kept = None if bool(is_real.all()) else is_real.nonzero().flatten()
    return _Batch(
        num_seqs=len(group),
        q_len=q_len,
        pages=table.long().flatten(),
        mask=mask,
        q_rows=q_rows,
        out_rows=q_rows[is_real],
        kept=kept,
        is_whole_step=in_order,
    )


def _attend(q: Tensor, kv_layer: Tensor, batch: _Batch, scale: float) -> Tensor:
    """q [n * q_len, H, D] -> [n * q_len, H * D]."""
    n, q_len = batch.num_seqs, batch.q_len
    _, num_heads, head_dim = q.shape
    num_kv_heads = kv_layer.shape[3]
    kv = kv_layer.view(len(kv_layer), -1).index_select(0, batch.pages)
    kv = kv.view(n, -1, 2, num_kv_heads, head_dim)
    keys, values = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
    if q_len == 1:  # the heads of a group are the rows of one small matrix
        q = q.reshape(n, num_kv_heads, -1, head_dim)
        mask = batch.mask.expand(n, 1, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q, keys, values, mask, scale=scale)
        return out.reshape(n, num_heads * head_dim)
    q = q.reshape(n, q_len, num_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, keys, values, batch.mask, scale=scale, enable_gqa=num_heads != num_kv_heads
    )
    return out.transpose(1, 2).reshape(n * q_len, num_heads * head_dim)
