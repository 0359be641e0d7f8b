"""The sampler: what the CUDA sampler must reproduce, and what the CPU backend runs.

For one row with logits l[0..vocab_limit), in float32 (ids from vocab_limit on are never sampled):

1. Penalties (HAS_PENALTIES), with c = how often the id was generated, seen = it was generated or is
   in the prompt: if seen, l = l / repetition where l > 0, else l * repetition; then
   l -= frequency * c + (presence if c > 0 else 0).
2. Bias (HAS_BIAS): l[id] += value; -inf bans an id. Mask (HAS_MASK): bans the ids whose bit is 0.
3. A row whose largest logit is not finite (a NaN anywhere, +inf, or all banned) gives token -1.
4. temperature < 1e-5: the largest l, lowest id on a tie. Else s = l / temperature.
5. A threshold on s keeps what all filters keep, ties included:
   top_k (0 or less, or >= vocab_limit: off): the k-th largest s;
   top_p (1: off): over the softmax of what top_k keeps, sorted descending, the last value of the
   smallest prefix whose probabilities sum to at least top_p;
   min_p (0: off): max(s) + log(min_p).
6. token = argmax over kept ids of s + g(id), lowest id on a tie (the Gumbel-max form of a draw
   from the softmax), with g = -log(-log(u)), u = ((w >> 9) + 0.5) * 2^-23, w = word (id & 3) of
   Philox4x32-10 (Salmon et al., SC 2011) with counter (id >> 2, position, 0, 0) and key
   (seed_lo, seed_hi). All of u's values are exact in float32 and inside (0, 1).

So a token depends on its logits, parameters, seed and position alone: not on the batch, its order
or the device. Since -2.82 < g < 16.64, ids more than ``MAX_GUMBEL_GAP`` below the maximum can never
win; they are skipped, and few words of Philox are computed.

Rows with HAS_LOGPROBS also get the log-softmax of l as it is after step 3: of the sampled token and
of the NUM_TOP largest.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from minisgl_fast.backend.step import (
    COUNT_MASK,
    HAS_BIAS,
    HAS_LOGPROBS,
    HAS_MASK,
    HAS_PENALTIES,
    IN_PROMPT,
    NUM_TOP,
    DeviceState,
    Logprobs,
    StepTensors,
)

MIN_TEMPERATURE = 1e-5
MAX_GUMBEL_GAP = 21.0
# Filters look at this many of the largest values first; rows for which that is not enough (flat
# distributions, a huge top_k) are looked at again with so many times more, at last all of them.
NUM_SORTED_FIRST = 128
SORTED_GROWTH = 16
# Philox is some 150 passes over int64 arrays: chunks of this many stay in the cache.
PHILOX_CHUNK = 1 << 14
# Noise for every id is cheaper than picking ids, unless fewer than one in so many is kept.
SPARSE_RATIO = 16

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
# For each byte of a mask what its eight bits leave of a float32: all bits of it, or none.
_KEPT = torch.tensor([[-(byte >> bit & 1) for bit in range(8)] for byte in range(256)]).int()
_MINUS_INF = torch.tensor(float("-inf")).view(torch.int32)


def sample(
    logits: Tensor,
    step: StepTensors,
    state: DeviceState,
    vocab_limit: int,
    logprobs: Logprobs | None = None,
) -> Tensor:
    """Sample logits [num_samples, vocab] -> int32 [num_samples]; updates ``state``.

    ``last_token`` of every sampled slot becomes the token (0 for a broken row, so that a step
    already under way never looks up -1), and rows with penalties count theirs. Rows with
    HAS_LOGPROBS fill theirs of ``logprobs``, if it is given.
    """
    logits = logits[:, :vocab_limit]
    flags = step.sample_flags
    is_special = (flags & (HAS_PENALTIES | HAS_BIAS | HAS_MASK) != 0) | (
        step.temperature >= MIN_TEMPERATURE
    )
    if logprobs is not None:
        is_special |= flags & HAS_LOGPROBS != 0
    rows = is_special.nonzero().flatten()
    if len(rows) == 0:
        tokens = _greedy(logits)
    else:
        tokens = logits.new_empty(len(logits), dtype=torch.int64)
        plain = (~is_special).nonzero().flatten()
        if len(plain):
            tokens[plain] = _greedy(logits[plain])
        scores = _take(logits, rows).to(torch.float32, copy=len(rows) == len(logits))
        tokens[rows] = _sample_rows(scores, rows, step, state, logprobs)
    slots = step.sample_slots.long()
    state.last_token[slots] = tokens.clamp(min=0).int()
    counted = ((flags & HAS_PENALTIES != 0) & (tokens >= 0)).nonzero().flatten()
    if len(counted):
        where = slots[counted], tokens[counted]
        counts = state.counts[where]
        state.counts[where] = counts + (counts & COUNT_MASK < COUNT_MASK)
    return tokens.int()


def reset_counts(state: DeviceState, slot: int, tokens: array[int], num_prompt: int) -> None:
    """Set ``state.counts[slot]`` to that of ``tokens``, the first ``num_prompt`` the prompt."""
    vocab_size = state.counts.shape[1]
    ids = torch.tensor(tokens, dtype=torch.int64)
    counts = torch.bincount(ids[num_prompt:], minlength=vocab_size).clamp_(max=COUNT_MASK)
    counts[ids[:num_prompt]] |= IN_PROMPT
    state.counts[slot] = counts.to(state.counts)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> Tensor:
    """Philox4x32-10: four words [..., 4] for every counter and key.

    Words are int64 holding 0..2^32-1; the first has the shape of the result, the others broadcast
    to it. A product of two words wraps around in int64 but keeps all its 64 bits, so shifts and
    masks take it apart exactly. Few and reused buffers: fresh memory would cost more than the
    arithmetic.
    """
    shape = counter[0].shape
    c0, c1, c2, c3 = (word.expand(shape) for word in counter)
    k0, k1 = (word.clone() for word in key)
    first, second, b0, b1, b2, b3 = torch.empty(6, *shape, dtype=torch.int64).unbind()
    for index in range(_NUM_ROUNDS):
        if index:
            k0.add_(_KEY_STEPS[0]).bitwise_and_(_WORD)
            k1.add_(_KEY_STEPS[1]).bitwise_and_(_WORD)
        torch.mul(c0, _MULTIPLIERS[0], out=first)
        torch.mul(c2, _MULTIPLIERS[1], out=second)
        torch.bitwise_right_shift(second, 32, out=b0)
        b0.bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_and(second, _WORD, out=b1)
        torch.bitwise_right_shift(first, 32, out=b2)
        b2.bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        torch.bitwise_and(first, _WORD, out=b3)
        c0, c1, c2, c3 = b0, b1, b2, b3
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _greedy(logits: Tensor) -> Tensor:
    values, ids = logits.max(dim=-1)
    return torch.where(values.isfinite(), ids, -1)


def _sample_rows(
    scores: Tensor, rows: Tensor, step: StepTensors, state: DeviceState, logprobs: Logprobs | None
) -> Tensor:
    """Tokens of samples ``rows``, which are more than an argmax; ``scores`` are used up."""
    flags = step.sample_flags[rows]
    penalized = (flags & HAS_PENALTIES != 0).nonzero().flatten()
    if len(penalized):
        scores[penalized] = _penalize(scores[penalized], rows[penalized], step, state)
    if bool((flags & HAS_BIAS != 0).any()):
        _add_bias(scores, rows[flags & HAS_BIAS != 0], rows, step)
    masked = (flags & HAS_MASK != 0).nonzero().flatten()
    if len(masked):
        _apply_masks(scores, masked, rows[masked], step)
    largest, tokens = scores.max(dim=-1)
    tokens = torch.where(largest.isfinite(), tokens, -1)
    drawn = ((step.temperature[rows] >= MIN_TEMPERATURE) & (tokens >= 0)).nonzero().flatten()
    if len(drawn):
        tokens[drawn] = _draw(_take(scores, drawn), _take(rows, drawn), step)
    if logprobs is not None:
        asked = (flags & HAS_LOGPROBS != 0).nonzero().flatten()
        if len(asked):
            _write_logprobs(_take(scores, asked), tokens[asked], rows[asked], logprobs)
    return tokens


def _write_logprobs(scores: Tensor, tokens: Tensor, rows: Tensor, out: Logprobs) -> None:
    """Rows ``rows`` of ``out``, from penalized and biased logits [n, vocab_limit] and tokens."""
    values = scores - scores.amax(dim=-1, keepdim=True)
    values -= values.exp().sum(dim=-1, keepdim=True, dtype=torch.float64).log().float()
    values.masked_fill_((tokens < 0).unsqueeze(1), float("-inf"))
    out.chosen[rows] = values.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
    top = scores.argsort(dim=-1, descending=True, stable=True)[:, :NUM_TOP]
    largest = values.gather(1, top)
    out.ids[rows], out.values[rows] = -1, float("-inf")
    out.ids[rows, : top.shape[1]] = torch.where(largest > float("-inf"), top, -1).int()
    out.values[rows, : top.shape[1]] = largest


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] of ascending rows; x itself if they are all of them."""
    return x if len(rows) == len(x) else x[rows]


