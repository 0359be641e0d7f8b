"""The sampler against published Philox vectors, an independent numpy version and exact odds."""

from __future__ import annotations

from array import array
from typing import Any

import numpy
import pytest
import torch
from step_driver import FILTERS, make_step

from minisgl_fast.backend import sampling
from minisgl_fast.backend.sampling import philox4x32, reset_counts, sample
from minisgl_fast.backend.step import (
    COUNT_MASK,
    HAS_BIAS,
    HAS_MASK,
    HAS_PENALTIES,
    IN_PROMPT,
    DeviceState,
    StepTensors,
)

torch.set_num_threads(1)


def make_state(vocab_size: int, max_seqs: int = 8) -> DeviceState:
    return DeviceState(max_seqs, 1, vocab_size, torch.device("cpu"))


def draw_many(logits: torch.Tensor, n: int, **params: float) -> torch.Tensor:
    """n draws from one row of logits, at positions 0..n-1; params as in StepTensors."""
    step = make_step(sample_slots=[0] * n, sample_positions=list(range(n)), params=[params] * n)
    return sample(logits.expand(n, -1), step, make_state(len(logits)), len(logits))


# Random123's known answers (kat_vectors, philox4x32 with 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert philox4x32((c0, c1, c2, c3), (k0, k1)).tolist() == [expected]


def numpy_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 for one counter, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high, low = divmod(0xD2511F53 * c[0], 2**32)
        high2, low2 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high2 ^ c[1] ^ k[0], low2, high ^ c[3] ^ k[1], low]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def numpy_sample(
    logits: numpy.ndarray, p: dict[str, Any], bias: dict[int, float], history: Any, position: int
) -> int:
    """The specification once more, one row and one id at a time, in float64 where it may be."""
    x = logits.astype(numpy.float32).copy()
    prompt, output = history
    if p["sample_flags"] & HAS_PENALTIES:
        for token in range(len(x)):
            count = output.count(token)
            if count or token in prompt:
                x[token] = (
                    x[token] / numpy.float32(p["repetition"])
                    if x[token] > 0
                    else x[token] * numpy.float32(p["repetition"])
                )
            x[token] -= numpy.float32(p["frequency"]) * count + (p["presence"] if count else 0)
    if p["sample_flags"] & HAS_BIAS:
        for token, value in bias.items():
            x[token] += numpy.float32(value)
    if p["temperature"] == 0:
        return int(x.argmax())
    s = x / numpy.float32(p["temperature"])
    kept = numpy.ones(len(s), bool)
    if p["top_k"] > 0:
        kept &= s >= sorted(s, reverse=True)[min(p["top_k"], len(s)) - 1]
    if p["top_p"] < 1:
        weights = numpy.where(kept, numpy.exp(s.astype(numpy.float64) - s.max()), 0)
        order = numpy.argsort(-s, kind="stable")
        total = numpy.cumsum(weights[order]) / weights.sum()
        last = order[int(numpy.argmax(total >= p["top_p"]))]
        kept &= s >= s[last]
    if p["min_p"] > 0:
        kept &= s >= s.max() + numpy.log(numpy.float32(p["min_p"]))
    best, best_score = -1, -numpy.inf
    for token in numpy.flatnonzero(kept):
        key = [int(p["seed_lo"]) % 2**32, int(p["seed_hi"]) % 2**32]
        word = numpy_philox([int(token) >> 2, position, 0, 0], key)[token & 3]
        u = ((word >> 9) + 0.5) / 2**23
        score = float(s[token]) - numpy.log(-numpy.log(u))
        if score > best_score:
            best, best_score = int(token), score
    return best


