"""What a backend is given: the tensors of one step, and the state that outlives steps.

``StepTensors`` are views of one filled plan on the device; ``DeviceState`` lives with the runner.
Rules: decode rows come first, token i and sequence i coincide for i < num_decode; everything is
int32 unless it says otherwise (f32 fields are float32 bits of the same buffer).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# bits of sample_flags
HAS_PENALTIES = 1
HAS_BIAS = 2
HAS_MASK = 4
HAS_LOGPROBS = 8

# How many of the largest log-probabilities a row with HAS_LOGPROBS gets.
NUM_TOP = 20

# One int16 of ``DeviceState.counts``: how often the id was generated; whether the prompt has it.
COUNT_MASK = 0x3FFF
IN_PROMPT = 0x4000


@dataclass(slots=True)
class StepTensors:
    """One step. Lengths in brackets; the meaning of each section is that of ``StepPlan``."""

    num_tokens: int
    num_decode: int
    num_seqs: int
    num_samples: int
    max_q_len: int  # longest row of new tokens; 0 inside CUDA graphs
    max_context: int  # longest context_len of a chunk; 0 in a step of decodes

    header: Tensor  # [16] the counts above as the device sees them, see ``StepPlan``

    input_ids: Tensor  # [num_tokens] -1: the slot's last_token (decode rows only)
    positions: Tensor  # [num_tokens]
    kv_slots: Tensor  # [num_tokens] page * page_size + offset; -1: do not write

    seq_slots: Tensor  # [num_seqs] row of the page table
    q_start: Tensor  # [num_seqs + 1] first token row of each sequence
    context_lens: Tensor  # [num_seqs] KV length with this step's tokens; 0: a padding row

    sample_rows: Tensor  # [num_samples] token row whose hidden state is sampled
    sample_slots: Tensor  # [num_samples]
    sample_positions: Tensor  # [num_samples] number of tokens before the sampled one
    temperature: Tensor  # [num_samples] f32
    top_k: Tensor  # [num_samples]
    top_p: Tensor  # [num_samples] f32
    min_p: Tensor  # [num_samples] f32
    seed_lo: Tensor  # [num_samples]
    seed_hi: Tensor  # [num_samples]
    presence: Tensor  # [num_samples] f32
    frequency: Tensor  # [num_samples] f32
    repetition: Tensor  # [num_samples] f32
    sample_flags: Tensor  # [num_samples] HAS_PENALTIES | HAS_BIAS | HAS_MASK
    mask_rows: Tensor  # [num_samples] row of ``masks`` of samples with HAS_MASK
    bias_start: Tensor  # [num_samples + 1] into bias_ids and bias_values
    bias_ids: Tensor  # [num_bias]
    bias_values: Tensor  # [num_bias] f32

    update_slots: Tensor  # [num_updates]
    update_columns: Tensor  # [num_updates]
    update_pages: Tensor  # [num_updates]

    # [num_masks, ceil(vocab_size / 32)] bit id % 32 of word id / 32: the id is allowed. None where
    # no sample has HAS_MASK. Filled when the step is sampled, not yet in the forward pass.
    masks: Tensor | None = None

    # What a backend derives once and uses in every layer.
    scratch: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What ``sample`` writes for rows with HAS_LOGPROBS; other rows are left as they are.

    Log-probabilities are those of the logits after penalties, bias and mask, before temperature and
    filters. In descending order, lowest id first on a tie; id -1 and -inf where there are no more
    (banned ids), and everywhere for a broken row.
    """

    ids: Tensor  # [rows, NUM_TOP]
    values: Tensor  # [rows, NUM_TOP] f32
    chosen: Tensor  # [rows] f32, of the sampled token

    @staticmethod
    def allocate(rows: int, device: torch.device) -> Logprobs:
        """Room for so many samples."""
        return Logprobs(
            torch.full((rows, NUM_TOP), -1, dtype=torch.int32, device=device),
            torch.full((rows, NUM_TOP), float("-inf"), device=device),
            torch.full((rows,), float("-inf"), device=device),
        )


class DeviceState:
    """Per-slot memory on the device; row ``max_seqs`` is scratch for padding rows.

    page_table [max_seqs + 1, max_pages_per_seq] int32: physical page of each column;
    last_token [max_seqs + 1] int32: the newest sampled id of a slot;
    counts [max_seqs + 1, vocab_size] int16: of requests with penalties, see ``COUNT_MASK``.
    """

    def __init__(
        self, max_seqs: int, max_pages_per_seq: int, vocab_size: int, device: torch.device
    ) -> None:
        rows = max_seqs + 1
        self.page_table = torch.zeros(rows, max_pages_per_seq, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(rows, dtype=torch.int32, device=device)
        self.counts = torch.zeros(rows, vocab_size, dtype=torch.int16, device=device)