def _penalize(scores: Tensor, rows: Tensor, step: StepTensors, state: DeviceState) -> Tensor:
    """Scores after step 1; only ids that were seen change, and they are few."""
    packed = state.counts[step.sample_slots[rows].long(), : scores.shape[1]]
    owner, ids = packed.nonzero(as_tuple=True)
    count = (packed[owner, ids] & COUNT_MASK).float()
    rows = rows[owner]
    seen = scores[owner, ids]
    repetition = step.repetition[rows]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    presence = torch.where(count > 0, step.presence[rows], 0.0)
    scores[owner, ids] = seen - (step.frequency[rows] * count + presence)
    return scores


def _add_bias(scores: Tensor, biased: Tensor, rows: Tensor, step: StepTensors) -> None:
    """Add the bias lists of samples ``biased`` to ``scores``, whose row i is sample rows[i]."""
    lengths = step.bias_start.diff()[: step.num_samples].long()
    owner = torch.arange(step.num_samples).repeat_interleave(lengths)
    place = torch.full((step.num_samples,), -1)
    place[rows] = torch.arange(len(rows))
    is_biased = torch.zeros(step.num_samples, dtype=torch.bool)
    is_biased[biased] = True
    first = int(step.bias_start[0])
    ids = step.bias_ids[first : first + len(owner)].long()
    values = step.bias_values[first : first + len(owner)]
    used = is_biased[owner] & (ids >= 0) & (ids < scores.shape[1])
    scores.index_put_((place[owner[used]], ids[used]), values[used], accumulate=True)


