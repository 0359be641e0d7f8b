"""Datasets: what each request of a run asks, made one at a time from a seed.

A dataset is an iterator of samples. Lengths are in tokens of the vocabulary (vocabulary.py tells
how exact that is). The n-th sample of a dataset depends on the options and the seed alone.
"""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import orjson

from minisgl_fast.bench.vocabulary import TextCounter, Vocabulary
from minisgl_fast.errors import ConfigError

Message = dict[str, str]

# vLLM's filter of conversations: shorter ones measure nothing, longer ones are rare.
MIN_TOKENS = 4
MAX_PROMPT_TOKENS = 1024
MAX_TOTAL_TOKENS = 2048


@dataclass(slots=True)
class Sample:
    """One request: a prompt, and the number of tokens that it has and that it asks for.

    history: what was said before the prompt, for chat.
    arrival_s: seconds from the start, where the dataset knows.
    next_turn: makes the request that follows, from the answer to this one.
    """

    prompt: str | list[int]
    num_input: int
    num_output: int
    history: list[Message] = field(default_factory=list)
    arrival_s: float | None = None
    next_turn: Callable[[str], Sample] | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers; each drawn from [n * (1 - r), n * (1 + r)], r the ratio."""

    num_input: int = 1024
    num_output: int = 128
    range_ratio: float = 0.0

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """(input, output), at least 1 each."""
        return self._one(rng, self.num_input), self._one(rng, self.num_output)

    def _one(self, rng: random.Random, length: int) -> int:
        spread = int(length * self.range_ratio)
        return max(1, rng.randint(length - spread, length + spread))


def random_prompts(
    vocabulary: Vocabulary, lengths: Lengths, seed: int, prefix_len: int = 0
) -> Iterator[Sample]:
    """Random units; ``prefix_len`` more in front of them are the same in every prompt."""
    rng = random.Random(f"random {seed}")
    prefix = vocabulary.sample(rng, prefix_len)
    while True:
        num_input, num_output = lengths.draw(rng)
        units = [*prefix, *vocabulary.sample(rng, num_input)]
        yield Sample(vocabulary.render(units), len(units), num_output)


def fixed_prompt(
    vocabulary: Vocabulary, lengths: Lengths, seed: int, prompt: str | None, counter: TextCounter
) -> Iterator[Sample]:
    """The same prompt again and again: a given text, or units drawn once."""
    if prompt is not None:
        sample = Sample(prompt, counter.count(prompt), lengths.num_output)
    else:
        units = vocabulary.sample(random.Random(f"fixed {seed}"), lengths.num_input)
        sample = Sample(vocabulary.render(units), len(units), lengths.num_output)
    return itertools.repeat(sample)


def shared_prefix(
    vocabulary: Vocabulary, lengths: Lengths, seed: int, prefix_len: int, num_prefixes: int
) -> Iterator[Sample]:
    """Each prompt begins with one of ``num_prefixes`` prefixes and ends with text of its own."""
    rng = random.Random(f"shared prefix {seed}")
    prefixes = [vocabulary.sample(rng, prefix_len) for _ in range(num_prefixes)]
    while True:
        num_input, num_output = lengths.draw(rng)
        units = [*rng.choice(prefixes), *vocabulary.sample(rng, num_input)]
        yield Sample(vocabulary.render(units), len(units), num_output)


def multi_turn(
    vocabulary: Vocabulary, lengths: Lengths, seed: int, num_turns: int, prefix_len: int = 0
) -> Iterator[Sample]:
    """First turns of conversations; each later one follows the server's own answer.

    ``prefix_len``: tokens of a text that begins every first turn. Needs a text vocabulary.
    """
    rng = random.Random(f"multi turn {seed}")
    prefix = str(vocabulary.render(vocabulary.sample(rng, prefix_len)))

    def turn(history: list[Message], so_far: int, turns_left: int, rng: random.Random) -> Sample:
        num_input, num_output = lengths.draw(rng)
        prompt = str(vocabulary.render(vocabulary.sample(rng, num_input)))
        num_input += so_far
        if not history and prefix_len:
            prompt = prefix + prompt
            num_input += prefix_len

        def follow(answer: str) -> Sample:
            said = [
                *history,
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
            return turn(said, num_input + num_output, turns_left - 1, rng)

        next_turn = follow if turns_left > 1 else None
        return Sample(prompt, num_input, num_output, history, next_turn=next_turn)

    while True:
        # One generator a conversation: what it says does not depend on who answers first.
        yield turn([], 0, num_turns, random.Random(rng.getrandbits(64)))


def sharegpt(
    path: Path, counter: TextCounter, seed: int, num_output: int | None = None
) -> Iterator[Sample]:
    """First question and answer of each conversation of a ShareGPT JSON file, shuffled.

    ``num_output`` stands in for the length of the answer in the file. Conversations that are too
    short or too long are left out, as vLLM leaves them out.
    """
    content = _load_json(path)
    if not isinstance(content, list):
        raise ConfigError(f"{path}: not a list of conversations")
    pairs = [pair for pair in map(_first_pair, content) if pair is not None]
    random.Random(f"sharegpt {seed}").shuffle(pairs)
    samples = []
    for question, answer in pairs:
        num_input, num_answer = counter.count(question), num_output or counter.count(answer)
        too_long = num_input > MAX_PROMPT_TOKENS or num_input + num_answer > MAX_TOTAL_TOKENS
        if min(num_input, num_answer) < MIN_TOKENS or too_long:
            continue
        sample = Sample(question, num_input, num_answer)
        samples.append(sample)
        yield sample
    if not samples:
        raise ConfigError(f"{path}: no conversation of a usable length")
    yield from itertools.cycle(samples)


def prompts_file(path: Path, counter: TextCounter, num_output: int) -> Iterator[Sample]:
    """One prompt a line: plain text, or in a .jsonl file objects with ``prompt``.

    Objects may have ``output_tokens``, the number of tokens to ask for. Starts again at the end.
    """
    is_json = ".jsonl" in path.suffixes
    samples = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                sample = _prompt_of_line(line.rstrip("\r\n"), is_json, counter, num_output)
                if sample is None:
                    raise ConfigError(f"{path}, line {number}: no object with a text `prompt`")
                samples.append(sample)
    if not samples:
        raise ConfigError(f"{path}: no prompts")
    return itertools.cycle(samples)


def open_text(path: Path) -> TextIO:
    """A UTF-8 text file, gzipped or not. ConfigError if it cannot be read."""
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8")
        return open(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _load_json(path: Path) -> Any:
    with open_text(path) as file:
        try:
            return orjson.loads(file.read())
        except (orjson.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not JSON") from error


def _prompt_of_line(
    line: str, is_json: bool, counter: TextCounter, num_output: int
) -> Sample | None:
    if not is_json:
        return Sample(line, counter.count(line), num_output)
    try:
        item = orjson.loads(line)
        prompt, num_tokens = item["prompt"], int(item.get("output_tokens", num_output))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
        return None
    if not isinstance(prompt, str) or num_tokens < 1:
        return None
    return Sample(prompt, counter.count(prompt), num_tokens)


def _first_pair(conversation: Any) -> tuple[str, str] | None:
    """The first two texts of a conversation, in ShareGPT's or in OpenAI's shape."""
    if not isinstance(conversation, dict):
        return None
    turns = conversation.get("conversations") or conversation.get("messages")
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value", turn.get("content")) for turn in turns if isinstance(turn, dict)]
    question, answer, *_ = [*texts, None, None]
    if not (isinstance(question, str) and isinstance(answer, str) and question and answer):
        return None
    return question, answer
