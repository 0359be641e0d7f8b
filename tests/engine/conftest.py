"""Engines of the tiny model on the CPU, closed when their test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_driver import PAGE_SIZE, TINY_EOS_IDS, TINY_VOCAB_LIMIT, EngineDriver, Start

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.progress import silent


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Start]:
    """Gives a function that starts an engine with the given settings."""
    engines: list[Engine] = []

    def start_engine(**settings: Any) -> EngineDriver:
        settings = {"num_pages": 128, "max_running_requests": 8, **settings}
        config = Config(
            model=str(tiny_model),
            device="cpu",
            dtype="float32",
            page_size=PAGE_SIZE,
            num_threads=1,
            **settings,
        )
        engines.append(Engine(config, tiny_model, TINY_VOCAB_LIMIT, TINY_EOS_IDS, silent))
        return EngineDriver(engines[-1])

    yield start_engine
    for engine in engines:
        engine.close()
