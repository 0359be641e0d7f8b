"""Prefill attention on the GPU: picks the kernel for the device and launches it.

Every sequence from ``first_seq`` on takes part, whatever its number of new tokens (also one);
cached prefixes and chunks need nothing special, since keys and values come from the pages alone.
Nothing here waits for the device: launch sizes come from numbers that the host knows anyway, and
the work list is made on the device (``kernels/prefill_tiles.cuh``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minisgl_fast.backend.kernel import Kernel, get_kernel
from minisgl_fast.backend.kernels_table import ATTENTION_PREFILL, ATTENTION_PREFILL_SM90
from minisgl_fast.backend.kv_layout import HALF

MAX_GROUP = 16  # query heads that share a kv head

ROWS = 128  # packed rows (token, query head of the group) of a tile, in both kernels
MMA_BLOCK = 256
MMA_KEYS = 64
WGMMA_BLOCK = 384
WGMMA_KEYS = 128

# Splitting the keys of a tile over several blocks: at most so often, at least so many keys each.
MAX_SPLITS = 32
MIN_SPLIT_KEYS = 512
# Beside a large batch of decodes, whose stream hides the tiles, but not the joining kernel.
MIN_SPLIT_KEYS_BESIDE = 4096
LARGE_BATCH = 16
COMBINE_BLOCK = 512


class PrefillLoad(NamedTuple):
    """What a launch takes, for whoever runs beside it."""

    num_sms: int  # that it takes whole; 0: others fit beside its blocks
    num_keys: int  # at most, that one of its blocks goes through


class PrefillAttention:
    """The prefill kernel of one model shape on torch's current device.

    ``wgmma`` picks the Hopper kernel; by default where the device is a Hopper. Launches share a
    counter and a buffer for partial results, so they must follow one another on one stream.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, *, wgmma: bool | None = None
    ) -> None:
        if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
            raise ValueError(f"{num_heads} heads over {num_kv_heads} kv heads: groups of 1 to 16")
        if head_dim not in (64, 128):
            raise ValueError(f"head_dim {head_dim}: 64 or 128")
        self._num_kv_heads = num_kv_heads
        self._group = num_heads // num_kv_heads
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        if wgmma is None:
            wgmma = (properties.major, properties.minor) == (9, 0)
        halves = head_dim // HALF
        self._kernel: Kernel
        self._combine: Kernel | None = None
        if not wgmma:
            self._shared_bytes = 4 * MMA_KEYS * head_dim * 2
            spec = ATTENTION_PREFILL[halves - 1]
            self._kernel = get_kernel(spec, "attention_prefill", self._shared_bytes)
            return
        # Two stages of K and V, two buffers of Q, barriers.
        self._shared_bytes = (4 * WGMMA_KEYS + 2 * ROWS) * head_dim * 2 + 1024
        spec = ATTENTION_PREFILL_SM90[halves - 1]
        self._kernel = get_kernel(spec, "attention_prefill_sm90", self._shared_bytes)
        self._combine = get_kernel(spec, "attention_prefill_combine")
        self._num_blocks = properties.multi_processor_count
        self._workspace = torch.zeros(2, dtype=torch.int32, device=device)
        # O of every row, and the logarithm of its sum, of as many parts as there are blocks.
        size = self._num_blocks * ROWS * (head_dim + 1)
        self._partials = torch.empty(size, dtype=torch.float32, device=device)

    def launch(
        self,
        q: Tensor,
        kv_layer: Tensor,
        out: Tensor,
        q_start: Tensor,
        context_lens: Tensor,
        seq_slots: Tensor,
        page_table: Tensor,
        *,
        first_seq: int,
        num_seqs: int,
        num_tokens: int,
        max_context: int,
        scale: float,
    ) -> PrefillLoad | None:
        """Enqueue attention of sequences first_seq .. first_seq + num_seqs - 1 of a step.

        q [all tokens of the step, num_heads, head_dim] and out [all tokens, num_heads * head_dim]
        bfloat16, contiguous; kv_layer in the layout of ``kv_layout.py``; q_start [>= first_seq +
        num_seqs + 1], context_lens, seq_slots, page_table [slots, pages] int32. ``num_tokens``: at
        least the tokens of these sequences; ``max_context``: the longest of their contexts, or 0 to
        keep every tile in one block. Rows of other sequences are not touched.

        Returns None where there is nothing to do.
        """
        if num_seqs == 0 or num_tokens == 0:
            return None
        # A sum of ceilings is at most this floor.
        row_tiles = (num_tokens * self._group + num_seqs * (ROWS - 1)) // ROWS
        tiles = row_tiles * self._num_kv_heads
        tensors = (q, kv_layer, out, q_start, context_lens, seq_slots, page_table)
        pointers = tuple(tensor.data_ptr() for tensor in tensors)
        sequences = (first_seq, num_seqs, self._num_kv_heads, self._group)
        layout = (page_table.stride(0), kv_layer.shape[-2], scale)
        if self._combine is None:
            arguments = (*pointers, *sequences, *layout)
            self._kernel.launch((tiles,), MMA_BLOCK, arguments, self._shared_bytes, pdl=True)
            return PrefillLoad(0, max_context)
        min_keys = MIN_SPLIT_KEYS if first_seq < LARGE_BATCH else MIN_SPLIT_KEYS_BESIDE
        num_splits = min(self._num_blocks // tiles, max_context // min_keys, MAX_SPLITS)
        num_splits = max(num_splits, 1)
        num_blocks = min(tiles * num_splits, self._num_blocks)
        buffers = (self._workspace.data_ptr(), self._partials.data_ptr())
        self._kernel.launch(
            (num_blocks,),
            WGMMA_BLOCK,
            (*pointers, *buffers, *sequences, num_splits, *layout),
            self._shared_bytes,
            pdl=True,
        )
        if num_splits > 1:
            self._combine.launch(
                (tiles,),
                COMBINE_BLOCK,
                (buffers[1], *pointers[2:5], *sequences, num_splits),
                pdl=True,
            )
        return PrefillLoad(num_blocks, max_context // num_splits)
