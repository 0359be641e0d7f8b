"""Drives an Engine by hand: adds, aborts and steps in any order, and gathers what comes out."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl_fast.engine.engine import Engine
from minisgl_fast.params import SamplingParams
from minisgl_fast.wire import FinishReason, pack_add, unpack_step

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Result:
    """What one request gave; ``reason`` is RUNNING until its last row."""

    tokens: list[int] = field(default_factory=list)
    reason: FinishReason = FinishReason.RUNNING
    num_cached: int = -1


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
    ) -> int:
        rid = len(self.results)
        self.results[rid] = Result()
        payload = pack_add(rid, params, array("i", prompt), seed=seed, max_tokens=max_tokens)
        self.engine.add(channel, payload)
        return rid

    def abort(self, rid: int) -> None:
        self.engine.abort(0, rid)

    def step(self) -> None:
        for _, payload in self.engine.step():
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