def _apply_masks(scores: Tensor, masked: Tensor, rows: Tensor, step: StepTensors) -> None:
    """Ban from ``scores[masked]``, which are samples ``rows``, the ids whose bit is 0."""
    assert step.masks is not None
    words = step.masks[step.mask_rows[rows].long()]
    # Words are little-endian, as everything here. By a choice for each element it takes ten times
    # as long.
    data = words.view(torch.uint8)
    kept = torch.index_select(_KEPT, 0, data.flatten().int())
    kept = kept.view(len(rows), -1)[:, : scores.shape[1]]
    for row, keeps in zip(masked.tolist(), kept, strict=True):
        bits = scores[row].view(torch.int32)
        bits.bitwise_and_(keeps).bitwise_or_(keeps.bitwise_not_().bitwise_and_(_MINUS_INF))


def _draw(scores: Tensor, rows: Tensor, step: StepTensors) -> Tensor:
    """Tokens drawn from penalized and biased logits [n, vocab_limit], row i as sample rows[i]."""
    scores = scores / step.temperature[rows].unsqueeze(1)
    largest = scores.amax(dim=-1)
    threshold = torch.maximum(largest - MAX_GUMBEL_GAP, largest + step.min_p[rows].log())
    vocab_limit = scores.shape[1]
    top_k, top_p = step.top_k[rows].long(), step.top_p[rows]
    top_k = torch.where((top_k > 0) & (top_k < vocab_limit), top_k, vocab_limit)
    filtered = ((top_k < vocab_limit) | (top_p < 1.0)).nonzero().flatten()
    if len(filtered):
        kept = _filter(_take(scores, filtered), top_k[filtered], top_p[filtered])
        threshold[filtered] = torch.maximum(threshold[filtered], kept)
    seed_lo, seed_hi = step.seed_lo[rows].long() & _WORD, step.seed_hi[rows].long() & _WORD
    positions = step.sample_positions[rows].long() & _WORD
    return _gumbel_argmax(scores, threshold, positions, seed_lo, seed_hi)


