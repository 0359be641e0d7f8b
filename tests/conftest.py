"""Being here, this file puts tests/ on sys.path: helpers beside it are importable by every test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE_TINY_MODEL = Path(__file__).parents[1] / "tools" / "make_tiny_model.py"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Qwen3. Not to be written into."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    subprocess.run([sys.executable, MAKE_TINY_MODEL, folder], check=True, capture_output=True)
    return folder
