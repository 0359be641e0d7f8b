"""Weights of a decoder: from safetensors or GGUF files, checked against the configuration.

Rules:
- The configuration says which tensors there must be and of what shape; a tensor that is missing,
  foreign, misshapen or not floating-point is a ``ModelError`` of one line, before anything runs.
- q, k and v are joined at load into one matrix, gate and up into another: each lands in its rows of
  the joined matrix straight from the file, converted to the run's dtype, so nothing is held twice.
- A checkpoint with tied embeddings may store ``lm_head.weight`` all the same; its shape is checked
  and it is ignored, as transformers does.
- Only safetensors and GGUF: formats that cannot run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisgl_fast.errors import ModelError
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.progress import Progress, silent

INDEX_NAME = "model.safetensors.index.json"
# What older checkpoints store beside the weights: buffers that follow from the configuration.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True)
class LayerWeights:
    """One layer. H = num_heads, K = num_kv_heads, D = head_dim; matrices are [out, in]."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(H + 2 K) * D, hidden]: q, then k, then v
    qkv_bias: Tensor | None  # [(H + 2 K) * D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    output: Tensor  # [hidden, H * D]
    output_bias: Tensor | None  # [hidden]
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]: gate, then up
    down: Tensor  # [hidden, intermediate]


@dataclass(slots=True)
class ModelWeights:
    """All of a decoder; ``lm_head`` is ``embed_tokens`` where they are tied."""

    embed_tokens: Tensor  # [vocab, hidden]
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab, hidden]
    layers: list[LayerWeights] = field(default_factory=list)

    def take_layers(self) -> Iterator[LayerWeights]:
        """Hand the layers over one by one, keeping none."""
        self.layers.reverse()
        while self.layers:
            yield self.layers.pop()


def load_weights(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
) -> ModelWeights:
    """Load a folder of safetensors or a ``.gguf`` file as ``dtype`` on ``device``."""
    path = Path(path)
    try:
        weights, slots = _allocate(config, dtype, device)
    except (RuntimeError, MemoryError):
        raise ModelError(f"{path}: no memory for weights of this configuration.") from None
    total = len(slots)
    if path.suffix == ".gguf":
        from minisgl_fast.model.gguf import load_tensors

        tensors = load_tensors(path, config, dtype)
    else:
        tensors = _read_safetensors(path)
    if config.tie_word_embeddings:
        slots["lm_head.weight"] = torch.empty(weights.embed_tokens.shape, device="meta")
    done = 0
    progress("Loading weights", done, total)
    for name, tensor in tensors:
        slot = slots.pop(name, None)
        if slot is None:
            if name.endswith(IGNORED_SUFFIXES):
                continue
            raise ModelError(
                f"{path}: {config.architecture} has no tensor {name!r} (or it is twice)."
            )
        if tensor.shape != slot.shape:
            raise ModelError(
                f"{path}: {name} has shape {list(tensor.shape)}, "
                f"the configuration says {list(slot.shape)}."
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise ModelError(f"{path}: {name} is stored as {tensor.dtype}, not as plain floats.")
        if not slot.is_meta:
            slot.copy_(tensor)
            done += 1
            progress("Loading weights", done, total)
    if config.tie_word_embeddings:
        slots.pop("lm_head.weight", None)
    if slots:
        raise ModelError(f"{path}: missing from the checkpoint: {_list_names(list(slots))}.")
    return weights


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> ModelWeights:
    """Random weights of the right shapes, for measurements without a checkpoint.

    Scaled so that activations stay of order one in any depth and the layers outweigh the embedding;
    otherwise a model with tied embeddings would repeat its last token for ever.
    """
    weights, slots = _allocate(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, slot in slots.items():
        if name.endswith("norm.weight"):
            slot.fill_(1.0)
        elif slot.dim() == 1:
            slot.zero_()
        else:
            deviation = 0.02 if "embed_tokens" in name else 1.0 / math.sqrt(slot.shape[1])
            slot.normal_(0.0, deviation, generator=generator)
    return weights


def _allocate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[ModelWeights, dict[str, Tensor]]:
    """Memory for all weights, and for each tensor name of a checkpoint the view it fills."""
    slots: dict[str, Tensor] = {}

    def new(name: str, *shape: int) -> Tensor:
        slots[name] = torch.empty(shape, dtype=dtype, device=device)
        return slots[name]

    def joined(names: tuple[str, ...], sizes: tuple[int, ...], *rest: int) -> Tensor:
        whole = torch.empty((sum(sizes), *rest), dtype=dtype, device=device)
        slots.update(zip(names, torch.split(whole, list(sizes)), strict=True))
        return whole

    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embed_tokens = new("model.embed_tokens.weight", config.vocab_size, hidden)
    weights = ModelWeights(
        embed_tokens=embed_tokens,
        norm=new("model.norm.weight", hidden),
        lm_head=embed_tokens
        if config.tie_word_embeddings
        else new("lm_head.weight", config.vocab_size, hidden),
    )
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv_names = tuple(f"{attention}{letter}_proj." for letter in "qkv")
        qkv_sizes = (query, key, key)
        gate_up_names = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
        qkv_bias = (
            joined(tuple(f"{name}bias" for name in qkv_names), qkv_sizes)
            if config.attention_bias
            else None
        )
        weights.layers.append(
            LayerWeights(
                input_norm=new(f"{prefix}input_layernorm.weight", hidden),
                qkv=joined(tuple(f"{name}weight" for name in qkv_names), qkv_sizes, hidden),
                qkv_bias=qkv_bias,
                q_norm=new(f"{attention}q_norm.weight", config.head_dim)
                if config.qk_norm
                else None,
                k_norm=new(f"{attention}k_norm.weight", config.head_dim)
                if config.qk_norm
                else None,
                output=new(f"{attention}o_proj.weight", hidden, query),
                output_bias=new(f"{attention}o_proj.bias", hidden) if config.output_bias else None,
                post_norm=new(f"{prefix}post_attention_layernorm.weight", hidden),
                gate_up=joined(gate_up_names, (intermediate, intermediate), hidden),
                down=new(f"{mlp}down_proj.weight", hidden, intermediate),
            )
        )
    return weights, slots


def _read_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, file by file, straight from the page cache."""
    with ExitStack() as stack:
        for file in _safetensors_files(folder):
            try:
                reader = stack.enter_context(safe_open(file, framework="pt"))
                for name in reader.keys():  # noqa: SIM118 - not a dict
                    yield name, reader.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file}: truncated or not a safetensors file; download it again ({error})."
                ) from None


def _safetensors_files(folder: Path) -> list[Path]:
    """The files of a checkpoint: ``model.safetensors``, or those that its index names."""
    single, index = folder / "model.safetensors", folder / INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        hint = ""
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            hint = "; pickled checkpoints (.bin, .pth) are not read, convert them to safetensors"
        raise ModelError(f"{folder}: neither model.safetensors nor {INDEX_NAME} found{hint}.")
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{index}: not an index of safetensors files.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ModelError(f"{index}: {name!r} is not a file name.")
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is named by {INDEX_NAME} but missing.")
    return [folder / name for name in sorted(names)]


def _list_names(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
