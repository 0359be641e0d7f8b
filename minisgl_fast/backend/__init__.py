"""Where the model's operations run: ``reference`` in torch on a CPU, ``cuda`` with own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minisgl_fast.errors import ConfigError

if TYPE_CHECKING:
    from minisgl_fast.backend.interface import Backend


def pick_device(name: str) -> torch.device:
    """The device for ``--device``: ``auto`` is CUDA where there is a device, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here.")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def make_backend(device: torch.device) -> Backend:
    """The backend of a device."""
    if device.type == "cuda":
        from minisgl_fast.backend.cuda import CudaBackend

        return CudaBackend(device)
    from minisgl_fast.backend.reference import ReferenceBackend

    return ReferenceBackend(device)
