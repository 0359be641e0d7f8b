"""The table of everything that NVRTC compiles: one KernelSpec per translation unit and variant.

Whoever adds a file to ``kernels/`` adds its variants here, in a tuple of its own that ``SPECS``
joins. ``python -m minisgl_fast.backend.compile --all`` then compiles them for every architecture,
and fails on an error, or on a register spill in a hot one. Pure data: no torch, no CuPy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What the package promises to compile for. A device is always given its exact architecture.
ALL_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One source file with one set of ``-D`` constants, compiled to one cubin.

    ``entries`` are its ``extern "C" __global__`` functions. ``hot`` ones may not spill registers.
    ``only`` limits a variant to some architectures (wgmma: sm_90a).
    """

    name: str
    source: str
    entries: tuple[str, ...]
    defines: tuple[tuple[str, int], ...] = field(default=())
    only: tuple[str, ...] = ()
    hot: bool = True

    def serves(self, arch: str) -> bool:
        """Whether this variant is meant for ``arch``."""
        return not self.only or arch in self.only


KV_STORE = tuple(
    KernelSpec(
        name=f"kv_store_d{head_dim}" + ("_norm" if qk_norm else ""),
        source="kv_store.cu",
        entries=("kv_store",),
        defines=(("HEAD_DIM", head_dim), ("QK_NORM", qk_norm)),
    )
    for head_dim in (64, 128)
    for qk_norm in (0, 1)
)

# Where an SM has 228 KB, clusters whose blocks share a (sequence, kv head) pair: how many blocks,
# and stages (of 32 KB) of each.
DECODE_CLUSTERS = ((8, 4), (4, 4), (2, 4), (2, 2))
ATTENTION_DECODE = tuple(
    KernelSpec(
        name=f"attention_decode_d{head_dim}_n{head_tiles}" + (f"_c{cluster}_s{ring}" * bool(ring)),
        source="attention_decode.cu",
        entries=("attention_decode",),
        defines=(
            ("HEAD_DIM", head_dim),
            ("HEAD_TILES", head_tiles),
            ("CLUSTER", cluster),
            ("RING", ring),
        ),
        only=("sm_90a", "sm_100") if ring else (),
    )
    for head_dim in (64, 128)
    for head_tiles, clusters in ((1, ((1, 0), *DECODE_CLUSTERS)), (2, ((1, 0),)))
    for cluster, ring in clusters
)

# Index 0 is head_dim 64, index 1 is 128. The first serves every device, the second is Hopper's.
ATTENTION_PREFILL = tuple(
    KernelSpec(
        name=f"attention_prefill_d{head_dim}",
        source="attention_prefill.cu",
        entries=("attention_prefill",),
        defines=(("HEAD_DIM", head_dim),),
    )
    for head_dim in (64, 128)
)

ATTENTION_PREFILL_SM90 = tuple(
    KernelSpec(
        name=f"attention_prefill_sm90_d{head_dim}",
        source="attention_prefill_sm90.cu",
        entries=("attention_prefill_sm90", "attention_prefill_combine"),
        defines=(("HEAD_DIM", head_dim),),
        only=("sm_90a",),
    )
    for head_dim in (64, 128)
)

STEP = (
    KernelSpec("step", "step.cu", ("copy_ranges", "apply_updates", "embed", "reset_counts")),
    KernelSpec("rms_norm", "rms_norm.cu", ("rms_norm", "add_rms_norm")),
    KernelSpec("silu_mul", "silu_mul.cu", ("silu_mul",)),
)

# Blocks that share a row: more where there are few rows (clusters: sm_90 and newer). The model's
# logits are bfloat16; the float32 variant is for callers that have other ones.
SAMPLE_CLUSTERS = (1, 2, 4, 8)

SAMPLE = tuple(
    KernelSpec(
        name=f"sample_{dtype}" + (f"_cluster{cluster}" if cluster > 1 else ""),
        source="sample.cu",
        entries=("sample",),
        defines=(("LOGIT_FLOAT", int(dtype == "float32")), ("CLUSTER", cluster)),
        only=("sm_90a", "sm_100", "sm_120") if cluster > 1 else (),
        hot=dtype == "bf16",
    )
    for dtype, clusters in (("bf16", SAMPLE_CLUSTERS), ("float32", (1,)))
    for cluster in clusters
)

GEMM_SMALL = tuple(
    KernelSpec(
        name=f"gemm_small_r{row_tiles}_n{n_tiles}_c{cluster}",
        source="gemm_small.cu",
        entries=("gemm_small",),
        defines=(("ROW_TILES", row_tiles), ("N_TILES", n_tiles), ("CLUSTER", cluster)),
        only=("sm_90a", "sm_100", "sm_120") if cluster > 1 else (),
    )
    for row_tiles in (1, 2)
    for n_tiles in (1, 2, 4)
    for cluster in (1, 2, 4, 8)
)

# Rows of x that there is room for, and how W is cut: (gated, warpgroups, blocks that share K).
GEMM_WIDE_CUTS = {
    **dict.fromkeys((16, 32), ((0, 1, 1), (0, 2, 2), (0, 2, 3), (1, 2, 1))),
    64: ((0, 1, 1), (0, 1, 2), (0, 1, 4), (0, 1, 8), (0, 2, 2), (0, 2, 3), (1, 2, 1)),
}

GEMM_WIDE = tuple(
    KernelSpec(
        name=f"gemm_wide_c{columns}_w{warpgroups}_k{split}" + ("_gated" if gated else ""),
        source="gemm_wide.cu",
        entries=("gemm_wide",),
        defines=(
            ("COLUMNS", columns),
            ("GATED", gated),
            ("WARPGROUPS", warpgroups),
            ("SPLIT", split),
        ),
        only=("sm_90a",),
    )
    for columns, cuts in GEMM_WIDE_CUTS.items()
    for gated, warpgroups, split in cuts
)

# Joined here, one line a section: ``*ATTENTION_DECODE,`` and so on.
SPECS: tuple[KernelSpec, ...] = (
    *KV_STORE,
    *ATTENTION_DECODE,
    *ATTENTION_PREFILL,
    *ATTENTION_PREFILL_SM90,
    *STEP,
    *SAMPLE,
    *GEMM_SMALL,
    *GEMM_WIDE,
)


def find_spec(name: str) -> KernelSpec:
    """The spec called ``name``; KeyError if the table has none."""
    for spec in SPECS:
        if spec.name == name:
            return spec
    raise KeyError(name)
