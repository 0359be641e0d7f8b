"""What a step brings beside tokens: log-probabilities and embeddings, from a plan's spans to bytes.

``compute`` runs behind the step on its device and starts the copies to the host; once the device
has come that far, ``to_bytes`` gives what the scheduler sends on (sched.plan.Span, wire.pyx).

Rules: the logits of a prompt are computed in slices of ``SLICE_BYTES``, never for a whole chunk; a
span whose values are not all finite gives None.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from minisgl_fast.backend.interface import MIN_LOGIT_ROWS
from minisgl_fast.backend.logprobs import score
from minisgl_fast.model.qwen3 import Qwen3
from minisgl_fast.sched.plan import Span
from minisgl_fast.wire import Task

# Of float32 logits that are scored at once; a few times as much lives for a moment.
SLICE_BYTES = 32 << 20

# The tensors of one span on the host, in the order of their bytes; the first one tells by a NaN or
# an infinity that the model failed.
Output: TypeAlias = tuple[Tensor, ...]


def compute(
    spans: Sequence[Span],
    model: Qwen3,
    hidden: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    vocab_limit: int,
) -> list[Output]:
    """Start computing the outputs of ``spans``, in their order.

    hidden [num_tokens, hidden_size] is what ``model.forward`` gave, needed where a span is not a
    sample's; logits [num_samples, vocab] and tokens int32 [num_samples] are those of the samples.
    All use of ``logits`` comes before any other logits are computed.
    """
    sampled = iter(
        list(_score_samples([s for s in spans if s.sample >= 0], logits, tokens, vocab_limit))
    )
    outputs: list[Output] = []
    for span in spans:
        if span.sample >= 0:
            outputs.append(next(sampled))
            continue
        assert hidden is not None, "rows of a prompt are never part of a graph"
        rows = hidden[span.first_row : span.first_row + span.num_rows]
        if span.task == Task.GENERATE:
            outputs.append(_score_prompt(span, model, rows, vocab_limit))
        elif span.task == Task.EMBED_LAST:
            outputs.append((_to_host(model.normalize(rows[-1:]).float()),))
        else:
            outputs.append((_to_host(model.normalize(rows).float().sum(dim=0)),))
    return outputs


def to_bytes(outputs: Sequence[Output]) -> list[bytes | None]:
    """The results of ``compute``, once the device has computed them."""
    return [
        b"".join(map(_bytes_of, output)) if bool(output[0].isfinite().all()) else None
        for output in outputs
    ]


def _score_samples(
    spans: Sequence[Span], logits: Tensor, tokens: Tensor, vocab_limit: int
) -> Iterator[Output]:
    """The outputs of spans of samples, many rows at once."""
    num_rows = _rows_at_once(logits.shape[1])
    for first in range(0, len(spans), num_rows):
        part = spans[first : first + num_rows]
        rows = _to_device([span.sample for span in part], logits.device)
        some = logits.index_select(0, rows)
        # A broken row has token -1; its scores are not sent.
        targets = tokens.index_select(0, rows).clamp(min=0)
        scores = score(some, targets, max(span.num_top for span in part), vocab_limit)
        chosen, top_ids, top_values = map(_to_host, scores[:3])
        for row, span in enumerate(part):
            ids = _id_values(span, some[row : row + 1], scores.normalizer[row : row + 1])
            top = slice(span.num_top)
            yield chosen[row : row + 1], top_ids[row, top], top_values[row, top], _to_host(ids)


def _score_prompt(span: Span, model: Qwen3, hidden: Tensor, vocab_limit: int) -> Output:
    """The output of a span of prompt rows, slice by slice."""
    parts = []
    targets = _to_device(span.targets, hidden.device)
    for first in range(0, span.num_rows, _rows_at_once(model.vocab_size)):
        rows = slice(first, first + _rows_at_once(model.vocab_size))
        logits = model.logits(hidden[rows])
        scores = score(logits, targets[rows], span.num_top, vocab_limit)
        parts.append((*scores[:3], _id_values(span, logits, scores.normalizer)))
    return tuple(_to_host(torch.cat(part)) for part in zip(*parts, strict=True))


def _id_values(span: Span, logits: Tensor, normalizer: Tensor) -> Tensor:
    """f32 [n, len(span.ids)]: the log-probabilities of the ids that were asked for by name."""
    ids = _to_device(span.ids, logits.device)
    return logits.index_select(1, ids).float() - normalizer.unsqueeze(1)


def _rows_at_once(vocab_size: int) -> int:
    return max(1, min(MIN_LOGIT_ROWS, SLICE_BYTES // (4 * vocab_size)))


def _to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64; on a GPU the copy is under way, and the host does not wait for it."""
    on_gpu = device.type == "cuda"
    made = torch.tensor(values, dtype=torch.int64, pin_memory=on_gpu)
    return made.to(device, non_blocking=True) if on_gpu else made


def _to_host(values: Tensor) -> Tensor:
    """A copy under way to (pinned) host memory; the tensor itself on a CPU."""
    return values.contiguous().to("cpu", non_blocking=True)


def _bytes_of(values: Tensor) -> bytes:
    return ctypes.string_at(values.data_ptr(), values.nbytes) if values.nbytes else b""
