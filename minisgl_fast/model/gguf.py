"""Weights from a GGUF file, dequantised on load, under transformers' parameter names.

The directory of tensors comes from ``gguf_metadata``; the block formats are decoded by the ``gguf``
package (``pip install 'minisgl_fast[gguf]'``), which plain F32, F16 and BF16 files do not need.

Rules:
- Nothing is yielded before every tensor is checked: known name, known type, inside the file.
- A tensor is decoded in chunks of ``_CHUNK_VALUES`` straight into its final dtype, so the peak is
  the tensor plus a few megabytes, however large the vocabulary is.
- llama.cpp stores q and k of the ``llama`` architecture with the two halves of each head
  interleaved (its rotary embedding turns neighbours); ``_unpermute`` restores the halves that ours
  and transformers' rotate. Other architectures are stored as they are.
- No ``output.weight`` means that the embedding is tied; nothing is yielded for ``lm_head`` then.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from math import prod
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

from minisgl_fast.errors import ConfigError, ModelError
from minisgl_fast.model.gguf_metadata import ARCHITECTURES, TensorInfo, read_header

if TYPE_CHECKING:
    from minisgl_fast.model.config import ModelConfig

INSTALL_HINT = "pip install 'minisgl_fast[gguf]'"

_CHUNK_VALUES = 1 << 19
_TORCH_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
# ggml type: name, values in a block, bytes of a block.
_BLOCKS = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Rotary frequencies are configuration (``gguf_metadata.config_fields``), not weights.
_NOT_WEIGHTS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")


class _Entry(NamedTuple):
    """One tensor to load; ``num_heads`` is 0 where rows are in the right order already."""

    name: str
    info: TensorInfo
    num_heads: int


def load_tensors(
    path: str | PathLike[str], config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (parameter name, CPU tensor of ``dtype``) for every weight, in the file's order.

    Names and shapes are transformers' (``model.layers.0.self_attn.q_proj.weight`` [out, in]).
    Raises ModelError for a truncated or foreign file, ConfigError when ``gguf`` is not installed.
    """
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path} holds the architecture {architecture!r}; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    if header.metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{path} is one part of a split GGUF; join the parts first with "
            "llama-gguf-split --merge FIRST_PART OUTPUT."
        )
    try:
        # ACCESS_COPY maps the file privately: torch takes only writable buffers without a warning.
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path}: {error}.") from error
    heads = (config.num_heads, config.num_kv_heads) if architecture == "llama" else (0, 0)
    entries = []
    for name, info in header.tensors.items():
        _check(path, name, info, len(data))
        entry = _entry(path, name, info, *heads)
        if entry is not None:
            entries.append(entry)
    if any(entry.info.ggml_type in _BLOCKS for entry in entries):
        _import_gguf()
    return _load(data, entries, dtype)


def _load(
    data: mmap.mmap, entries: list[_Entry], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, info, num_heads in entries:
        tensor = torch.empty(prod(info.shape), dtype=dtype)
        if info.ggml_type in _TORCH_TYPES:
            source = _TORCH_TYPES[info.ggml_type]
            tensor.copy_(
                torch.frombuffer(data, dtype=source, count=len(tensor), offset=info.offset)
            )
        else:
            _dequantize(data, info, tensor)
        tensor = tensor.view(info.shape)
        yield name, _unpermute(tensor, num_heads) if num_heads else tensor


def _dequantize(data: mmap.mmap, info: TensorInfo, out: torch.Tensor) -> None:
    """Decode the blocks of one tensor into ``out`` [values]."""
    import numpy

    gguf = _import_gguf()
    type_name, block_values, block_bytes = _BLOCKS[info.ggml_type]
    ggml_type = gguf.GGMLQuantizationType[type_name]
    num_blocks = out.numel() // block_values
    step = _CHUNK_VALUES // block_values
    for first in range(0, num_blocks, step):
        count = min(step, num_blocks - first)
        blocks = numpy.frombuffer(
            data, numpy.uint8, count * block_bytes, info.offset + first * block_bytes
        )
        # One row: gguf decodes 16 rows a turn in Python, and blocks know nothing of rows.
        values = gguf.quants.dequantize(blocks.reshape(1, -1), ggml_type)
        start = first * block_values
        out[start : start + count * block_values] = torch.from_numpy(values.reshape(-1))


def _unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[heads * (pair, half), ...] back to [heads * (half, pair), ...]."""
    pairs = tensor.view(num_heads, tensor.shape[0] // num_heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _entry(
    path: str | PathLike[str], name: str, info: TensorInfo, num_heads: int, num_kv_heads: int
) -> _Entry | None:
    if name in _OUTER_NAMES:
        return _Entry(_OUTER_NAMES[name], info, 0)
    if _NOT_WEIGHTS.fullmatch(name):
        return None
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ModelError(f"{path} holds the tensor {name!r}, which no supported model has.")
    permuted_heads = {"attn_q": num_heads, "attn_k": num_kv_heads}.get(match[2], 0)
    if permuted_heads and info.shape[0] % (2 * permuted_heads):
        raise ModelError(
            f"{path}: the {info.shape[0]} rows of {name!r} do not divide into "
            f"{permuted_heads} heads of even size."
        )
    return _Entry(
        f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}", info, permuted_heads
    )


def _check(path: str | PathLike[str], name: str, info: TensorInfo, num_file_bytes: int) -> None:
    """The type is one that can be decoded and the data lies inside the file."""
    if info.ggml_type in _TORCH_TYPES:
        block_values, block_bytes = 1, _TORCH_TYPES[info.ggml_type].itemsize
    elif info.ggml_type in _BLOCKS:
        _, block_values, block_bytes = _BLOCKS[info.ggml_type]
    else:
        supported = ", ".join(["F32", "F16", "BF16", *(block[0] for block in _BLOCKS.values())])
        raise ModelError(
            f"{path}: tensor {name!r} is stored as ggml type {info.ggml_type}; "
            f"supported are {supported}."
        )
    if not info.shape or not all(info.shape) or info.shape[-1] % block_values:
        raise ModelError(f"{path}: tensor {name!r} has the impossible shape {list(info.shape)}.")
    end = info.offset + prod(info.shape) // block_values * block_bytes
    if end > num_file_bytes:
        raise ModelError(
            f"{path} is truncated: tensor {name!r} ends at byte {end}, the file has "
            f"{num_file_bytes}; download it again."
        )


def _import_gguf() -> ModuleType:
    """The gguf package, imported late because most models do not need it."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"Reading a quantised GGUF file needs the gguf package: {INSTALL_HINT}"
        ) from error
    return gguf
