"""Runs tools/make_tiny_model.py in this process: one of its own would import torch again."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

HARMONY = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>",
           "<|return|>")  # fmt: skip
TOOL = Path(__file__).parents[1] / "tools" / "make_tiny_model.py"


def make_tiny_model(folder: Path, *arguments: str) -> Path:
    """Write a tiny random Qwen3 into ``folder``; ``arguments`` are the tool's flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TOOL), str(folder), *arguments])
        runpy.run_path(str(TOOL), run_name="__main__")
    return folder


def add_marks(folder: Path, *marks: str, special: bool = False) -> Path:
    """Give the tokenizer these texts as tokens of their own, from the first id without a text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [AddedToken(mark, special=special, normalized=False) for mark in marks]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_harmony_model(folder: Path) -> Path:
    """A tiny model with the marks of gpt-oss as special tokens, two of which end a text."""
    add_marks(make_tiny_model(folder), *HARMONY, special=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [tokenizer.token_to_id(mark) for mark in HARMONY[-2:]]
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    return folder
