"""A trained model on the GPU in bfloat16: it errs as transformers in bfloat16 does on the same GPU.

The goldens are greedy continuations of transformers in float32. In bfloat16 two tokens may come out
nearly even; how far logits stray from those in float32 says whether more than rounding is at work.
"""

from __future__ import annotations

import pytest
import torch
from engine_driver import open_engines
from smollm2 import CASES, NEEDS_MODEL, PATH
from step_driver import Driver
from torch import Tensor

from minisgl_fast.text.tokenizer import Tokenizer

# Logits lie around 20, where neighbours in bfloat16 are 0.125 apart; a sum of many roundings.
NOISE = 0.5
# Ways of transformers' own (sdpa, eager, token by token) lie within 5 % of each other.
MORE_ERROR = 1.1

PROMPTS = [case["prompt_token_ids"] for case in CASES]
GOLDENS = [case["output_token_ids"] for case in CASES]

pytestmark = [
    *NEEDS_MODEL,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.xdist_group("cuda_goldens"),
]

# For each case [len(golden), vocab], float32: what decides on each token of the golden.
Logits = list[Tensor]


def transformers_logits(dtype: torch.dtype) -> Logits:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        PATH.parent, gguf_file=PATH.name, dtype=torch.bfloat16
    )
    model.to("cuda", dtype)
    logits = []
    for prompt, golden in zip(PROMPTS, GOLDENS, strict=True):
        with torch.inference_mode():
            of_all = model(torch.tensor([prompt + golden[:-1]], device="cuda")).logits[0]
        logits.append(of_all[len(prompt) - 1 :].float())
    return logits


@pytest.fixture(scope="module")
def exact() -> Logits:
    return transformers_logits(torch.float32)


@pytest.fixture(scope="module")
def theirs() -> Logits:
    return transformers_logits(torch.bfloat16)


def by_decoding(driver: Driver) -> Logits:
    """All goldens together, token by token after their prompts."""
    for slot, (prompt, golden) in enumerate(zip(PROMPTS, GOLDENS, strict=True)):
        driver.add(slot, prompt + golden)
    rows = [[driver.run([(slot, len(prompt))]).float()] for slot, prompt in enumerate(PROMPTS)]
    for i in range(1, max(map(len, GOLDENS))):
        slots = [slot for slot, golden in enumerate(GOLDENS) if i < len(golden)]
        logits = driver.run([(slot, 1) for slot in slots]).float()
        for slot, row in zip(slots, logits.split(1), strict=True):
            rows[slot].append(row)
    return [torch.cat(of_case) for of_case in rows]


def by_prefill(driver: Driver) -> Logits:
    """Each token of a golden as the one after a new prompt."""

    def row(tokens: list[int]) -> Tensor:
        driver.add(0, tokens)
        return driver.run([(0, len(tokens))]).float()

    return [
        torch.cat([row(prompt + golden[:i]) for i in range(len(golden))])
        for prompt, golden in zip(PROMPTS, GOLDENS, strict=True)
    ]


@pytest.mark.parametrize("ours_by", [by_decoding, by_prefill])
def test_logits_err_no_more_than_those_of_transformers(
    ours_by: object, exact: Logits, theirs: Logits
) -> None:
    driver = Driver.load(PATH, torch.bfloat16, device="cuda", page_size=64, num_pages=512)
    ours = ours_by(driver)  # type: ignore[operator]

    def error(logits: Logits) -> float:
        differences = [
            got[:, : right.shape[1]] - right for got, right in zip(logits, exact, strict=True)
        ]
        return float(torch.cat(differences).square().mean().sqrt())

    print(f"error of logits: ours {error(ours):.4f}, transformers {error(theirs):.4f}")
    assert 0.0 < error(ours) <= MORE_ERROR * error(theirs)


@pytest.mark.parametrize("together", [False, True])
def test_tokens_differ_from_the_goldens_only_where_bfloat16_is_undecided(
    together: bool, theirs: Logits
) -> None:
    tokenizer = Tokenizer.load(PATH)
    wanted = [
        {"prompt": prompt, "max_tokens": len(golden)}
        for prompt, golden in zip(PROMPTS, GOLDENS, strict=True)
    ]
    with open_engines(
        PATH, tokenizer.vocab_size, tokenizer.eos_ids, device="cuda", num_pages=128,
        max_running_requests=8,
    ) as start:  # fmt: skip
        driver = start()
        if together:
            results = driver.outputs(wanted)
        else:
            results = [driver.outputs([request])[0] for request in wanted]

    for golden, result, logits in zip(GOLDENS, results, theirs, strict=True):
        same = agreement(result.tokens, golden)
        of_theirs = agreement(logits.argmax(-1).tolist(), golden)
        print(f"of {len(golden)} tokens: ours {same}, transformers {of_theirs}")
        if same < min(len(golden), len(result.tokens)):
            row = logits[same]
            assert row.max() - row[result.tokens[same]] <= NOISE
        else:
            assert len(result.tokens) == len(golden)


def agreement(tokens: list[int], golden: list[int]) -> int:
    """How many of the first tokens are the same."""
    pairs = zip(tokens, golden, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(golden)))
