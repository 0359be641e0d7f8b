"""Drives an Engine by hand: adds, aborts and steps in any order, and gathers what comes out."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.params import SamplingParams
from minisgl_fast.progress import silent
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import (
    FinishReason,
    FrameKind,
    LogprobsRecord,
    pack_add,
    unpack_embedding,
    unpack_logprobs,
    unpack_step,
)

GREEDY = SamplingParams(temperature=0.0)
HOT = SamplingParams(temperature=1.5, ignore_eos=True)
# tools/make_tiny_model.py: 256 bytes, three control tokens, and ids without a text up to 320.
TINY_VOCAB_LIMIT = 259
TINY_EOS_IDS = (258,)
END_OF_TEXT, TURN_END = 256, 258
PAGE_SIZE = 16

# Settings of engines of tests on a GPU.
ON_GPU: dict[str, Any] = {
    "device": "cuda",
    "max_model_len": 2048,
    "num_pages": 512,
    "max_running_requests": 16,
}

# start(**settings of Config): a fixture of the tests.
Start = Callable[..., "EngineDriver"]


@contextmanager
def open_engines(
    model: Path,
    vocab_limit: int = TINY_VOCAB_LIMIT,
    eos_ids: Iterable[int] = TINY_EOS_IDS,
    tokenizer: Tokenizer | None = None,
    **defaults: Any,
) -> Iterator[Start]:
    """Gives a function that starts engines of ``model``, which are closed at the end.

    With a ``tokenizer`` they know its vocabulary, and so take grammars. ``defaults``: settings of
    Config where a test gives no others.
    """
    engines: list[Engine] = []

    def start(**settings: Any) -> EngineDriver:
        config = Config(model=str(model), **{**defaults, **settings})
        vocabulary = None if tokenizer is None else tokenizer.vocabulary()
        engines.append(Engine(config, model, vocab_limit, eos_ids, silent, vocabulary))
        return EngineDriver(engines[-1])

    yield start
    for engine in engines:
        engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


@dataclass
class Result:
    """What one request gave; ``reason`` is RUNNING until its last row."""

    tokens: list[int] = field(default_factory=list)
    reason: FinishReason = FinishReason.RUNNING
    num_cached: int = -1
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: list[float] | None = None


@dataclass
class TokenLogprobs:
    """Of one token: its own, the largest as (id, value) and those of ids asked for by name."""

    position: int
    token: int
    chosen: float
    top: list[tuple[int, float]]
    of_ids: list[float]


def split_record(record: LogprobsRecord) -> list[TokenLogprobs]:
    num_top = record.num_top
    num_ids = len(record.id_values) // len(record.tokens)
    tops = list(zip(record.top_ids, record.top_values, strict=True))
    return [
        TokenLogprobs(
            record.position + i,
            token,
            record.chosen[i],
            tops[i * num_top : (i + 1) * num_top],
            list(record.id_values[i * num_ids : (i + 1) * num_ids]),
        )
        for i, token in enumerate(record.tokens)
    ]


class EngineDriver:
    """One engine and the results of its requests, by rid."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.results: dict[int, Result] = {}

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY,
        *,
        seed: int = 0,
        max_tokens: int = 16,
        channel: int = 0,
        **asked: Any,
    ) -> int:
        rid = len(self.results)
        self.results[rid] = Result()
        payload = pack_add(
            rid, params, array("i", prompt), seed=seed, max_tokens=max_tokens, **asked
        )
        self.engine.add(channel, payload)
        return rid

    def abort(self, rid: int) -> None:
        self.engine.abort(0, rid)

    def step(self) -> None:
        for _, kind, payload in self.engine.step():
            if kind == FrameKind.LOGPROBS:
                self._take_logprobs(payload)
                continue
            if kind == FrameKind.EMBEDDING:
                rid, vector = unpack_embedding(payload)
                assert self.results[rid].embedding is None
                self.results[rid].embedding = list(vector)
                continue
            rows, first = unpack_step(payload)
            for rid, num_cached in first:
                assert self.results[rid].num_cached == -1, "cached tokens are told once"
                self.results[rid].num_cached = num_cached
            for rid, token, reason in rows:
                result = self.results[rid]
                assert result.reason == FinishReason.RUNNING, "no row follows the last one"
                if token >= 0:
                    result.tokens.append(token)
                result.reason = FinishReason(reason)

    def _take_logprobs(self, payload: bytes) -> None:
        for record in unpack_logprobs(payload):
            result = self.results[record.rid]
            assert result.reason == FinishReason.RUNNING, "they come before the last row"
            assert not (record.is_prompt and result.tokens), "a prompt's come before its first row"
            of_kind = result.prompt_logprobs if record.is_prompt else result.logprobs
            of_kind += split_record(record)

    def run(self) -> None:
        """Step until nothing is left, and check that nothing is held."""
        self.step()  # rows of aborts may wait where there is no work
        while self.engine.has_work:
            self.step()
        self.check_idle()

    def check_idle(self) -> None:
        self.engine.check()
        stats = self.engine.stats()
        assert (stats["running"], stats["queued"], stats["pages_used"]) == (0, 0, 0)
        assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]

    def outputs(self, requests: Sequence[dict[str, Any]]) -> list[Result]:
        """Add all of these (arguments of ``add``) at once and run them to their end."""
        rids = [self.add(**request) for request in requests]
        self.run()
        return [self.results[rid] for rid in rids]


def tokens(results: Sequence[Result]) -> list[list[int]]:
    return [result.tokens for result in results]
