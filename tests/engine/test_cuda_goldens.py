"""A trained model on the GPU in bfloat16: its goldens hold but for what bfloat16 leaves open.

The goldens are greedy continuations of transformers in float32. In bfloat16 two tokens may come out
nearly even; transformers itself, in bfloat16 on the same GPU, says where that is.
"""

from __future__ import annotations

import pytest
import torch
from engine_driver import open_engines
from smollm2 import CASES, NEEDS_MODEL, PATH

from minisgl_fast.text.tokenizer import Tokenizer

# Logits lie around 20, where neighbours in bfloat16 are 0.125 apart; a sum of many roundings.
NOISE = 0.5

pytestmark = [
    *NEEDS_MODEL,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def agreement(tokens: list[int], golden: list[int]) -> int:
    """How many of the first tokens are the same."""
    pairs = zip(tokens, golden, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(golden)))


@pytest.mark.parametrize("together", [False, True])
def test_tokens_differ_from_the_goldens_only_where_bfloat16_is_undecided(together: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(PATH)
    wanted = [
        {"prompt": c["prompt_token_ids"], "max_tokens": len(c["output_token_ids"])} for c in CASES
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

    model = transformers.AutoModelForCausalLM.from_pretrained(
        PATH.parent, gguf_file=PATH.name, dtype=torch.bfloat16
    ).cuda()
    for case, result in zip(CASES, results, strict=True):
        prompt, golden = case["prompt_token_ids"], case["output_token_ids"]
        same = agreement(result.tokens, golden)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + golden], device="cuda")).logits[0].float()
        theirs = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        print(f"of {len(golden)} tokens: ours {same}, transformers {agreement(theirs, golden)}")
        if same < min(len(golden), len(result.tokens)):
            row = logits[len(prompt) - 1 + same]
            assert row.max() - row[result.tokens[same]] <= NOISE
        else:
            assert len(result.tokens) == len(golden)
