"""What binding an answer costs on a CPU: a mask of a large vocabulary, and whole answers.

    python tools/bench_masks.py            # a minute on 2 cores; --rounds for more

1. One row of a vocabulary of 151,936 ids: the time to fill its mask (llguidance, while the model
   runs) and to apply it to the logits (in the sampler), in CPU time of one thread.
2. The demo model with 8 requests at once with a JSON schema, and the same without: tokens a
   second. Both alternate round by round; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from demo_model import demo_model

from minisgl_fast.api.openai_request import check_chat
from minisgl_fast.api.structured import plain_grammar
from minisgl_fast.backend import sampling
from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.engine.grammar import Grammars, MaskRow
from minisgl_fast.params import SamplingParams
from minisgl_fast.progress import silent
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import pack_add

VOCAB = 151936
QWEN3 = Path(__file__).parents[1] / "tests" / "data" / "qwen3-tokenizer" / "tokenizer.json.gz"
NUM_STATES = 20
NUM_REQUESTS = 8
NUM_TOKENS = 32
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "blue"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# Longer than the answers get, so that both sides make as many tokens.
PEOPLE = {"type": "array", "items": PERSON, "minItems": 50}


def grammar(tokenizer: Tokenizer, schema: dict[str, Any]) -> bytes:
    """What the engine gets for a chat with this schema."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body, _ = check_chat({"messages": [{"role": "user", "content": "x"}], "response_format": form})
    made = plain_grammar(body, tokenizer)
    assert made is not None
    return made.text.encode()


def quickest_us(call: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times) * 1e6


def measure_masks() -> list[str]:
    """Lines about one row of a large vocabulary."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "tokenizer.json").write_bytes(gzip.decompress(QWEN3.read_bytes()))
        tokenizer = Tokenizer.load(Path(name))
    grammars = Grammars(tokenizer.vocabulary(), [tokenizer.encode("<|im_end|>")[0]])
    # A state fills the same mask a second time from memory, so there are several.
    states = [grammars.compile(grammar(tokenizer, PERSON)).result() for _ in range(NUM_STATES)]
    masks = torch.zeros(1, -(-VOCAB // 32), dtype=torch.int32)
    size = masks.numel() * 4
    row = MaskRow(masks.data_ptr(), memoryview(masks.numpy()).cast("B")[:size])  # type: ignore[arg-type]
    step: Any = SimpleNamespace(masks=masks, mask_rows=torch.zeros(1, dtype=torch.int32))
    rows, scores = torch.arange(1), torch.randn(1, VOCAB)
    lines = ["| behind | tokens allowed | fill us | apply us |", "|---|--:|--:|--:|"]
    written = ""
    for text in ("", '{"name": "', "Ada Lovelace", '", "age": ', '36, "tags": ["new", '):
        fills = []
        for state in states:
            assert state is not None
            assert all(map(state.advance, tokenizer.encode(text)))
            fills.append(quickest_us(partial(state.fill_mask, row, ()), 1))
        written += text
        fill = statistics.median(fills)
        allowed = sum(int(word).bit_count() for word in masks.view(torch.uint8)[0].tolist())
        apply = quickest_us(lambda: sampling._apply_masks(scores, rows, rows, step), 50)
        lines.append(f"| `{written}` | {allowed} | {fill:.0f} | {apply:.0f} |")
    grammars.close()
    tokenizer.close()
    return lines


def tokens_a_second(engine: Engine, prompt: array[int], bound: bytes) -> float:
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    for rid in range(NUM_REQUESTS):
        engine.add(0, pack_add(rid, params, prompt, seed=0, max_tokens=NUM_TOKENS, grammar=bound))
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return NUM_REQUESTS * NUM_TOKENS / (time.perf_counter() - start)


def measure_answers(num_rounds: int) -> str:
    """A line about whole answers of the demo model."""
    path = demo_model()
    tokenizer = Tokenizer.load(path)
    vocabulary = tokenizer.vocabulary()
    config = Config(model=str(path), device="cpu", dtype="bfloat16", num_pages=256)
    engine = Engine(config, path, len(vocabulary), sorted(tokenizer.eos_ids), silent, vocabulary)
    bound = grammar(tokenizer, PEOPLE)
    prompt = array("i", tokenizer.encode("A list of ten people, as JSON:\n"))
    rounds = []
    for index in range(num_rounds + 1):
        speeds = {}
        for is_bound in (index % 2 == 0, index % 2 != 0):
            speeds[is_bound] = tokens_a_second(engine, prompt, bound if is_bound else b"")
        rounds.append((speeds[True], speeds[False]))
    engine.close()
    tokenizer.close()
    with_schema, without = (statistics.median(side) for side in zip(*rounds[1:], strict=True))
    ratio = statistics.median(a / b for a, b in rounds[1:])
    return (
        f"demo model, {NUM_REQUESTS} requests of {NUM_TOKENS} tokens: {with_schema:.0f} tokens/s "
        f"with a JSON schema, {without:.0f} without: {ratio:.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What masks cost on a CPU.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print("\n".join(measure_masks()), flush=True)
    torch.set_num_threads(num_threads)
    print(measure_answers(rounds))


if __name__ == "__main__":
    main()
