"""Engines of the tiny model on the CPU, closed when their test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_driver import PAGE_SIZE, TINY_EOS_IDS, TINY_VOCAB_LIMIT, EngineDriver, Start
from tiny_folder import make_tiny_model

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.progress import silent
from minisgl_fast.text.tokenizer import Tokenizer


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(folder)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def make_driver(folder: Path, tokenizer: Tokenizer) -> Iterator[Start]:
    """Gives a function that starts an engine which knows its vocabulary, and so takes grammars."""
    engines: list[Engine] = []

    def make(**settings: Any) -> EngineDriver:
        settings = {"num_pages": 256, "num_threads": 1, "device": "cpu"} | settings
        config = Config(model=str(folder), dtype="float32", **settings)
        vocabulary = tokenizer.vocabulary()
        engines.append(Engine(config, folder, TINY_VOCAB_LIMIT, TINY_EOS_IDS, silent, vocabulary))
        return EngineDriver(engines[-1])

    yield make
    for engine in engines:
        engine.close()
