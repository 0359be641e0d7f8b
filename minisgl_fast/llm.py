"""LLM: the engine in this process, for scripts.

    from minisgl_fast import LLM, SamplingParams

    llm = LLM("Qwen/Qwen3-0.6B")
    for output in llm.generate(["Hello, my name is"], SamplingParams(max_tokens=32)):
        print(output.text)

It drives the same engine, scheduler and TextStream as the server, without sockets.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Output]:
        """Generate for one prompt or many, each a text or a list of token ids, in order.

        A prompt's tokens run with ``params.seed`` plus its index. Raises RequestError before
        anything runs if a prompt holds an unknown id, or none, or does not fit the context;
        EngineError if the model fails. Either way nothing of this call goes on running.
        """
        params = params or SamplingParams()
        batch = [prompts] if _is_one_prompt(prompts) else list(prompts)
        outputs = [Output(self._encode(prompt)) for prompt in batch]  # type: ignore[arg-type]
        streams: dict[int, tuple[Output, TextStream]] = {}
        try:
            for index, output in enumerate(outputs):
                stream = self._stream(params)
                streams[self._add(output.prompt_ids, params, index)] = (output, stream)
            while streams:
                for _, _, payload in self._engine.step():
                    self._deliver(payload, params, streams)
                self._progress("generate", len(outputs) - len(streams), len(outputs))
        finally:
            for rid in streams:
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

    def _add(self, prompt: list[int], params: SamplingParams, index: int) -> int:
        rid = self._next_rid
        self._next_rid += 1
        seed = secrets.randbits(64) if params.seed is None else (params.seed + index) % 2**64
        room = self._max_model_len - len(prompt)
        max_tokens = min(params.max_tokens or room, room)
        self._engine.add(CHANNEL, pack_add(rid, params, prompt, seed=seed, max_tokens=max_tokens))
        return rid

    def _deliver(
        self,
        payload: bytes,
        params: SamplingParams,
        streams: dict[int, tuple[Output, TextStream]],
    ) -> None:
        rows, first = unpack_step(payload)
        for rid, num_cached in first:
            if rid in streams:
                streams[rid][0].num_cached = num_cached
        for rid, token, reason in rows:
            if rid not in streams:
                continue
            output, stream = streams[rid]
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
                del streams[rid]


def _is_one_prompt(prompts: object) -> bool:
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)
