"""Tiny random checkpoints, written with transformers, and the logits transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**COMMON, head_dim=32),
    "qwen3-tied": Qwen3Config(**{**COMMON, "tie_word_embeddings": True}, head_dim=32),
    "qwen3-bias": Qwen3Config(**COMMON, head_dim=32, attention_bias=True),
    "qwen2": Qwen2Config(**COMMON),
    "llama": LlamaConfig(**COMMON),
    "llama-odd-heads": LlamaConfig(
        **{**COMMON, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1},
        head_dim=32,
    ),
    "llama-mha": LlamaConfig(**{**COMMON, "num_key_value_heads": 4}),
    "llama3": LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE, head_dim=32),
    "llama-yarn": LlamaConfig(**COMMON, rope_parameters=YARN_ROPE, head_dim=32),
    "llama-yarn-exact": LlamaConfig(
        **COMMON,
        rope_parameters={**YARN_ROPE, "truncate": False, "beta_fast": 16, "beta_slow": 2},
        head_dim=32,
    ),
    "llama-yarn-mscale": LlamaConfig(
        **COMMON, rope_parameters={**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.2}
    ),
    "mistral": MistralConfig(**COMMON, sliding_window=None, head_dim=32),
}


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model; biases and norms are random too, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.1)
                if "norm" in parameter_name:
                    parameter.add_(1.0)
    return model


def write_model(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@torch.inference_mode()
def oracle_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab]: logits after each token."""
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits
