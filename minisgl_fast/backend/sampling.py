"""The sampler: what the CUDA sampler must reproduce, and what the CPU backend runs.

For one row with logits l[0..vocab_limit), in float32 (ids from vocab_limit on are never sampled):

1. Penalties (HAS_PENALTIES), with c = how often the id was generated, seen = it was generated or is
   in the prompt: if seen, l = l / repetition where l > 0, else l * repetition; then
   l -= frequency * c + (presence if c > 0 else 0).
2. Bias (HAS_BIAS): l[id] += value; -inf bans an id.
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
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from minisgl_fast.backend.step import (
    COUNT_MASK,
    HAS_BIAS,
    HAS_PENALTIES,
    IN_PROMPT,
    DeviceState,
    StepTensors,
)

MIN_TEMPERATURE = 1e-5
MAX_GUMBEL_GAP = 21.0
# Filters look at this many of the largest values first; rows for which that is not enough (flat
# distributions, a huge top_k) are sorted whole.
NUM_SORTED_FIRST = 1024
# Philox is some 100 passes over int64 arrays: chunks of this many stay in the cache.
PHILOX_CHUNK = 1 << 14

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def sample(logits: Tensor, step: StepTensors, state: DeviceState, vocab_limit: int) -> Tensor:
    """Sample logits [num_samples, vocab] -> int32 [num_samples]; updates ``state``.

    ``last_token`` of every sampled slot becomes the token (0 for a broken row, so that a step
    already under way never looks up -1), and rows with penalties count theirs.
    """
    logits = logits[:, :vocab_limit]
    flags = step.sample_flags
    is_special = (flags & (HAS_PENALTIES | HAS_BIAS) != 0) | (step.temperature >= MIN_TEMPERATURE)
    rows = is_special.nonzero().flatten()
    if len(rows) == 0:
        tokens = _greedy(logits)
    else:
        tokens = logits.new_empty(len(logits), dtype=torch.int64)
        plain = (~is_special).nonzero().flatten()
        if len(plain):
            tokens[plain] = _greedy(logits[plain])
        tokens[rows] = _sample_rows(logits[rows].float(), rows, step, state)
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

    Words are int64 tensors holding 0..2^32-1, broadcast against each other. A product of two
    words wraps around in int64 but keeps all 64 bits, so shifts and masks take it apart exactly.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for index in range(_NUM_ROUNDS):
        if index:
            k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (second >> 32) & _WORD ^ c1 ^ k0, (first >> 32) & _WORD ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _greedy(logits: Tensor) -> Tensor:
    values, ids = logits.max(dim=-1)
    return torch.where(values.isfinite(), ids, -1)


def _sample_rows(scores: Tensor, rows: Tensor, step: StepTensors, state: DeviceState) -> Tensor:
    """Tokens of those samples (``rows``) that are more than an argmax of their logits."""
    flags = step.sample_flags[rows]
    penalized = (flags & HAS_PENALTIES != 0).nonzero().flatten()
    if len(penalized):
        scores[penalized] = _penalize(scores[penalized], rows[penalized], step, state)
    if bool((flags & HAS_BIAS != 0).any()):
        _add_bias(scores, rows[flags & HAS_BIAS != 0], rows, step)
    largest, tokens = scores.max(dim=-1)
    tokens = torch.where(largest.isfinite(), tokens, -1)
    drawn = ((step.temperature[rows] >= MIN_TEMPERATURE) & (tokens >= 0)).nonzero().flatten()
    if len(drawn):
        if len(drawn) < len(rows):
            scores, rows = scores[drawn], rows[drawn]
        tokens[drawn] = _draw(scores.div_(step.temperature[rows].unsqueeze(1)), rows, step)
    return tokens


def _penalize(scores: Tensor, rows: Tensor, step: StepTensors, state: DeviceState) -> Tensor:
    packed = state.counts[step.sample_slots[rows].long(), : scores.shape[1]]
    count = (packed & COUNT_MASK).float()
    repetition = step.repetition[rows].unsqueeze(1)
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(packed != 0, repeated, scores)
    presence = torch.where(count > 0, step.presence[rows].unsqueeze(1), 0.0)
    return scores - (step.frequency[rows].unsqueeze(1) * count + presence)


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


def _draw(scores: Tensor, rows: Tensor, step: StepTensors) -> Tensor:
    """Tokens drawn from tempered scores [n, vocab_limit], row i with the parameters of rows[i]."""
    largest = scores.amax(dim=-1)
    threshold = largest - MAX_GUMBEL_GAP
    top_k, top_p, min_p = step.top_k[rows], step.top_p[rows], step.min_p[rows]
    threshold = torch.maximum(threshold, largest + min_p.log())
    vocab_limit = scores.shape[1]
    top_k = torch.where((top_k > 0) & (top_k < vocab_limit), top_k, vocab_limit).long()
    filtered = ((top_k < vocab_limit) | (top_p < 1.0)).nonzero().flatten()
    if len(filtered):
        kept = _filter(scores[filtered], top_k[filtered], top_p[filtered])
        threshold[filtered] = torch.maximum(threshold[filtered], kept)
    seed_lo, seed_hi = step.seed_lo[rows].long() & _WORD, step.seed_hi[rows].long() & _WORD
    positions = step.sample_positions[rows].long() & _WORD
    return _gumbel_argmax(scores, threshold, positions, seed_lo, seed_hi)


def _filter(
    scores: Tensor, top_k: Tensor, top_p: Tensor, num_sorted: int = NUM_SORTED_FIRST
) -> Tensor:
    """The smallest score that top_k and top_p keep, [n]; top_k = vocab_limit and top_p = 1: off."""
    num_sorted = min(num_sorted, scores.shape[1])
    values = scores.topk(num_sorted, dim=-1).values
    largest = values[:, :1]
    is_cut = top_k <= num_sorted
    kth = values.gather(1, (top_k.clamp(max=num_sorted) - 1).unsqueeze(1)).squeeze(1)
    threshold = torch.where(is_cut, kth, float("-inf"))
    is_done = is_cut | (top_k == scores.shape[1])
    has_top_p = (top_p < 1.0).nonzero().flatten()
    if len(has_top_p):
        low = threshold[has_top_p].unsqueeze(1)
        shifted = scores[has_top_p] - largest[has_top_p]
        weights = shifted.exp_().masked_fill_(scores[has_top_p] < low, 0.0)
        goal = weights.sum(dim=-1, dtype=torch.float64) * top_p[has_top_p]
        sorted_weights = (values[has_top_p] - largest[has_top_p]).exp_().double()
        reached = sorted_weights.cumsum(dim=-1) >= goal.unsqueeze(1)
        last = reached.int().argmax(dim=-1, keepdim=True)
        nucleus = values[has_top_p].gather(1, last).squeeze(1)
        # A prefix longer than what was sorted: with top_k all the rest are ties of its threshold.
        is_reached = reached.any(dim=-1)
        threshold[has_top_p] = torch.where(
            is_reached, torch.maximum(nucleus, threshold[has_top_p]), threshold[has_top_p]
        )
        is_done[has_top_p] &= is_reached | is_cut[has_top_p]
    rest = (~is_done).nonzero().flatten()
    if len(rest) and num_sorted < scores.shape[1]:
        threshold[rest] = _filter(scores[rest], top_k[rest], top_p[rest], scores.shape[1])
    return threshold


def _gumbel_argmax(
    scores: Tensor, threshold: Tensor, positions: Tensor, seed_lo: Tensor, seed_hi: Tensor
) -> Tensor:
    """argmax of score + g(id) over the ids of each row that reach its threshold, [n] int64."""
    rows, ids = (scores >= threshold.unsqueeze(1)).nonzero(as_tuple=True)
    num_blocks = (scores.shape[1] + 3) // 4
    blocks, block_of = torch.unique_consecutive(rows * num_blocks + (ids >> 2), return_inverse=True)
    noise = torch.empty(len(blocks), 4)
    zero = torch.zeros((), dtype=torch.int64)
    for first in range(0, len(blocks), PHILOX_CHUNK):
        chunk = blocks[first : first + PHILOX_CHUNK]
        row = chunk // num_blocks
        counter = (chunk % num_blocks, positions[row], zero, zero)
        words = philox4x32(counter, (seed_lo[row], seed_hi[row]))
        uniform = ((words >> 9).float() + 0.5) * 2.0**-23
        noise[first : first + PHILOX_CHUNK] = -(-uniform.log()).log()
    noisy = scores[rows, ids] + noise[block_of, ids & 3]
    best = torch.full_like(threshold, float("-inf")).scatter_reduce_(0, rows, noisy, "amax")
    wins = noisy == best[rows]
    tokens = torch.full_like(positions, scores.shape[1])
    return tokens.scatter_reduce_(0, rows[wins], ids[wins], "amin")
