"""The sampler on the GPU: the wrapper of ``kernels/sample.cu`` (rules: backend/sampling.py)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from minisgl_fast.backend.kernel import Kernel, device_arch, get_kernel
from minisgl_fast.backend.kernels_table import SAMPLE_CLUSTERS, find_spec
from minisgl_fast.backend.step import DeviceState, Logprobs, StepTensors

BLOCK = 512
NUM_BINS = 8192
SHARED_BYTES = NUM_BINS * 12  # a count and a mass each


class Sampler:
    """Samples up to ``max_seqs`` rows in one launch that a CUDA graph may hold."""

    def __init__(
        self,
        max_seqs: int,
        vocab_size: int,
        device: torch.device,
        clusters: Sequence[int] = SAMPLE_CLUSTERS,
    ) -> None:
        """``clusters``: how many blocks may share a row; all those that the device can by default.

        1, which every device can, is always among them.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        arch = device_arch(index)
        self._num_sms = torch.cuda.get_device_properties(index).multi_processor_count
        self._bf16: dict[int, Kernel] = {1: get_kernel("sample_bf16", "sample", SHARED_BYTES)}
        for cluster in clusters:
            name = f"sample_bf16_cluster{cluster}"
            if cluster > 1 and find_spec(name).serves(arch):
                self._bf16[cluster] = get_kernel(name, "sample", SHARED_BYTES)
        self._float32 = {1: get_kernel("sample_float32", "sample", SHARED_BYTES)}
        self._reset = get_kernel("step", "reset_counts")
        # Rows with penalties, bias or mask are rewritten here; padded to whole 16-byte loads.
        self._stride = -(-vocab_size // 8) * 8
        self._workspace = torch.empty(max_seqs, self._stride, dtype=torch.float32, device=device)

    def __call__(
        self,
        logits: Tensor,
        step: StepTensors,
        state: DeviceState,
        vocab_limit: int,
        logprobs: Logprobs | None = None,
    ) -> Tensor:
        """int32 [num_samples]; updates ``state`` as the interface says.

        logits [num_samples, vocab rounded up to a multiple of 8], bfloat16 or float32.
        """
        tokens = torch.empty(step.num_samples, dtype=torch.int32, device=logits.device)
        kernels = self._bf16 if logits.dtype == torch.bfloat16 else self._float32
        cluster = self.pick_cluster(kernels, step.num_samples)
        kernels[cluster].launch(
            (step.num_samples * cluster,),
            BLOCK,
            (
                tokens.data_ptr(),
                state.last_token.data_ptr(),
                state.counts.data_ptr(),
                logits.data_ptr(),
                self._workspace.data_ptr(),
                0 if step.masks is None else step.masks.data_ptr(),
                step.mask_rows.data_ptr(),
                0 if logprobs is None else logprobs.ids.data_ptr(),
                0 if logprobs is None else logprobs.values.data_ptr(),
                0 if logprobs is None else logprobs.chosen.data_ptr(),
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

    def pick_cluster(self, kernels: dict[int, Kernel], num_rows: int) -> int:
        """The most blocks a row with which all rows still run at once.

        Two blocks fit on a multiprocessor; clusters of more than two are not packed that tightly.
        """

        def fits(cluster: int) -> bool:
            blocks = cluster * num_rows
            return blocks <= self._num_sms or (cluster == 2 and blocks <= 2 * self._num_sms)

        return max((cluster for cluster in kernels if fits(cluster)), default=1)

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
