"""The parts of a decoder that do not depend on a backend: rotary table and matrix product.

Formulas of the rotary table: RoFormer (arXiv 2104.09864); llama3 scaling as published with
Llama 3.1; YaRN (arXiv 2309.00071), with the defaults that transformers gives its parameters.
"""

from __future__ import annotations

import math
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl_fast.model.config import RopeConfig


class Linear:
    """y = x W^T + b with W [out, in].

    On an x86 CPU the weight is reordered once into the blocked layout of oneDNN; without that,
    bfloat16 pays for it in every call and float32 takes a slow path for a handful of rows.
    Measured on all layers of SmolLM2-135M, speed against the plain product: bfloat16 (AMX) 1.1 to
    1.4 times for 1 to 8 rows and 1.6 times for 64; float32 0.9 times for 1 row, 1.6 times for 8.
    """

    __slots__ = ("_packed", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = _can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return y
        return F.linear(x, self.weight, self.bias)


def _can_pack(weight: Tensor) -> bool:
    """Whether torch can reorder this weight, and this machine is of the kind measured."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


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
