"""Replays of recorded request streams: arrival times, lengths, and what prompts have in common.

Mooncake (JSON lines): timestamp in ms, input_length, output_length, and hash_ids, one for each
block of 512 tokens, the last block partial. Equal ids are filled with equal units, so a prefix
that two requests of the trace share is shared by their prompts.
Azure (CSV): TIMESTAMP with seven decimals, ContextTokens, GeneratedTokens; prompts are random.

``time_scale`` multiplies the times (0.5 is twice as fast), ``length_scale`` lengths and blocks.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import orjson

from minisgl_fast.bench.datasets import Sample, open_text
from minisgl_fast.bench.vocabulary import Vocabulary
from minisgl_fast.errors import ConfigError

BLOCK_TOKENS = 512


def mooncake(
    path: Path,
    vocabulary: Vocabulary,
    seed: int,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
) -> Iterator[Sample]:
    """The requests of a Mooncake trace. ConfigError names the line that is none."""
    block_tokens = max(1, round(BLOCK_TOKENS * length_scale))
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
                arrival_s = float(row["timestamp"]) / 1e3 * time_scale
                num_input = _scaled(int(row["input_length"]), length_scale)
                num_output = _scaled(int(row["output_length"]), length_scale)
                ids = [int(block) for block in row["hash_ids"]]
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {number}: not a row of a trace") from error
            units: list[str | int] = []
            for block in ids[: math.ceil(num_input / block_tokens)]:
                wanted = min(block_tokens, num_input - len(units))
                rng = random.Random(f"block {seed} {block}")
                units += vocabulary.sample(rng, block_tokens)[:wanted]
            if len(units) < num_input:  # rounding has made the prompt longer than its blocks
                rng = random.Random(f"rest {seed} {number}")
                units += vocabulary.sample(rng, num_input - len(units))
            yield Sample(vocabulary.render(units), num_input, num_output, arrival_s=arrival_s)


def azure(
    path: Path,
    vocabulary: Vocabulary,
    seed: int,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
) -> Iterator[Sample]:
    """The requests of an Azure LLM inference trace. ConfigError names the line that is none."""
    rng = random.Random(f"azure {seed}")
    start_s: float | None = None
    with open_text(path) as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                now_s = _seconds(row["TIMESTAMP"])
                num_input = _scaled(int(row["ContextTokens"]), length_scale)
                num_output = _scaled(int(row["GeneratedTokens"]), length_scale)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {number}: not a row of a trace") from error
            start_s = now_s if start_s is None else start_s
            prompt = vocabulary.render(vocabulary.sample(rng, num_input))
            arrival_s = max(0.0, now_s - start_s) * time_scale
            yield Sample(prompt, num_input, num_output, arrival_s=arrival_s)


def count_rows(path: Path) -> int:
    """Rows of a trace; a header line of a CSV file is none."""
    with open_text(path) as file:
        num_lines = sum(1 for line in file if line.strip())
    return num_lines - (".csv" in path.suffixes)


def _scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))


def _seconds(timestamp: str) -> float:
    """Of a time such as 2023-11-16 18:17:03.9799600; datetime reads six decimals only."""
    whole, _, fraction = timestamp.partition(".")
    seconds = datetime.fromisoformat(whole + "+00:00").timestamp()
    return seconds + (float(f"0.{fraction}") if fraction else 0.0)
