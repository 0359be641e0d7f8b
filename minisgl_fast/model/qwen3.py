"""The decoder: Qwen3, and by flags of its configuration also Llama, Qwen2 and Mistral.

    hidden [num_tokens, hidden_size] -> num_layers x (attention, gated MLP) -> norm -> logits

Every operation but the matrix products belongs to the backend, which is passed in; the tokens of
all sequences lie one after another, without padding. Only rows that are sampled reach the last
norm and the vocabulary projection.
"""

from __future__ import annotations

from torch import Tensor

from minisgl_fast.backend.interface import Backend, KVCache
from minisgl_fast.backend.step import DeviceState, StepTensors
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.model.layers import Linear, rope_table
from minisgl_fast.model.weights import LayerWeights, ModelWeights


class Qwen3:
    """A model ready to run. ``weights`` is used up: matrices move into layers one by one."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, backend: Backend) -> None:
        self._backend = backend
        self._eps = config.rms_norm_eps
        self._embed_tokens = weights.embed_tokens
        self._layers = [_Layer(config, layer, backend) for layer in weights.take_layers()]
        self._norm = weights.norm
        self._lm_head = Linear(weights.lm_head)
        self._rope_table = rope_table(
            config.rope, config.head_dim, config.max_position, weights.norm.device
        )

    def forward(self, step: StepTensors, state: DeviceState, kv: KVCache) -> Tensor:
        """Run one step; logits [num_samples, vocab_size] in the model's dtype."""
        backend, eps = self._backend, self._eps
        residual = backend.embed(step, state, self._embed_tokens)
        hidden = backend.rms_norm(residual, self._layers[0].input_norm, eps)
        for index, layer in enumerate(self._layers):
            if index > 0:
                hidden, residual = backend.add_rms_norm(hidden, residual, layer.input_norm, eps)
            hidden = layer.attention(hidden, step, state, kv.layer(index), self._rope_table)
            hidden, residual = backend.add_rms_norm(hidden, residual, layer.post_norm, eps)
            hidden = layer.mlp(hidden)
        if step.num_samples < step.num_tokens:  # else every token is sampled, in order
            hidden = hidden.index_select(0, step.sample_rows)
            residual = residual.index_select(0, step.sample_rows)
        hidden, _ = backend.add_rms_norm(hidden, residual, self._norm, eps)
        return self._lm_head(hidden)


class _Layer:
    """One decoder layer; norms and residual are the caller's."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, backend: Backend) -> None:
        self._backend = backend
        self._eps = config.rms_norm_eps
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._scale = config.head_dim**-0.5
        self.input_norm = weights.input_norm
        self.post_norm = weights.post_norm
        self._q_norm = weights.q_norm
        self._k_norm = weights.k_norm
        self._qkv = Linear(weights.qkv, weights.qkv_bias)
        self._output = Linear(weights.output, weights.output_bias)
        self._gate_up = Linear(weights.gate_up)
        self._down = Linear(weights.down)

    def attention(
        self, hidden: Tensor, step: StepTensors, state: DeviceState, kv_layer: Tensor, rope: Tensor
    ) -> Tensor:
        q = self._backend.prepare_qkv(
            self._qkv(hidden),
            self._q_norm,
            self._k_norm,
            self._eps,
            rope,
            step,
            kv_layer,
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
        )
        return self._output(self._backend.attention(q, kv_layer, step, state, self._scale))

    def mlp(self, hidden: Tensor) -> Tensor:
        return self._down(self._backend.silu_mul(self._gate_up(hidden)))
