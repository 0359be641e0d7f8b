"""The whole server against transformers: what its numbers are over HTTP, cold and cached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from server_process import ServerProcess, serving
from transformers import AutoModelForCausalLM, PreTrainedModel

from minisgl_fast.text.tokenizer import Tokenizer

TOLERANCE = 1e-4
TEXT = "In a hole in the ground there lived a hobbit. Not a nasty, dirty, wet hole 🐇."
VOCAB_LIMIT = 259


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    # Prompts are computed in chunks of 24 tokens.
    with serving(
        *("--model", tiny_model, "--served-model-name", "tiny"),
        *("--num-pages", 64, "--max-prefill-length", 24),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(tiny_model)
    yield tokenizer
    tokenizer.close()


@torch.inference_mode()
def logprobs_of(oracle: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    logprobs: torch.Tensor = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs


def post(server: ServerProcess, path: str, **body: Any) -> Any:
    status, _, answer = server.request("POST", path, {"model": "tiny", **body})
    assert status == 200, answer
    return answer


def test_an_echoed_prompt_and_its_completion_are_scored(
    server: ServerProcess, oracle: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT)
    body = {"prompt": TEXT, "echo": True, "logprobs": 3, "temperature": 0.0, "max_tokens": 8,
            "ignore_eos": True, "skip_special_tokens": False}  # fmt: skip
    # Make the prompt's pages known first: what is asked for is computed all the same.
    post(server, "/v1/completions", prompt=TEXT, max_tokens=1)
    for _ in range(2):
        answer = post(server, "/v1/completions", **body)
        choice = answer["choices"][0]
        found = choice["logprobs"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert len(found["tokens"]) == len(ids) + 8
        assert "".join(found["tokens"][: len(ids)]).replace("\ufffd", "") == TEXT.replace("🐇", "")
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        expected = logprobs_of(oracle, ids)
        for position in range(1, len(ids)):
            row = expected[position - 1]
            assert found["token_logprobs"][position] == pytest.approx(
                float(row[ids[position]]), abs=TOLERANCE
            )
            top = found["top_logprobs"][position]
            largest = row[:VOCAB_LIMIT].topk(1).values
            assert max(top.values()) == pytest.approx(float(largest), abs=TOLERANCE)
        # Greedy: every token is the likeliest, to the last bit of its value.
        for value, top in zip(
            found["token_logprobs"][len(ids) :], found["top_logprobs"][len(ids) :], strict=True
        ):
            assert value == max(top.values())
        assert choice["text"].startswith(TEXT)


def test_scoring_without_a_token_gives_the_same(
    server: ServerProcess, oracle: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT)
    answer = post(server, "/v1/completions", prompt=[ids], echo=True, logprobs=0, max_tokens=0)
    found = answer["choices"][0]["logprobs"]["token_logprobs"]
    expected = logprobs_of(oracle, ids)
    values = [float(expected[i - 1, ids[i]]) for i in range(1, len(ids))]
    assert found[0] is None and found[1:] == pytest.approx(values, abs=TOLERANCE)
    assert answer["usage"]["completion_tokens"] == 0


def test_a_chat_lists_the_likeliest_tokens(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "Hello there"}]
    answer = post(
        server, "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=5,
        temperature=0, max_tokens=6, ignore_eos=True,
    )  # fmt: skip
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"] == 6
    for one in content:
        values = [top["logprob"] for top in one["top_logprobs"]]
        assert values == sorted(values, reverse=True) and len(values) == 5
        assert (one["token"], one["logprob"]) == (
            one["top_logprobs"][0]["token"],
            one["top_logprobs"][0]["logprob"],
        )
        assert bytes(one["bytes"]).decode("utf-8", "replace") == one["token"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_models_hidden_states(
    server: ServerProcess, oracle: PreTrainedModel, tokenizer: Tokenizer, pooling: str
) -> None:
    texts = [TEXT, "Hello", "Other words, and more of them"]
    for _ in range(2):
        answer = post(server, "/v1/embeddings", input=texts, pooling=pooling)
        for text, one in zip(texts, answer["data"], strict=True):
            with torch.inference_mode():
                ids = torch.tensor([tokenizer.encode(text)])
                hidden = oracle.model(ids).last_hidden_state[0]
            pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
            expected = torch.nn.functional.normalize(pooled, dim=0).tolist()
            assert one["embedding"] == pytest.approx(expected, abs=TOLERANCE)


def test_scores_are_the_models_probabilities(
    server: ServerProcess, oracle: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    query, items, labels = "The answer is", [" yes", " no", " perhaps"], [65, 97, 300]
    scores = post(
        server, "/v1/score", query=query, items=items, label_token_ids=labels
    )["scores"]  # fmt: skip
    for item, found in zip(items, scores, strict=True):
        expected = logprobs_of(oracle, tokenizer.encode(query + item))[-1]
        assert found == pytest.approx(expected[labels].exp().tolist(), abs=TOLERANCE)
