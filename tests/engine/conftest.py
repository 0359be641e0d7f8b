"""Engines of tiny models, closed when their tests end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_driver import PAGE_SIZE, Start, open_engines
from tiny_folder import make_tiny_model

from minisgl_fast.text.tokenizer import Tokenizer

ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1}


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Start]:
    """Gives a function that starts an engine on the CPU."""
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "num_pages": 128, "max_running_requests": 8}
    with open_engines(tiny_model, **ON_CPU, **sizes) as start:
        yield start


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(tiny_model)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def make_driver(tiny_model: Path, tokenizer: Tokenizer) -> Iterator[Start]:
    """Gives a function that starts an engine on the CPU which takes grammars."""
    with open_engines(tiny_model, tokenizer=tokenizer, **ON_CPU, num_pages=256) as start:
        yield start


@pytest.fixture(scope="session")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with heads of 64, as the kernels want."""
    shape = "--hidden 128 --intermediate 256 --head-dim 64 --dtype bfloat16"
    return make_tiny_model(tmp_path_factory.mktemp("tiny-gpu") / "model", *shape.split())
