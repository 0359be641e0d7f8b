"""The sampler on the GPU against backend/sampling.py, exact odds and itself."""

from __future__ import annotations

import dataclasses
import random
from array import array

import pytest
import torch
from sample_driver import (
    CPU,
    CUDA,
    NEG_INF,
    SAMPLE_FIELDS,
    draw_biases,
    draw_logits,
    draw_params,
    make_sampler,
    make_states,
    part_of,
)
from step_driver import FILTERS, make_step, to_cuda

from minisgl_fast.backend import sampling
from minisgl_fast.backend.step import (
    COUNT_MASK,
    HAS_BIAS,
    HAS_LOGPROBS,
    HAS_MASK,
    HAS_PENALTIES,
    IN_PROMPT,
    Logprobs,
    StepTensors,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def kept_ids(scores: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Which of the float64 scores the filters keep, by a plain sort."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < len(scores):
        kept &= scores >= scores.sort(descending=True).values[top_k - 1]
    if top_p < 1:
        weights = torch.where(kept, (scores - scores.max()).exp(), 0)
        order = scores.argsort(descending=True)
        reached = weights[order].cumsum(0) >= top_p * weights.sum()
        last = int(reached.int().argmax()) if reached.any() else len(order) - 1
        kept &= scores >= scores[order[last]]
    if min_p > 0:
        kept &= scores >= scores.max() + torch.tensor(min_p).double().log()
    return kept


def is_explained(logits: torch.Tensor, step: StepTensors, row: int, token: int) -> bool:
    """Whether float rounding at a threshold, or between two ids, can have given this token."""
    scores = logits.double() / float(step.temperature[row])
    close = 1e-5 + 3e-7 * float(scores[scores > NEG_INF].abs().max())
    filters = [
        (int(step.top_k[row]), float(step.top_p[row]) * change, float(step.min_p[row]) * change)
        for change in (1 - 1e-5, 1, 1 + 1e-5)
    ]
    kept = torch.stack([kept_ids(scores, k, p, m) for k, p, m in filters])
    possible, certain = kept.any(0), kept.all(0)
    ids = torch.arange(len(scores))
    words = sampling.philox4x32(
        (ids >> 2, step.sample_positions[row].long() & 0xFFFFFFFF, *torch.zeros(2).long()),
        (step.seed_lo[row].long() & 0xFFFFFFFF, step.seed_hi[row].long() & 0xFFFFFFFF),
    )
    words = words.gather(1, (ids & 3).unsqueeze(1)).squeeze(1)
    noisy = scores - (-(((words >> 9) + 0.5) * 2.0**-23).log()).log()
    return bool(possible[token]) and bool(noisy[token] >= noisy[certain].max() - close)


CASES = [
    # vocabulary, rows, ids that may be sampled, float32 logits
    (151936, 112, 151669, False),
    (151936, 28, 151669, True),
    (128256, 56, 128256, False),
    (49152, 210, 49152, False),
    (32000, 315, 31990, False),
    (32000, 105, 31990, True),
    (5003, 700, 5003, False),
    (5003, 700, 4997, True),
    (17, 700, 17, False),
    (17, 28, 17, False),
    (17, 28, 17, True),
]


@pytest.mark.parametrize(("vocab", "rows", "limit", "is_float"), CASES)
@pytest.mark.parametrize("flags", [0, HAS_PENALTIES | HAS_BIAS])
def test_tokens_are_those_of_the_cpu(vocab, rows, limit, is_float, flags):
    rng = random.Random(vocab + rows + flags)
    generator = torch.Generator().manual_seed(vocab + flags)
    logits = draw_logits(rows, vocab, generator)
    logits[:, limit:] = 1e6  # must never be sampled
    logits = logits if is_float else logits.bfloat16()
    params = draw_params(rows, limit, flags, rng)
    slots = rng.sample(range(rows), rows)
    positions = [rng.randrange(2**31) for _ in range(rows)]
    biases = draw_biases(rows, limit, rng) if flags else None
    step = make_step(sample_slots=slots, sample_positions=positions, params=params, biases=biases)
    for first in step.bias_start[:-1].tolist() if flags else ():
        step.bias_ids[first + 1] = step.bias_ids[first]  # banned and biased: banned
    cpu, gpu = make_states(rows, vocab)
    if flags:
        cpu.counts.random_(0, 40, generator=generator)
        cpu.counts[cpu.counts > 3] = 0
        cpu.counts[:, 1::5] |= IN_PROMPT
        cpu.counts[:, 2] = COUNT_MASK
        gpu.counts.copy_(cpu.counts)
    before = cpu.counts.clone()

    expected = sampling.sample(logits.clone(), step, cpu, limit)
    padded = torch.nn.functional.pad(logits, (0, -vocab % 8), value=float("nan")).cuda()
    cuda_step = to_cuda(step)
    sampler = make_sampler(rows, vocab, (1,))
    tokens = sampler(padded, cuda_step, gpu, limit)
    torch.cuda.synchronize()
    assert torch.equal(gpu.last_token[torch.tensor(slots).cuda()], tokens)

    got = tokens.cpu()
    wrong = (got != expected).nonzero().flatten().tolist()
    scores = logits[wrong, :limit].float()
    if wrong and flags:
        chosen = torch.tensor(wrong)
        cpu.counts.copy_(before)
        has_penalties = step.sample_flags[chosen] & HAS_PENALTIES != 0
        scores[has_penalties] = sampling._penalize(
            scores[has_penalties], chosen[has_penalties], step, cpu
        )
        sampling._add_bias(scores, chosen[step.sample_flags[chosen] & HAS_BIAS != 0], chosen, step)
    for row, row_scores in zip(wrong, scores, strict=True):
        token = int(got[row])
        assert token >= 0 and step.temperature[row] >= 1e-5, (row, params[row])
        assert is_explained(row_scores, step, row, token), (row, token, params[row])
    assert len(wrong) <= 1 + rows // 100

    agrees = (got == expected).cuda()
    where = torch.tensor(slots)
    assert torch.equal(
        gpu.counts[where.cuda()][agrees].cpu(),
        _counts_after(before[where], expected, step)[agrees.cpu()],
    )

    # The same from clusters of blocks, and from parts of the batch: equal bits.
    if not is_float:
        together = make_sampler(rows, vocab)
        for size in (120, 30, 16):  # 2, 4 and 8 blocks a row on a chip of 132 SMs
            gpu.counts.copy_(before)
            for first in range(0, min(rows, 360), size):
                last = min(first + size, rows)
                part = together(padded[first:last], part_of(cuda_step, first, last), gpu, limit)
                assert torch.equal(part, tokens[first:last])


def _counts_after(counts: torch.Tensor, tokens: torch.Tensor, step: StepTensors) -> torch.Tensor:
    counts = counts.clone()
    for row, token in enumerate(tokens.tolist()):
        has_penalties = int(step.sample_flags[row]) & HAS_PENALTIES
        if has_penalties and token >= 0 and counts[row, token] & COUNT_MASK < COUNT_MASK:
            counts[row, token] += 1
    return counts


@pytest.mark.parametrize("cluster", [1, 4])
def test_broken_rows_give_minus_one_and_padding_rows_are_harmless(cluster):
    vocab = 4000
    filters: list[dict[str, float]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 50, "sample_flags": HAS_PENALTIES},
        {"temperature": 1.0, "min_p": 0.1},
    ]
    clean = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = clean.repeat_interleave(5, 0)
    rows[0::5, 3999] = float("nan")
    rows[1::5, 17] = float("inf")
    rows[2::5] = NEG_INF
    biases = [dict.fromkeys(range(vocab), NEG_INF) if i % 5 == 3 else {} for i in range(25)]
    params = [dict(filters[i // 5]) for i in range(25)]
    for i in range(3, 25, 5):
        params[i]["sample_flags"] = int(params[i].get("sample_flags", 0)) | HAS_BIAS
    step = make_step(sample_slots=list(range(25)), params=params, biases=biases)
    cpu, gpu = make_states(40, vocab)
    gpu.last_token.fill_(77)
    sampler = make_sampler(40, vocab, (1, cluster))
    tokens = sampler(rows.cuda(), to_cuda(step), gpu, vocab).cpu()
    expected = sampling.sample(rows.clone(), step, cpu, vocab)
    assert tokens.tolist() == expected.tolist()
    assert (tokens.view(5, 5)[:, :4] == -1).all() and (tokens.view(5, 5)[:, 4] >= 0).all()
    assert gpu.last_token[:25].tolist() == tokens.clamp(min=0).tolist()
    assert (gpu.last_token[25:] == 77).all()
    # Rows that pad a graph share the scratch slot and disturb no other.
    padding = make_step(sample_slots=[0, 40, 40, 40], params=[filters[1], {}, {}, {}])
    before = gpu.counts.clone()
    four = torch.cat((clean[:1], rows[:3])).cuda()
    alone = part_of(to_cuda(padding), 0, 1)
    assert sampler(four, to_cuda(padding), gpu, vocab)[0] == sampler(four[:1], alone, gpu, vocab)[0]
    assert torch.equal(gpu.counts, before)
    assert (gpu.last_token[25:40] == 77).all()


def test_no_rows_is_no_launch():
    _, gpu = make_states(4, 64)
    empty = torch.empty(0, 64, dtype=torch.bfloat16, device=CUDA)
    assert make_sampler(4, 64)(empty, to_cuda(make_step()), gpu, 64).shape == (0,)


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_have_the_exact_distribution(name, is_float):
    n, vocab = 200_000, 64
    logits = (torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5).bfloat16()
    params = {"temperature": 1.0, "seed_lo": 12345, "seed_hi": -7, "top_k": 0, "top_p": 1.0}
    params |= {"min_p": 0.0} | FILTERS[name]
    scores = logits.double() / params["temperature"]
    kept = kept_ids(scores, int(params["top_k"]), params["top_p"], params["min_p"])
    odds = torch.where(kept, scores, NEG_INF).softmax(0)
    step = to_cuda(make_step(sample_slots=[0], params=[params]))
    many = {field: getattr(step, field).expand(n).contiguous() for field in SAMPLE_FIELDS}
    many["sample_positions"] = torch.arange(n, dtype=torch.int32, device=CUDA)
    many["bias_start"] = torch.zeros(n + 1, dtype=torch.int32, device=CUDA)
    step = dataclasses.replace(step, num_samples=n, **many)
    _, gpu = make_states(1, vocab)
    rows = logits.to(torch.float32 if is_float else torch.bfloat16).cuda().expand(n, -1)
    tokens = make_sampler(1, vocab)(rows.contiguous(), step, gpu, vocab)
    counts = torch.bincount(tokens.long(), minlength=vocab).double().cpu()
    assert counts[odds == 0].sum() == 0
    expected = odds[odds > 0] * n
    statistic = float(((counts[odds > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("vocab", [151936, 5003, 11])
@pytest.mark.parametrize("rows", [14, 280])
def test_logprobs_are_those_of_the_cpu(vocab, rows):
    limit = vocab - 3
    rng = random.Random(rows)
    if vocab > 100_000 and rows > 100:
        rows = 140
    logits = draw_logits(rows, vocab, torch.Generator().manual_seed(vocab)).bfloat16()
    logits[min(8, rows - 1), 3] = float("nan")
    params = draw_params(rows, limit, HAS_PENALTIES | HAS_BIAS, rng)
    for i, one in enumerate(params):
        one["sample_flags"] = int(one["sample_flags"]) | (HAS_LOGPROBS if i % 4 else 0)
    biases = draw_biases(rows, limit, rng)
    step = make_step(sample_slots=list(range(rows)), params=params, biases=biases)
    cpu, gpu = make_states(rows, vocab)
    cpu.counts[:, ::3] = 2
    gpu.counts.copy_(cpu.counts)
    expected, got = Logprobs.allocate(rows, CPU), Logprobs.allocate(rows, CUDA)
    for one in (expected, got):
        one.ids.fill_(-9), one.values.fill_(-9), one.chosen.fill_(-9)
    cpu_tokens = sampling.sample(logits.clone(), step, cpu, limit, expected)
    padded = torch.nn.functional.pad(logits, (0, -vocab % 8)).cuda()
    sampler = make_sampler(rows, vocab)
    before = gpu.counts.clone()
    tokens = sampler(padded, to_cuda(step), gpu, limit, got)
    same = tokens.cpu() == cpu_tokens
    assert same.float().mean() > 0.98
    assert torch.equal(got.ids.cpu(), expected.ids)
    scale = logits[:, :limit].float().nan_to_num().abs().amax(1).clamp(min=1)
    for a, b in ((got.values.cpu(), expected.values), (got.chosen.cpu()[:, None], None)):
        b = expected.chosen[:, None] if b is None else b
        rows_alike = same if a.shape[1] == 1 else torch.ones_like(same)
        finite = (b > NEG_INF) & rows_alike[:, None]
        assert torch.equal((a > NEG_INF)[rows_alike], (b > NEG_INF)[rows_alike])
        assert ((a - b).abs() / scale[:, None])[finite].max() < 1e-5
    # Alone as together, and without the output nothing but the token.
    for first in range(0, min(rows, 20), 5):
        gpu.counts.copy_(before)
        again = Logprobs.allocate(5, CUDA)
        part = part_of(to_cuda(step), first, min(first + 5, rows))
        part_tokens = sampler(padded[first : first + 5], part, gpu, limit, again)
        count = len(part_tokens)
        asked = part.sample_flags & HAS_LOGPROBS != 0
        assert torch.equal(part_tokens, tokens[first : first + count])
        for name in ("ids", "values", "chosen"):
            whole = getattr(got, name)[first : first + count]
            assert torch.equal(getattr(again, name)[:count][asked], whole[asked])
    gpu.counts.copy_(before)
    assert torch.equal(sampler(padded, to_cuda(step), gpu, limit), tokens)


def test_runs_repeat_bit_for_bit_in_a_graph():
    rows, vocab = 64, 151936
    rng = random.Random(5)
    logits = draw_logits(rows, vocab, torch.Generator().manual_seed(5)).bfloat16().cuda()
    params = draw_params(rows, vocab, HAS_BIAS, rng)
    biases = draw_biases(rows, vocab, rng)
    step = to_cuda(make_step(sample_slots=list(range(rows)), params=params, biases=biases))
    _, gpu = make_states(rows, vocab)
    sampler = make_sampler(rows, vocab)
    first = sampler(logits, step, gpu, vocab).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampler(logits, step, gpu, vocab)
    for _ in range(20):
        tokens.fill_(-5)
        graph.replay()
        assert torch.equal(tokens, first)


@pytest.mark.parametrize("vocab", [151936, 5003])
def test_reset_counts_counts_a_history(vocab):
    cpu, gpu = make_states(3, vocab)
    gpu.counts.fill_(-1)
    rng = random.Random(vocab)
    sampler = make_sampler(3, vocab)
    for slot, (num_prompt, total) in enumerate([(700, 3000), (0, 20_000), (1, 1), (0, 0)]):
        tokens = array("i", [rng.randrange(50 if i % 2 else vocab) for i in range(total)])
        if slot == 1:
            tokens = array("i", [1] * total)
        sampler.reset_counts(gpu, slot, tokens, num_prompt)
        sampling.reset_counts(cpu, slot, tokens, num_prompt)
    assert torch.equal(gpu.counts.cpu(), cpu.counts)


@pytest.mark.parametrize("vocab", [75, 5003])
@pytest.mark.parametrize("rows", [3, 300])
def test_masks_ban_what_they_ban_on_the_cpu(rows: int, vocab: int) -> None:
    generator, rng = torch.Generator().manual_seed(rows), random.Random(vocab)
    logits = draw_logits(rows, vocab, generator).bfloat16()
    flags = [HAS_MASK, HAS_MASK | HAS_PENALTIES, 0]
    params = [
        one | {"sample_flags": rng.choice(flags), "mask_rows": rng.randrange(rows)}
        for one in draw_params(rows, vocab, 0, rng)
    ]
    step = make_step(sample_slots=list(range(rows)), params=params)
    shape = (rows, -(-vocab // 32))
    step.masks = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
    step.masks[0] = 0  # nothing is allowed: a broken row
    cpu, gpu = make_states(rows, vocab)
    expected = sampling.sample(logits.float(), step, cpu, vocab)
    padded = torch.nn.functional.pad(logits, (0, -vocab % 8)).cuda()
    tokens = make_sampler(rows, vocab)(padded, to_cuda(step), gpu, vocab)
    assert torch.equal(tokens.cpu(), expected)