def _filter(
    scores: Tensor, top_k: Tensor, top_p: Tensor, num_sorted: int = NUM_SORTED_FIRST
) -> Tensor:
    """The smallest score that top_k and top_p keep, [n]; top_k = vocab_limit and top_p = 1: off.

    Looks at the ``num_sorted`` largest scores of each row, and for rows where more are needed again
    with more. Sums are float64, so that their order does not matter.
    """
    vocab_limit = scores.shape[1]
    num_sorted = min(num_sorted, vocab_limit)
    values = scores.topk(num_sorted, dim=-1).values
    weights = (values - values[:, :1]).exp_().double()
    has_top_k, has_top_p = top_k < vocab_limit, top_p < 1.0
    kth = values.gather(1, (top_k.clamp(max=num_sorted) - 1).unsqueeze(1))
    total = weights.masked_fill(values < kth, 0.0).sum(dim=-1)
    unlimited = (has_top_p & ~has_top_k).nonzero().flatten()
    if len(unlimited):
        shifted = _take(scores, unlimited) - values[unlimited, :1]
        total[unlimited] = shifted.exp_().sum(dim=-1, dtype=torch.float64)
    reached = weights.cumsum(dim=-1) >= (total * top_p).unsqueeze(1)
    last = values.gather(1, reached.int().argmax(dim=-1, keepdim=True))
    threshold = torch.where(has_top_k.unsqueeze(1), kth, float("-inf"))
    threshold = torch.where(has_top_p.unsqueeze(1), torch.maximum(threshold, last), threshold)
    # With top_k all that is kept must be in sight, its last ties too; without, the nucleus.
    sees_enough = torch.where(has_top_k, values[:, -1] < kth[:, 0], reached.any(dim=-1))
    rest = (~sees_enough).nonzero().flatten()
    if len(rest) and num_sorted < vocab_limit:
        num_sorted *= SORTED_GROWTH
        threshold[rest] = _filter(scores[rest], top_k[rest], top_p[rest], num_sorted).unsqueeze(1)
    return threshold.squeeze(1)


def _gumbel_argmax(
    scores: Tensor, threshold: Tensor, positions: Tensor, seed_lo: Tensor, seed_hi: Tensor
) -> Tensor:
    """argmax of score + g(id) over the ids of each row that reach its threshold, [n] int64."""
    num_rows, vocab_limit = scores.shape
    num_blocks = (vocab_limit + 3) // 4  # ids of a row that share a counter, four by four
    is_kept = scores >= threshold.unsqueeze(1)
    if int(is_kept.count_nonzero()) * SPARSE_RATIO > scores.numel():
        noise = torch.empty(num_rows, num_blocks, 4)
        rows_at_once = max(1, PHILOX_CHUNK // num_blocks)
        columns = torch.arange(num_blocks)
        for row in range(0, num_rows, rows_at_once):
            part = noise[row : row + rows_at_once]
            words = [x[row : row + rows_at_once, None] for x in (positions, seed_lo, seed_hi)]
            for first in range(0, num_blocks, PHILOX_CHUNK):
                blocks = columns[first : first + PHILOX_CHUNK].expand(len(part), -1)
                part[:, first : first + PHILOX_CHUNK] = _gumbel(blocks, *words)
        noisy = noise.view(num_rows, -1)[:, :vocab_limit].add_(scores)
        return noisy.masked_fill_(is_kept.logical_not_(), float("-inf")).argmax(dim=-1)

    rows, ids = is_kept.nonzero(as_tuple=True)
    blocks, block_of = torch.unique_consecutive(rows * num_blocks + (ids >> 2), return_inverse=True)
    noise = torch.empty(len(blocks), 4)
    for first in range(0, len(blocks), PHILOX_CHUNK):
        part = blocks[first : first + PHILOX_CHUNK]
        row = part // num_blocks
        words = [x[row] for x in (positions, seed_lo, seed_hi)]
        noise[first : first + PHILOX_CHUNK] = _gumbel(part % num_blocks, *words)
    candidates = scores[rows, ids] + noise[block_of, ids & 3]
    best = torch.full_like(threshold, float("-inf")).scatter_reduce_(0, rows, candidates, "amax")
    wins = candidates == best[rows]
    tokens = torch.full_like(positions, vocab_limit)
    return tokens.scatter_reduce_(0, rows[wins], ids[wins], "amin")


def _gumbel(blocks: Tensor, positions: Tensor, seed_lo: Tensor, seed_hi: Tensor) -> Tensor:
    """g [..., 4] of the ids 4 * blocks .. 4 * blocks + 3."""
    zero = torch.zeros((), dtype=torch.int64)
    words = philox4x32((blocks, positions, zero, zero), (seed_lo, seed_hi))
    uniform = words.bitwise_right_shift_(9).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()
