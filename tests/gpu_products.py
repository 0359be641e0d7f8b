"""For tests of matrix products: seeded operands on the GPU, and how far off a result is."""

from __future__ import annotations

import torch


def draw(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal values, bfloat16."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm; NaN when any element is."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in float64, a block of rows of W at a time."""
    return torch.cat([x.double() @ part.double().T for part in weight.split(16384)], dim=1)
