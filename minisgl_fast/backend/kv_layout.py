"""The layout of KV pages on the GPU, and its inverse for tests and debugging.

One layer is ``kv[page][kv_head][K|V][half][row in page][64 dims]``: head-major, a half is 64 dims,
and the eight 16-byte chunks of a row lie at ``chunk ^ (row & 7)``. That is the 128-byte swizzle of
shared memory, so the kernels copy blocks linearly and read them without bank conflicts. Only
``kv_store.cu`` writes pages and only the attention kernels read them.
"""

from __future__ import annotations

import torch

CHUNK = 8  # elements of 2 bytes in 16 bytes
HALF = 64  # dims in a 128-byte row


def layer_shape(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int
) -> tuple[int, int, int, int, int, int]:
    """Shape of one layer's pages. ``head_dim`` is 64 or 128, ``page_size`` 16, 32 .. 256."""
    return (num_pages, num_kv_heads, 2, head_dim // HALF, page_size, HALF)


def swizzle(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Pages in our layout of k and v [num_pages, page_size, num_kv_heads, head_dim] (2-byte)."""
    num_pages, page_size, num_kv_heads, head_dim = k.shape
    rows = torch.stack((k, v), dim=3)  # page, row, head, K|V, dim
    rows = rows.view(num_pages, page_size, num_kv_heads, 2, head_dim // HALF, HALF)
    return _exchange(rows.permute(0, 2, 3, 4, 1, 5).contiguous())


def deswizzle(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, v), each [num_pages, page_size, num_kv_heads, head_dim], of one layer's pages."""
    num_pages, num_kv_heads, _, num_halves, page_size, _ = kv.shape
    rows = _exchange(kv).permute(2, 0, 4, 1, 3, 5)  # K|V, page, row, head, half, dim
    flat = rows.reshape(2, num_pages, page_size, num_kv_heads, num_halves * HALF)
    return flat[0], flat[1]


def _exchange(kv: torch.Tensor) -> torch.Tensor:
    """Move chunk c of every row r to chunk c ^ (r & 7); its own inverse."""
    page_size = kv.shape[-2]
    row = torch.arange(page_size, device=kv.device)[:, None]
    chunk = torch.arange(HALF // CHUNK, device=kv.device)[None, :] ^ (row & 7)
    chunks = kv.view(*kv.shape[:-1], HALF // CHUNK, CHUNK)
    return chunks[..., row, chunk, :].reshape(kv.shape)
