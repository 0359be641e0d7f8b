"""Decode attention on the GPU: the wrapper of ``kernels/attention_decode.cu``.

Sizes the fixed grid, its shared memory and its workspace once; a call is then one launch whose
arguments are fixed addresses, so it may be captured in a CUDA graph for any batch and any lengths.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from minisgl_fast.backend.cuda_prefill import PrefillLoad
from minisgl_fast.backend.kernel import UNWRITTEN, Kernel, get_kernel
from minisgl_fast.backend.kernels_table import DECODE_CLUSTERS
from minisgl_fast.errors import ConfigError

HEADS = 8  # query heads in one tile of the kernel
TILE = 64  # tokens
MAX_GROUP = 16
LOG2E = math.log2(math.e)
# Of sequences and key heads, for each of DECODE_CLUSTERS: where it was fastest on an H200. Up to 64
# one block an SM, with many bytes in flight: two an SM wait longer for room for a whole cluster.
MAX_PAIRS = (8, 16, 64, 128)
# Beside prefill attention, the blocks that do not find room begin late, so they get less to do: by
# what the others read in the meantime. All measured on an H200, with head_dim 128.
LATE_US = 15.0
LATE_US_PER_KEY = 0.03  # of those that a block of prefill attention goes through
TILES_PER_US = 136.0
MAX_TILES_PER_US = 1.2  # one block, however few there are


class NewTokens(NamedTuple):
    """The product of a layer with W_qkv, and what makes queries, keys and values of it.

    ``qkv`` [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] bf16; ``q_norm`` and ``k_norm``
    [head_dim] if the model has them; ``rope_table`` float32 [max_position, head_dim], cos then sin.
    With ``rows`` [num_tokens, hidden] qkv is still to be scaled by their 1 / rms, and ``bias`` (of
    a row of qkv) to be added.
    """

    qkv: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    rope_table: torch.Tensor
    rows: torch.Tensor | None = None
    rows_eps: float = 0.0
    bias: torch.Tensor | None = None


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Launch(NamedTuple):
    kernel: Kernel
    cluster: int
    num_blocks: int
    shared_bytes: int


class _Late(NamedTuple):
    num_early: int  # blocks; the others begin late
    delay: int  # tiles that each of those has less than the early ones


class DecodeAttention:
    """Attention of one new token a sequence over the pages; one instance serves all layers.

    Not for two streams at once: the workspace is shared by all its launches.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int) -> None:
        group, rest = divmod(num_heads, num_kv_heads)
        if rest or not 1 <= group <= MAX_GROUP or head_dim not in (64, 128):
            raise ConfigError(
                f"decode attention has no kernel for {num_heads} query heads, {num_kv_heads} key "
                f"heads of {head_dim}: it needs head_dim 64 or 128 and at most {MAX_GROUP} query "
                "heads to a key head"
            )
        if page_size not in (16, 32, 64, 128, 256):
            raise ConfigError(f"page size {page_size}: must be 16, 32, 64, 128 or 256")
        head_tiles = -(-group // HEADS)
        self._num_kv_heads = num_kv_heads
        self._group = group
        self._head_dim = head_dim
        self._page_shift = page_size.bit_length() - 1
        device = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(device)
        block, num_stages, blocks_per_sm, has_clusters = _configuration(
            properties.major, properties.minor
        )
        self._block = block
        self._num_sms = properties.multi_processor_count
        num_blocks = self._num_sms * blocks_per_sm
        name = f"attention_decode_d{head_dim}_n{head_tiles}"
        # The same bytes in flight for both head sizes.
        shared_bytes = num_stages * TILE * 128 * 4
        kernel = get_kernel(name, "attention_decode", shared_bytes)
        self._alone = _Launch(kernel, 1, num_blocks, shared_bytes)
        self._clusters: list[tuple[int, _Launch]] = []  # up to so many pairs
        if has_clusters and head_tiles == 1:
            self._clusters = [
                (pairs, self._make_cluster(name, *cluster, num_blocks))
                for pairs, cluster in zip(MAX_PAIRS, DECODE_CLUSTERS, strict=True)
            ]
        floats = 2 * num_blocks * head_tiles * HEADS * (head_dim + 2)
        self._partials = torch.full((floats,), UNWRITTEN, dtype=torch.int32, device=device)

    def _make_cluster(self, name: str, cluster: int, num_stages: int, num_blocks: int) -> _Launch:
        part_bytes = self._group * (self._head_dim + 2) * 4
        shared_bytes = num_stages * TILE * 128 * 4 + (cluster - 1) * part_bytes
        kernel = get_kernel(f"{name}_c{cluster}_s{num_stages}", "attention_decode", shared_bytes)
        # They lie within a GPC, so not all SMs may find one.
        most = kernel.max_clusters(cluster, self._block, shared_bytes)
        num_clusters = num_blocks // cluster if most is None else min(num_blocks // cluster, most)
        return _Launch(kernel, cluster, num_clusters * cluster, shared_bytes)

    def _pick(self, num_seqs: int, prefill: PrefillLoad | None) -> tuple[_Launch, bool, _Late]:
        """The launch for so many sequences, whether each pair of a sequence and a key head may have
        a cluster of its own, and how late blocks begin.

        Numbers are rounded up to powers of two, so that the sequences that pad a graph change
        nothing.
        """
        num_pairs = (1 << (num_seqs - 1).bit_length()) * self._num_kv_heads
        if prefill is None:
            for max_pairs, launch in self._clusters:
                if num_pairs <= min(max_pairs, launch.num_blocks // launch.cluster):
                    return launch, True, _Late(launch.num_blocks, 0)
        late = self._late(prefill)
        return self._alone, num_pairs <= late.num_early, late

    def _late(self, prefill: PrefillLoad | None) -> _Late:
        num_blocks = self._alone.num_blocks
        if prefill is None or not 0 < prefill.num_sms < self._num_sms:
            return _Late(num_blocks, 0)
        num_early = num_blocks // self._num_sms * (self._num_sms - prefill.num_sms)
        late_us = LATE_US + LATE_US_PER_KEY * prefill.num_keys
        tiles_per_us = min(TILES_PER_US / num_early, MAX_TILES_PER_US) * (128 / self._head_dim)
        return _Late(num_early, int(late_us * tiles_per_us))

    def __call__(
        self,
        new: NewTokens,
        kv_layer: torch.Tensor,
        out: torch.Tensor,
        context_lens: torch.Tensor,
        seq_slots: torch.Tensor,
        page_table: torch.Tensor,
        num_seqs: int,
        scale: float,
        pdl: bool = False,
        prefill: PrefillLoad | None = None,
    ) -> None:
        """Write rows 0 .. num_seqs - 1 of ``out`` [.., num_heads * head_dim] from those of ``new``,
        whose keys and values go to ``kv_layer``.

        ``kv_layer`` as in kv_layout.py; ``context_lens`` (this step's tokens included) and
        ``seq_slots`` int32 [num_seqs]; ``page_table`` int32 [slots, columns]. All contiguous.
        Length 0 gives a row of zeros. ``prefill``: the launch before this one is that of
        PrefillAttention, which returned this, behind the one that wrote ``new``; the two overlap.
        """
        if num_seqs == 0:
            return
        launch, may_be_even, late = self._pick(num_seqs, prefill)
        launch.kernel.launch(
            (launch.num_blocks,),
            self._block,
            (
                new.qkv.data_ptr(),
                kv_layer.data_ptr(),
                out.data_ptr(),
                context_lens.data_ptr(),
                seq_slots.data_ptr(),
                page_table.data_ptr(),
                self._partials.data_ptr(),
                _pointer(new.q_norm),
                _pointer(new.k_norm),
                new.rope_table.data_ptr(),
                _pointer(new.rows),
                _pointer(new.bias),
                num_seqs,
                self._num_kv_heads,
                self._group,
                page_table.stride(0),
                self._page_shift,
                0 if new.rows is None else new.rows.shape[1],
                scale * LOG2E,
                new.eps,
                new.rows_eps,
                int(prefill is not None),
                int(may_be_even),
                *late,
            ),
            launch.shared_bytes,
            pdl,
        )


def _configuration(major: int, minor: int) -> tuple[int, int, int, bool]:
    """(threads, stages at head_dim 128, blocks an SM, whether clusters have kernels), as
    attention_decode.cu and kernels_table.py have them by arch."""
    if major in (9, 10, 11):
        return 192, 3, 2, (major, minor) in ((9, 0), (10, 0))
    if (major, minor) in ((8, 0), (8, 7)):
        return 128, 2, 2, False
    return (192 if major >= 9 else 128), 2, 1, False
