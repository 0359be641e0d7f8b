"""GGUF files of tiny models, written by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 4, 2, 16, 64, 96, 2, 40
F32 = gguf.GGMLQuantizationType.F32


def write_gguf(
    path: Path,
    architecture: str,
    tensors: dict[str, tuple[numpy.ndarray, gguf.GGMLQuantizationType]],
    head_dim: int = HEAD_DIM,
    **extra: Any,
) -> Path:
    """A GGUF file of the test's tiny dimensions with these (raw data, type) tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_eos_token_id(7)
    for key, value in extra.items():
        writer.add_key_value(key.replace("__", "."), *value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_tensors(
    architecture: str, *, tied: bool = False, head_dim: int = HEAD_DIM
) -> dict[str, tuple[numpy.ndarray, gguf.GGMLQuantizationType]]:
    """Random float32 tensors under GGUF names, all that the architecture has."""
    random = numpy.random.default_rng(1)

    def new(*shape: int) -> tuple[numpy.ndarray, gguf.GGMLQuantizationType]:
        return random.standard_normal(shape, dtype=numpy.float32), F32

    tensors = {"token_embd.weight": new(VOCAB, HIDDEN), "output_norm.weight": new(HIDDEN)}
    if not tied:
        tensors["output.weight"] = new(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        blk = f"blk.{layer}."
        tensors[f"{blk}attn_norm.weight"] = new(HIDDEN)
        tensors[f"{blk}attn_q.weight"] = new(HEADS * head_dim, HIDDEN)
        tensors[f"{blk}attn_k.weight"] = new(KV_HEADS * head_dim, HIDDEN)
        tensors[f"{blk}attn_v.weight"] = new(KV_HEADS * head_dim, HIDDEN)
        tensors[f"{blk}attn_output.weight"] = new(HIDDEN, HEADS * head_dim)
        tensors[f"{blk}ffn_norm.weight"] = new(HIDDEN)
        tensors[f"{blk}ffn_gate.weight"] = new(INTERMEDIATE, HIDDEN)
        tensors[f"{blk}ffn_up.weight"] = new(INTERMEDIATE, HIDDEN)
        tensors[f"{blk}ffn_down.weight"] = new(HIDDEN, INTERMEDIATE)
        if architecture == "qwen2":
            tensors[f"{blk}attn_q.bias"] = new(HEADS * head_dim)
            tensors[f"{blk}attn_k.bias"] = new(KV_HEADS * head_dim)
            tensors[f"{blk}attn_v.bias"] = new(KV_HEADS * head_dim)
        if architecture == "qwen3":
            tensors[f"{blk}attn_q_norm.weight"] = new(head_dim)
            tensors[f"{blk}attn_k_norm.weight"] = new(head_dim)
    return tensors
