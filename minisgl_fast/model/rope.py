"""The table of a rotary embedding: cos and sin of every position.

Formulas: RoFormer (arXiv 2104.09864); llama3 scaling as published with
Llama 3.1; YaRN (arXiv 2309.00071), with the defaults that transformers gives its parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisgl_fast.model.config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """float32 [num_positions, head_dim]: cos in the first half of the columns, sin in the second.

    Column j and head_dim/2 + j turn the pair (x[j], x[head_dim/2 + j]). The attention factor of
    yarn is multiplied in.
    """
    frequencies = _frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    scale = _attention_factor(rope) if rope.type == "yarn" else 1.0
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1).to(device)


def _frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: radians a position, scaled."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.type == "llama3":
        return _llama3(frequencies, rope)
    if rope.type == "yarn":
        return _yarn(frequencies, rope, head_dim)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are divided by ``factor``, short ones kept, those between blended."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # within the old context
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / rope.factor)


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """As llama3, but the blend is a ramp over dimensions instead of over wavelengths."""

    def dimension(num_turns: float) -> float:
        """Which dimension turns this often within the original context."""
        ratio = rope.original_max_position / (num_turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    if low == high:
        high += 0.001
    index = torch.arange(head_dim // 2, dtype=torch.float32)
    interpolate = ((index - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (1.0 - interpolate) + frequencies / rope.factor * interpolate


def _attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return gain(rope.mscale) / gain(rope.mscale_all_dim)
    return gain(1.0)
