"""How many KV pages fit, and the other sizes that are fixed at start.

Rules: every size is decided once, before the first request; what cannot fit is a ConfigError that
names the flag to change.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from minisgl_fast.config import Config
from minisgl_fast.errors import ConfigError
from minisgl_fast.model.config import ModelConfig

GIB = 1 << 30
# On a CPU the pool shares the memory with everything else: a quarter of what is free, in bounds.
CPU_POOL_FRACTION = 0.25
CPU_POOL_MIN_BYTES = 1 * GIB
CPU_POOL_MAX_BYTES = 4 * GIB
# CUDA graphs, the libraries' workspaces and the allocator's rounding.
GPU_RESERVE_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """The sizes of one engine. Lengths are in tokens."""

    page_size: int
    num_pages: int
    max_model_len: int
    max_seqs: int
    max_step_tokens: int

    @property
    def max_pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)


def plan_sizes(
    config: Config, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> EngineSizes:
    """Fill every size that the user left open. To be called when the weights are loaded."""
    on_gpu = device.type == "cuda"
    page_size = config.page_size or (64 if on_gpu else 16)
    max_seqs = config.max_running_requests or (256 if on_gpu else 32)
    max_step_tokens = max(config.max_prefill_length or (8192 if on_gpu else 256), max_seqs)
    max_model_len = config.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len {max_model_len} is over the model's {model.max_position} positions."
        )
    if config.num_pages is not None:
        num_pages = config.num_pages
    else:
        if on_gpu:
            pool = _gpu_pool_bytes(config, model, max_seqs, max_step_tokens, device)
        else:
            pool = _cpu_pool_bytes()
        num_pages = pool // _page_bytes(model, page_size, dtype)
        if num_pages < 2:
            raise ConfigError(
                f"No room for the KV cache: {pool / GIB:.2f} GiB are left for it. "
                "Take a smaller model, or raise --memory-ratio."
            )
    # No more than every slot at full length, and a page in reserve for each.
    num_pages = min(num_pages, max_seqs * (-(-max_model_len // page_size) + 1))
    return EngineSizes(
        page_size=page_size,
        num_pages=num_pages,
        max_model_len=min(max_model_len, num_pages * page_size),
        max_seqs=max_seqs,
        max_step_tokens=max_step_tokens,
    )


def _page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """One page in all layers: keys and values of ``page_size`` tokens."""
    values_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return values_per_token * page_size * dtype.itemsize


def _cpu_pool_bytes() -> int:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(max(available * CPU_POOL_FRACTION, CPU_POOL_MIN_BYTES), CPU_POOL_MAX_BYTES))


def _gpu_pool_bytes(
    config: Config, model: ModelConfig, max_seqs: int, max_step_tokens: int, device: torch.device
) -> int:
    """What ``--memory-ratio`` of the device leaves beside the weights and the largest step."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # The widest moment of a layer: the residual, the norm's output, gate and up, their product.
    widest = 3 * model.hidden_size + 3 * model.intermediate_size
    # Logits in bfloat16, the sampler's workspace in float32, token counts in 16 bits.
    per_row = 8 * model.vocab_size
    step_bytes = 2 * widest * max_step_tokens + per_row * (max_seqs + 1)
    return int(free - total * (1.0 - config.memory_ratio)) - step_bytes - GPU_RESERVE_BYTES
