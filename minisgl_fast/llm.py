"""LLM: the engine in this process, for scripts.

    from minisgl_fast import LLM, SamplingParams

    llm = LLM("Qwen/Qwen3-0.6B")
    for output in llm.generate(["Hello, my name is"], SamplingParams(max_tokens=32)):
        print(output.text)

It drives the same engine, scheduler and TextStream as the server, without sockets. Prompts are
added longest answer first: those that end the batch begin it, so that fewer steps at its end run
for a handful of rows (longest processing time first, R. L. Graham 1969).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.errors import ContextLengthError, EngineError, RequestError
from minisgl_fast.hub import resolve_model
from minisgl_fast.params import SamplingParams, stop_program
from minisgl_fast.progress import Progress, silent
from minisgl_fast.text.stream import TextStream
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import FinishReason, pack_add, unpack_step

CHANNEL = 0
FINISH_NAMES = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
}

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Output:
    """One finished generation. ``token_ids`` holds every token, the stopping one included."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    num_cached: int = 0


class _Running(NamedTuple):
    """A prompt that is being answered."""

    output: Output
    params: SamplingParams
    stream: TextStream


class LLM:
    """A model that is loaded once and generates for any number of prompts."""

    def __init__(self, model: str, *, progress: Progress = silent, **settings: Any) -> None:
        """``settings`` are the fields of Config, such as ``dtype="float32"``."""
        config = Config(model=model, **settings)
        path = resolve_model(
            config.model,
            revision=config.revision,
            source=config.model_source,
            weights=not config.dummy_weight,
            progress=progress,
        )
        self.tokenizer = Tokenizer.load(path)
        self.tokenizer.accelerate_later()
        self._progress = progress
        self._engine = Engine(
            config, path, self.tokenizer.vocab_size, self.tokenizer.eos_ids, progress
        )
        facts = self._engine.facts()
        self._max_model_len: int = facts["max_model_len"]
        self._vocab_size: int = facts["vocab_size"]
        self._next_rid = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Generate for one prompt or many, each a text or a list of token ids, in order.

        ``params`` are of all prompts, the seed plus a prompt's index, or a list with each one's
        own. Raises RequestError before anything runs if a prompt holds an unknown id, or none, or
        does not fit the context, or if there are more or fewer params than prompts; EngineError if
        the model fails. Either way nothing of this call goes on running.
        """
        batch = [prompts] if _is_one_prompt(prompts) else list(prompts)
        each = _params_of_each(params, len(batch))
        outputs = [Output(self._encode(prompt)) for prompt in batch]  # type: ignore[arg-type]
        rooms = [self._max_model_len - len(output.prompt_ids) for output in outputs]
        max_tokens = [min(p.max_tokens or room, room) for p, room in zip(each, rooms, strict=True)]
        running: dict[int, _Running] = {}
        try:
            for index in longest_first(max_tokens):
                output, own = outputs[index], each[index]
                rid = self._add(output.prompt_ids, own, max_tokens[index])
                running[rid] = _Running(output, own, self._stream(own))
            while running:
                for _, _, payload in self._engine.step():
                    self._deliver(payload, running)
                self._progress("generate", len(outputs) - len(running), len(outputs))
        finally:
            for rid in running:
                self._engine.abort(CHANNEL, rid)
            # The last tokens come out before their step has left; and what was aborted runs out.
            while self._engine.has_work:
                self._engine.step()
        return outputs

    def close(self) -> None:
        """Release the engine's memory and its thread."""
        self._engine.close()
        self.tokenizer.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_prompt(prompt)
        else:
            ids = list(prompt)
            if not all(0 <= token < self._vocab_size for token in ids):
                raise RequestError(
                    f"Prompts must hold token ids in [0, {self._vocab_size - 1}].", param="prompts"
                )
        if not ids:
            raise RequestError("A prompt must not be empty.", param="prompts")
        if len(ids) >= self._max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self._max_model_len} tokens. "
                f"However, a prompt contains {len(ids)} tokens.",
                param="prompts",
            )
        return ids

    def _stream(self, params: SamplingParams) -> TextStream:
        return self.tokenizer.stream(
            params.stop,
            params.include_stop_str_in_output,
            params.skip_special_tokens,
            params.min_tokens,
            stop_program(params.stop_regex),
        )

    def _add(self, prompt: list[int], params: SamplingParams, max_tokens: int) -> int:
        rid = self._next_rid
        self._next_rid += 1
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self._engine.add(CHANNEL, pack_add(rid, params, prompt, seed=seed, max_tokens=max_tokens))
        return rid

    def _deliver(self, payload: bytes, running: dict[int, _Running]) -> None:
        rows, first = unpack_step(payload)
        for rid, num_cached in first:
            if rid in running:
                running[rid].output.num_cached = num_cached
        for rid, token, reason in rows:
            if rid not in running:
                continue
            output, params, stream = running[rid]
            if reason == FinishReason.ERROR:
                raise EngineError("The model produced NaN logits.")
            if token >= 0:
                output.token_ids.append(token)
            is_stop = reason in (FinishReason.EOS, FinishReason.STOP_TOKEN)
            if not is_stop or params.include_stop_str_in_output:
                stream.feed(token)
            if stream.stopped:
                self._engine.abort(CHANNEL, rid)
                output.finish_reason = "stop"
            elif reason != FinishReason.RUNNING:
                stream.finish()
                output.finish_reason = FINISH_NAMES[FinishReason(reason)]
            if output.finish_reason:
                output.text = stream.take().decode()
                del running[rid]


def longest_first(max_tokens: Sequence[int]) -> list[int]:
    """The order in which to add a batch: indices by falling length of the answer, then as given."""
    return sorted(range(len(max_tokens)), key=lambda index: -max_tokens[index])


def _params_of_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        if len(params) != num_prompts:
            raise RequestError(
                f"There are {num_prompts} prompts and {len(params)} params.", param="params"
            )
        return list(params)
    if params.seed is None:
        return [params] * num_prompts
    seeds = ((params.seed + index) % 2**64 for index in range(num_prompts))
    return [replace(params, seed=seed) for seed in seeds]


def _is_one_prompt(prompts: object) -> bool:
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)
