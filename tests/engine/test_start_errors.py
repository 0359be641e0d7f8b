"""A start that cannot work says in one line what to change; what a GPU would raise is raised."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl_fast.backend import kernel, make_backend
from minisgl_fast.backend.reference import ReferenceBackend
from minisgl_fast.config import Config
from minisgl_fast.engine import runner
from minisgl_fast.engine.cuda_executor import CudaExecutor
from minisgl_fast.engine.runner import ModelRunner
from minisgl_fast.errors import ConfigError
from minisgl_fast.progress import silent


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 26.00 GiB.")


def load(model: Path) -> ModelRunner:
    config = Config(
        model=str(model),
        dummy_weight=True,
        device="cpu",
        num_pages=12,
        page_size=16,
        num_threads=1,
    )
    return ModelRunner(config, model, 259, silent)


def message_of(start: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        start()
    return caught.value.message


def test_no_memory_for_the_weights(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(runner, "dummy_weights", out_of_memory)
    assert message_of(lambda: load(tiny_model)) == (
        "Out of GPU memory for the weights. Take a smaller model, or end what else uses the GPU."
    )


@pytest.mark.parametrize("step", ["allocate_kv", "prepare"])
def test_no_memory_for_the_cache(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, step: str
) -> None:
    monkeypatch.setattr(ReferenceBackend, step, out_of_memory)
    assert message_of(lambda: load(tiny_model)) == (
        "Out of GPU memory for 12 KV pages of 16 tokens. "
        "Lower --memory-ratio, --num-pages or --max-running-requests."
    )


def test_no_memory_for_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaExecutor, "_capture_all", out_of_memory)
    executor = CudaExecutor.__new__(CudaExecutor)
    assert message_of(lambda: executor._capture(None)) == (
        "Out of GPU memory for CUDA graphs. Lower --memory-ratio, --num-pages or "
        "--cuda-graph-max-bs."
    )


@pytest.mark.parametrize(
    ("cuda", "extra", "package"),
    [("13.0", "cuda13", "cupy-cuda13x"), ("12.8", "cuda12", "cupy-cuda12x")],
)
def test_a_gpu_without_cupy(
    monkeypatch: pytest.MonkeyPatch, cuda: str, extra: str, package: str
) -> None:
    find = importlib.import_module

    def without_cupy(name: str, *arguments: Any) -> Any:
        if name == "cupy":
            raise ImportError(name)
        return find(name, *arguments)

    monkeypatch.setattr(kernel.importlib, "import_module", without_cupy)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    kernel._cupy.cache_clear()
    assert message_of(lambda: make_backend(torch.device("cuda", 0))) == (
        f"The GPU backend needs CuPy: pip install 'minisgl_fast[{extra}]' "
        f"({package}, for this torch), or take --device cpu."
    )