def random_case(random: numpy.random.Generator, vocab_limit: int) -> dict[str, Any]:
    return {
        "temperature": float(random.choice([0.0, 0.3, 1.0, 2.0])),
        "top_k": int(random.choice([0, -1, 1, 5, 40, 10_000])),
        "top_p": float(random.choice([1.0, 0.9, 0.5, 0.01])),
        "min_p": float(random.choice([0.0, 0.05, 0.5])),
        "seed_lo": int(random.integers(-(2**31), 2**31)),
        "seed_hi": int(random.integers(-(2**31), 2**31)),
        "presence": float(random.uniform(-2, 2)),
        "frequency": float(random.uniform(-2, 2)),
        "repetition": float(random.uniform(0.5, 2)),
        "sample_flags": int(random.integers(0, 4)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_limit", [61, 97])
def test_a_mixed_batch_gives_what_the_numpy_version_gives(vocab_limit, dtype):
    random = numpy.random.default_rng(vocab_limit)
    vocab_size, n = vocab_limit + 7, 24
    state = make_state(vocab_size, max_seqs=n)
    for round_ in range(6):
        logits = torch.from_numpy(random.normal(0, 4, (n, vocab_size))).to(dtype)
        logits[:, vocab_limit:] = 1000.0  # padding of the vocabulary must never win
        slots = random.permutation(n).tolist()
        positions = random.integers(0, 2**31, n).tolist()
        params = [random_case(random, vocab_limit) for _ in range(n)]
        histories, biases = [], []
        for row in range(n):
            prompt = random.integers(0, vocab_limit, 20).tolist()
            output = random.integers(0, 12, round_ * 5).tolist()
            histories.append((prompt, output))
            reset_counts(state, slots[row], array("i", prompt + output), len(prompt))
            ids = random.choice(vocab_limit, 5, replace=False).tolist()
            values = [-numpy.inf, *random.uniform(-100, 100, 4).tolist()]
            biases.append(dict(zip(ids, values, strict=True)) if row % 3 else {})
        step = make_step(
            sample_slots=slots, sample_positions=positions, params=params, biases=biases
        )
        before = logits.clone()
        tokens = sample(logits, step, state, vocab_limit)
        assert torch.equal(logits, before)
        rows = logits.float().numpy()[:, :vocab_limit]
        expected = [
            numpy_sample(rows[i], params[i], biases[i], histories[i], positions[i])
            for i in range(n)
        ]
        assert tokens.tolist() == expected
        assert tokens.dtype == torch.int32
        assert state.last_token[slots].tolist() == expected
        for i in range(n):  # the sampled token of a row with penalties is counted
            counted = bool(params[i]["sample_flags"] & HAS_PENALTIES)
            count = histories[i][1].count(expected[i]) + counted
            assert state.counts[slots[i], expected[i]] & COUNT_MASK == count


def exact_odds(logits: torch.Tensor, params: dict[str, float]) -> torch.Tensor:
    s = logits.double() / params.get("temperature", 1.0)
    odds = s.softmax(-1)
    order = odds.argsort(descending=True)
    top_k = int(params.get("top_k", 0)) or len(s)
    odds[order[top_k:]] = 0.0
    odds /= odds.sum()
    before = odds[order].cumsum(0) - odds[order]
    odds[order[before >= params.get("top_p", 1.0)]] = 0.0
    odds[odds < params.get("min_p", 0.0) * odds.max()] = 0.0
    return odds / odds.sum()


@pytest.mark.parametrize("name", FILTERS)
def test_draws_have_the_exact_distribution(name):
    n = 200_000
    logits = torch.randn(23, generator=torch.Generator().manual_seed(1)) * 1.5
    params = {"temperature": 1.0, "seed_lo": 12345, "seed_hi": -7, **FILTERS[name]}
    odds = exact_odds(logits, params)
    counts = torch.bincount(draw_many(logits, n, **params), minlength=23).double()
    assert counts[odds == 0].sum() == 0
    expected = odds[odds > 0] * n
    statistic = float(((counts[odds > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_draws_of_different_seeds_are_independent_of_each_other():
    n = 50_000
    logits = torch.zeros(4)
    params = [{"temperature": 1.0, "seed_lo": i} for i in range(n)]
    step = make_step(sample_slots=[0] * n, sample_positions=[5] * n, params=params)
    tokens = sample(logits.expand(n, -1), step, make_state(4), 4)
    pairs = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).double()
    expected = (n - 1) / 16
    assert ((pairs - expected) ** 2 / expected).sum() < 15 + 4 * 30**0.5


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.999},  # a nucleus far beyond what is sorted first
        {"top_k": 3000},
        {"top_k": 3000, "top_p": 0.9},
        {"top_k": 1024, "top_p": 0.95},
        {"top_p": 0.2},
    ],
)
def test_flat_distributions_are_filtered_as_exactly_as_peaked_ones(params):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 0.3
    odds = exact_odds(logits, params)
    tokens = draw_many(logits, 400, temperature=1.0, **params)
    assert (odds[tokens.long()] > 0).all()
    scores = logits[None]
    top_k = torch.tensor([int(params.get("top_k", 5000))])
    threshold = sampling._filter(scores, top_k, torch.tensor([params.get("top_p", 1.0)]))
    assert int((scores >= threshold[:, None]).sum()) == int((odds > 0).sum())


def test_ties_at_the_edge_of_a_filter_are_all_kept():
    logits = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
    assert set(draw_many(logits, 500, temperature=1.0, top_k=2).tolist()) == {0, 1, 2, 3}
    assert set(draw_many(logits, 500, temperature=1.0, top_p=0.6).tolist()) == {0, 1, 2, 3}
    assert set(draw_many(logits, 500, temperature=1.0, top_p=0.4).tolist()) == {0}
    assert set(draw_many(logits, 500, temperature=1.0, min_p=0.36).tolist()) == {0, 1, 2, 3}
    flat = torch.zeros(3000)  # more ties than are sorted first
    assert draw_many(flat, 300, temperature=1.0, top_k=2).unique().numel() > 200
    assert draw_many(flat, 300, temperature=1.0, top_p=0.01).unique().numel() > 200


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    step = make_step(sample_slots=[0, 1])
    for dtype in (torch.float32, torch.bfloat16):
        assert sample(logits.to(dtype), step, make_state(4), 4).tolist() == [1, 0]


def test_a_vanishing_temperature_is_greedy():
    logits = torch.tensor([1.0, 3.0, 2.0])
    for temperature in (1e-40, 1e-9, 9e-6, 1.1e-5):
        assert set(draw_many(logits, 50, temperature=temperature).tolist()) == {1}


def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 500, generator=generator)
    names = list(FILTERS)
    params = [
        {"temperature": 1.0, **FILTERS[names[i % len(names)]], "seed_lo": i * 77} for i in range(12)
    ]

    def tokens_of(order: list[int]) -> list[int]:
        step = make_step(
            sample_slots=order, sample_positions=[9] * len(order), params=[params[i] for i in order]
        )
        return sample(logits[order], step, make_state(500, 12), 500).tolist()

    together = tokens_of(list(range(12)))
    assert tokens_of(list(range(11, -1, -1))) == together[::-1]
    assert [tokens_of([i])[0] for i in range(12)] == together
    assert len(set(together)) > 6


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_a_broken_row_gives_minus_one_and_harms_no_other(params):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    clean = logits.clone()
    logits[1, 17] = float("nan")
    logits[2] = float("nan")
    logits[3] = float("-inf")
    logits[4, 0] = float("inf")
    state = make_state(40)
    step = make_step(sample_slots=list(range(6)), params=[params] * 6)
    tokens = sample(logits, step, state, 40).tolist()
    expected = sample(clean, step, make_state(40), 40).tolist()
    assert tokens == [expected[0], -1, -1, -1, -1, expected[5]]
    # A step under way may look its input up there already: it must find an id.
    assert state.last_token[:6].tolist() == [expected[0], 0, 0, 0, 0, expected[5]]


def test_banning_every_id_breaks_only_that_row():
    state = make_state(8)
    biases = [dict.fromkeys(range(8), float("-inf")), {3: float("-inf")}]
    params = [{"sample_flags": HAS_BIAS}, {"sample_flags": HAS_BIAS}]
    step = make_step(sample_slots=[0, 1], params=params, biases=biases)
    logits = torch.tensor([[0.0, 1, 2, 9, 4, 5, 6, 7]] * 2)
    assert sample(logits, step, state, 8).tolist() == [-1, 7]


def test_bias_of_unflagged_rows_and_of_ids_past_the_limit_is_ignored():
    biases = [{0: 100.0}, {7: 100.0, 1: 50.0}]
    params = [{"sample_flags": 0}, {"sample_flags": HAS_BIAS}]
    step = make_step(sample_slots=[0, 1], params=params, biases=biases)
    logits = torch.tensor([[0.0, 1, 2, 9, 4, 5, 6, 7]] * 2)
    assert sample(logits, step, make_state(8), 6).tolist() == [3, 1]


def test_counts_saturate_and_keep_the_prompt_bit():
    state = make_state(4)
    reset_counts(state, 2, array("i", [1] + [1] * 20_000), 1)
    assert state.counts[2].tolist() == [0, COUNT_MASK | IN_PROMPT, 0, 0]
    step = make_step(sample_slots=[2], params=[{"sample_flags": HAS_PENALTIES}])
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0]])
    assert sample(logits, step, state, 4).tolist() == [1]
    assert state.counts[2].tolist() == [0, COUNT_MASK | IN_PROMPT, 0, 0]
    reset_counts(state, 2, array("i", [3]), 1)
    assert state.counts[2].tolist() == [0, 0, 0, IN_PROMPT]
    reset_counts(state, 2, array("i"), 0)
    assert state.counts[2].tolist() == [0, 0, 0, 0]


