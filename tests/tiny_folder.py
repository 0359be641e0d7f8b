"""Runs tools/make_tiny_model.py in this process: one of its own would import torch again."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "make_tiny_model.py"


def make_tiny_model(folder: Path, *arguments: str) -> Path:
    """Write a tiny random Qwen3 into ``folder``; ``arguments`` are the tool's flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TOOL), str(folder), *arguments])
        runpy.run_path(str(TOOL), run_name="__main__")
    return folder
