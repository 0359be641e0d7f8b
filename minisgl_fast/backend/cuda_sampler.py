"""The sampler on the GPU: the wrapper of ``kernels/sample.cu`` (rules: backend/sampling.py)."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from minisgl_fast.backend.kernel import get_kernel
from minisgl_fast.backend.step import DeviceState, StepTensors

BLOCK = 512
# The three words a bin of sample.cu: 2 * 28 * 128 + 1 bins, rounded up to whole threads.
SHARED_BYTES = 3 * 4 * -(-(2 * 28 * 128 + 1) // BLOCK) * BLOCK


class Sampler:
    """Samples up to ``max_seqs`` rows in one launch that a CUDA graph may hold."""

    def __init__(self, max_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._kernel = {
            torch.bfloat16: get_kernel("sample_bf16", "sample", SHARED_BYTES),
            torch.float32: get_kernel("sample_float32", "sample", SHARED_BYTES),
        }
        self._reset = get_kernel("step", "reset_counts")
        # Rows with penalties, bias or mask are rewritten here; padded to whole 16-byte loads.
        self._stride = -(-vocab_size // 8) * 8
        self._workspace = torch.empty(max_seqs, self._stride, dtype=torch.float32, device=device)

    def __call__(
        self, logits: Tensor, step: StepTensors, state: DeviceState, vocab_limit: int
    ) -> Tensor:
        """int32 [num_samples]; updates ``state`` as the interface says.

        logits [num_samples, vocab rounded up to a multiple of 8], bfloat16 or float32.
        """
        tokens = torch.empty(step.num_samples, dtype=torch.int32, device=logits.device)
        self._kernel[logits.dtype].launch(
            (step.num_samples,),
            BLOCK,
            (
                tokens.data_ptr(),
                state.last_token.data_ptr(),
                state.counts.data_ptr(),
                logits.data_ptr(),
                self._workspace.data_ptr(),
                0,
                step.temperature.data_ptr(),
                step.top_k.data_ptr(),
                step.top_p.data_ptr(),
                step.min_p.data_ptr(),
                step.seed_lo.data_ptr(),
                step.seed_hi.data_ptr(),
                step.sample_positions.data_ptr(),
                step.sample_slots.data_ptr(),
                step.presence.data_ptr(),
                step.frequency.data_ptr(),
                step.repetition.data_ptr(),
                step.sample_flags.data_ptr(),
                step.bias_start.data_ptr(),
                step.bias_ids.data_ptr(),
                step.bias_values.data_ptr(),
                self._stride,
                vocab_limit,
                state.counts.shape[1],
            ),
            SHARED_BYTES,
            pdl=True,
        )
        return tokens

    def reset_counts(
        self, state: DeviceState, slot: int, tokens: array[int], num_prompt: int
    ) -> None:
        """Upload a request's history and count it. A cold path: one copy and one launch."""
        history = torch.tensor(tokens, dtype=torch.int32).to(state.counts.device)
        self._reset.launch(
            (1,),
            1024,
            (
                state.counts[slot].data_ptr(),
                history.data_ptr(),
                len(tokens),
                num_prompt,
                state.counts.shape[1],
            ),
        )