def test_no_samples_is_no_work():
    step: StepTensors = make_step()
    assert sample(torch.empty(0, 9), step, make_state(9), 9).tolist() == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_bans_the_ids_whose_bit_is_0_and_nothing_else(temperature):
    generator = torch.Generator().manual_seed(5)
    vocab_size, num_rows = 75, 24
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    allowed = torch.rand(num_rows, 96, generator=generator) < 0.2
    allowed[3] = False
    weights = 2 ** torch.arange(32)
    words = (allowed.view(num_rows, 3, 32).long() * weights).sum(dim=-1)
    masks = torch.where(words >= 2**31, words - 2**32, words).int()
    order = torch.randperm(num_rows, generator=generator)
    rows = {
        "temperature": temperature, "top_k": 20, "top_p": 0.9, "sample_flags": HAS_MASK
    }  # fmt: skip
    params = [rows | {"seed_lo": i, "mask_rows": int(order[i])} for i in range(num_rows)]
    params[5] |= {"sample_flags": 0}
    slots = [i % 8 for i in range(num_rows)]
    step = make_step(sample_slots=slots, params=params)
    step.masks = masks
    tokens = sample(logits, step, make_state(vocab_size), vocab_size)

    banned = ~allowed[order, :vocab_size]
    banned[5] = False
    plain = make_step(
        sample_slots=slots, params=[{**one, "sample_flags": HAS_BIAS} for one in params],
        biases=[dict.fromkeys(row.nonzero().flatten().tolist(), float("-inf")) for row in banned],
    )  # fmt: skip
    assert tokens.equal(sample(logits, plain, make_state(vocab_size), vocab_size))
    broken = int((order == 3).nonzero())
    assert [i for i, token in enumerate(tokens.tolist()) if token < 0] == [broken]
