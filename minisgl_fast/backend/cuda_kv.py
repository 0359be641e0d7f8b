"""The fused QK-norm, RoPE and KV write on the GPU: the wrapper of ``kernels/kv_store.cu``."""

from __future__ import annotations

import torch

from minisgl_fast.backend.kernel import get_kernel
from minisgl_fast.errors import ConfigError

THREADS = 128
ITERATIONS = 4  # heads a thread takes at most
FEW_TOKENS = 1024  # up to here each head gets threads of its own


class KvStore:
    """Prepares q and writes k and v into the pages, for one model's head shape."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *, qk_norm: bool
    ) -> None:
        if head_dim not in (64, 128):
            raise ConfigError(f"head_dim {head_dim}: the CUDA kernels have 64 and 128")
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._page_shift = page_size.bit_length() - 1
        heads_per_pass = THREADS * 8 // head_dim
        self._num_passes = -(-(num_heads + 2 * num_kv_heads) // heads_per_pass)
        self._kernel = get_kernel(
            f"kv_store_d{head_dim}" + ("_norm" if qk_norm else ""), "kv_store"
        )

    def __call__(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        rope_table: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        q_out: torch.Tensor,
        kv_layer: torch.Tensor,
        num_tokens: int,
        pdl: bool = False,
        rows: torch.Tensor | None = None,
        rows_eps: float = 0.0,
        bias: torch.Tensor | None = None,
    ) -> None:
        """qkv [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] bf16 to ``q_out`` and pages.

        ``rope_table`` float32 [max_position, head_dim], cos then sin; ``positions`` and
        ``kv_slots`` int32 [num_tokens], slot -1 writes nothing. ``q_norm`` and ``k_norm``
        [head_dim] bf16 if the model has them. ``rows`` [num_tokens, hidden] bf16: qkv is their
        product before their norm, which is then done here, and ``bias`` (of a row of qkv) added.
        """
        num_blocks = self._num_passes
        if num_tokens > FEW_TOKENS:
            num_blocks = -(-num_blocks // ITERATIONS)
        self._kernel.launch(
            (num_tokens, num_blocks),
            THREADS,
            (
                qkv.data_ptr(),
                q_norm.data_ptr() if q_norm is not None else 0,
                k_norm.data_ptr() if k_norm is not None else 0,
                rope_table.data_ptr(),
                positions.data_ptr(),
                kv_slots.data_ptr(),
                q_out.data_ptr(),
                kv_layer.data_ptr(),
                rows.data_ptr() if rows is not None else 0,
                bias.data_ptr() if bias is not None else 0,
                self._num_heads,
                self._num_kv_heads,
                self._page_shift,
                rows.shape[1] if rows is not None else 0,
                eps,
                rows_eps,
            ),
            pdl=pdl,
        )
