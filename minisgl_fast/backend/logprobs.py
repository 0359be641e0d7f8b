"""Log-probabilities of logits, in torch on any device: the rule, and what every backend may run.

For a row of logits l over the whole vocabulary, in float32 and untouched by penalties, bias, masks
and temperature: logprob(id) = l[id] - log(sum(exp(l))). Ids from vocab_limit on take part in the
sum, as in transformers, but are never listed among the largest: the tokenizer has no text for them.
The largest descend, lowest id first on a tie. What is computed twice is bit for bit the same: a
token's own value equals its entry among the largest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """Results for n rows. Where a row has a NaN or +inf, ``chosen`` is NaN and the rest garbage."""

    chosen: Tensor  # [n] f32, of the row's target
    top_ids: Tensor  # [n, num_top] int32, -1 where the vocabulary has no more
    top_values: Tensor  # [n, num_top] f32, -inf there
    normalizer: Tensor  # [n] f32: log(sum(exp(l)))


def score(logits: Tensor, targets: Tensor, num_top: int, vocab_limit: int) -> Scores:
    """Score logits [n, vocab] of any float type; ``targets`` [n] are ids."""
    logits = logits.float()
    normalizer = logits.logsumexp(dim=-1)
    chosen = logits.gather(1, targets.long().unsqueeze(1)).squeeze(1) - normalizer
    broken = ~normalizer.isfinite()
    chosen = chosen.masked_fill(broken, float("nan"))
    num_listed = min(num_top, vocab_limit)
    top_ids = torch.full((len(logits), num_top), -1, dtype=torch.int32, device=logits.device)
    top_values = torch.full((len(logits), num_top), float("-inf"), device=logits.device)
    if num_listed and len(logits):
        listed = logits[:, :vocab_limit].masked_fill(broken.unsqueeze(1), 0.0)
        ids = _largest(listed, num_listed)
        top_ids[:, :num_listed] = ids.int()
        top_values[:, :num_listed] = listed.gather(1, ids) - normalizer.unsqueeze(1)
    return Scores(chosen, top_ids, top_values, normalizer)


def _largest(values: Tensor, count: int) -> Tensor:
    """Ids [n, count] of each row's largest values, by value, then by id. Nothing waits for them.

    Which of several equal values topk takes is left open. That matters for the smallest ones that
    it takes, whose places go to the first ids that have that value, and for the order of the rest.
    """
    largest = values.topk(count, dim=-1)
    smallest = largest.values[:, -1:]
    is_above = largest.values > smallest
    num_ids = values.shape[1]
    all_ids = torch.arange(num_ids, dtype=torch.int32, device=values.device)
    ties = all_ids.where(values == smallest, num_ids).topk(count, dim=-1, largest=False).values
    place = torch.arange(count, device=values.device) - is_above.sum(dim=-1, keepdim=True)
    ids = largest.indices.where(is_above, ties.long().gather(1, place.clamp(min=0)))
    # By id, then stably by value.
    ids = ids.sort(dim=-1).values
    order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)
