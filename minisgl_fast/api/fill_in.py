"""Filling in the middle: a prompt and a suffix, for models that were trained with tokens for it."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl_fast.api.openai_request import Prompt
from minisgl_fast.errors import RequestError
from minisgl_fast.text.tokenizer import Tokenizer

# Prefix, suffix, middle: Qwen2.5 and Qwen3; StarCoder and SmolLM.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


def around_middle(
    prompts: Sequence[Prompt], suffix: str | None, tokenizer: Tokenizer
) -> Sequence[Prompt]:
    """The prompts with the suffix and the model's marks, as they are without a suffix."""
    if not suffix:
        return prompts
    for marks in _MARKS:
        if all(len(tokenizer.encode(mark)) == 1 for mark in marks):
            break
    else:
        raise RequestError(
            "This model has no tokens for filling in the middle, so it does not support suffix.",
            param="suffix",
        )
    before, behind, middle = marks
    made: list[Prompt] = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise RequestError("suffix needs prompts that are text.", param="suffix")
        made.append(f"{before}{prompt}{behind}{suffix}{middle}")
    return made
