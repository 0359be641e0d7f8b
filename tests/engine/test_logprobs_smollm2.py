"""Log-probabilities of a trained model, in float32, against transformers on the same file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine_driver import EngineDriver, open_engines
from smollm2 import CASES, NEEDS_MODEL, PATH
from transformers import AutoModelForCausalLM

from minisgl_fast.text.tokenizer import Tokenizer

TOLERANCE = 1e-4

pytestmark = [
    *NEEDS_MODEL,
    pytest.mark.xdist_group("goldens"),
    pytest.mark.timeout(300),  # transformers takes its time to read the file
]


@pytest.fixture(scope="module")
def driver() -> Iterator[EngineDriver]:
    tokenizer = Tokenizer.load(PATH)
    with open_engines(
        PATH, tokenizer.vocab_size, tokenizer.eos_ids, device="cpu", dtype="float32",
        num_threads=1, num_pages=200, max_running_requests=8, max_prefill_length=48,
    ) as start:  # fmt: skip
        yield start()
    tokenizer.close()


def test_prompts_and_answers_have_the_log_probabilities_of_transformers(
    driver: EngineDriver,
) -> None:
    requests = [
        {"prompt": list(case["prompt_token_ids"]), "max_tokens": 8, "num_top_logprobs": 5,
         "prompt_logprobs_from": first}
        for case, first in zip(CASES[:4], (0, 0, 3, 20), strict=True)
    ]  # fmt: skip
    found = [driver.outputs(requests) for _ in range(2)]  # cold, then cached
    model = AutoModelForCausalLM.from_pretrained(
        PATH.parent, gguf_file=PATH.name, dtype=torch.float32
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
