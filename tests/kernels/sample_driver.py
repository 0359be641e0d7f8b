"""What tests of the GPU sampler share: steps on the device, logits and settings of all kinds."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch

from minisgl_fast.backend.step import DeviceState, StepTensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEG_INF = float("-inf")


def make_sampler(rows: int, vocab: int, clusters: tuple[int, ...] = (1, 2, 4, 8)) -> Any:
    from minisgl_fast.backend.cuda_sampler import Sampler

    return Sampler(rows, vocab, CUDA, clusters)


SAMPLE_FIELDS = (
    "sample_slots",
    "sample_positions",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed_lo",
    "seed_hi",
    "presence",
    "frequency",
    "repetition",
    "sample_flags",
)


def part_of(step: StepTensors, first: int, last: int) -> StepTensors:
    """Samples first..last - 1 of a step."""
    fields = {name: getattr(step, name)[first:last].contiguous() for name in SAMPLE_FIELDS}
    fields["bias_start"] = step.bias_start[first : last + 1].contiguous()
    return dataclasses.replace(step, num_samples=last - first, **fields)


def make_states(rows: int, vocab: int) -> tuple[DeviceState, DeviceState]:
    return DeviceState(rows, 1, vocab, CPU), DeviceState(rows, 1, vocab, CUDA)


def draw_logits(rows: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of every kind in turn: flat, normal, peaked, steep, tied, huge, nearly equal."""
    x = torch.randn(rows, vocab, generator=generator)
    x[0::7] *= 0.1
    peaks = torch.randint(0, vocab, (len(x[2::7]), 12), generator=generator)
    x[2::7] = (x[2::7] * 2.5).scatter_add_(
        1, peaks, 12 + 3 * torch.randn(peaks.shape, generator=generator)
    )
    x[3::7] *= 40
    x[4::7] = torch.randint(-4, 5, x[4::7].shape, generator=generator).float()
    x[5::7] *= 10_000
    x[6::7] = torch.randint(0, 2, x[6::7].shape, generator=generator) * 1e-6
    return x


def draw_params(rows: int, vocab: int, flags: int, rng: random.Random) -> list[dict[str, float]]:
    def one() -> dict[str, float]:
        huge_k = int(vocab ** rng.random())
        return {
            "temperature": rng.choice([0.0, 1e-6, 0.01, 0.6, 0.6, 1.0, 1.0, 1.0, 2.0, 100.0]),
            "top_k": rng.choice([0, 0, 0, 1, 2, 20, 50, 50, huge_k, vocab, vocab + 5]),
            "top_p": rng.choice([1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.9, 0.95, 0.999, rng.random()]),
            "min_p": rng.choice([0.0, 0.0, 0.0, 0.01, 0.3, 1.0]),
            "seed_lo": rng.randrange(-(2**31), 2**31),
            "seed_hi": rng.randrange(-(2**31), 2**31),
            "presence": rng.uniform(-2, 2),
            "frequency": rng.uniform(-2, 2),
            "repetition": rng.uniform(0.5, 2),
            "sample_flags": rng.choice([0, flags, flags & rng.randrange(4)]),
        }

    return [one() for _ in range(rows)]


def draw_biases(rows: int, limit: int, rng: random.Random) -> list[dict[int, float]]:
    values = [NEG_INF, *(rng.uniform(-50, 50) for _ in range(5))]
    # Ids from the limit on must be ignored.
    return [dict(zip(rng.sample(range(limit + 3), 6), values, strict=True)) for _ in range(rows)]
