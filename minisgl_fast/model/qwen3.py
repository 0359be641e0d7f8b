"""The decoder: Qwen3, and by flags of its configuration also Llama, Qwen2 and Mistral.

    hidden [num_tokens, hidden_size] -> num_layers x (attention, gated MLP) -> norm -> logits

The backend, which is passed in, does every operation; it may fuse a product with the norm before
it or with what follows. The tokens of all sequences lie one after another, without padding. Only
rows that are sampled, or asked for by log-probabilities and embeddings, reach the last norm and the
vocabulary projection; where no other is asked for, they alone pass the last layer, behind its keys
and values.
"""

from __future__ import annotations

from torch import Tensor

from minisgl_fast.backend.interface import Backend, KVCache
from minisgl_fast.backend.step import DeviceState, StepTensors
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.model.rope import rope_table
from minisgl_fast.model.weights import LayerWeights, ModelWeights


class Qwen3:
    """A model ready to run. ``weights`` is used up: matrices move into layers one by one."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, backend: Backend) -> None:
        self._backend = backend
        self._embed_tokens = weights.embed_tokens
        self._layers = [_Layer(config, layer, backend) for layer in weights.take_layers()]
        self.vocab_size = config.vocab_size
        self._norm = weights.norm, config.rms_norm_eps
        self._lm_head = backend.make_matrix(weights.lm_head, norm=self._norm)
        self._rope_table = rope_table(
            config.rope, config.head_dim, config.max_position, weights.norm.device
        )

    def forward(
        self, step: StepTensors, state: DeviceState, kv: KVCache, rows: Tensor | None = None
    ) -> Tensor:
        """Run the layers; [num_tokens, hidden_size] in the model's dtype, before the last norm.

        ``rows`` int32: give only these, in this order.
        """
        hidden = self._backend.embed(step, state, self._embed_tokens)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            only = rows if index == last else None
            hidden = layer.attention(hidden, step, state, kv.layer(index), self._rope_table, only)
            hidden = layer.mlp(hidden)
        return hidden

    def normalize(self, hidden: Tensor) -> Tensor:
        """The last norm of rows [n, hidden_size] of ``forward``."""
        return self._backend.rms_norm(hidden, *self._norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocab_size] of rows [n, hidden_size] of ``forward``; valid until the next call."""
        return self._backend.logits(hidden, self._lm_head)


class _Layer:
    """One decoder layer; what it is given may be overwritten by what it returns."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, backend: Backend) -> None:
        self._backend = backend
        self._eps = config.rms_norm_eps
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._scale = config.head_dim**-0.5
        self._q_norm = weights.q_norm
        self._k_norm = weights.k_norm
        input_norm = weights.input_norm, config.rms_norm_eps
        post_norm = weights.post_norm, config.rms_norm_eps
        self._qkv = backend.make_matrix(weights.qkv, weights.qkv_bias, input_norm, may_fold=True)
        self._output = backend.make_matrix(weights.output, weights.output_bias)
        self._gate_up = backend.make_matrix(weights.gate_up, norm=post_norm, may_fold=True)
        self._down = backend.make_matrix(weights.down)

    def attention(
        self,
        hidden: Tensor,
        step: StepTensors,
        state: DeviceState,
        kv_layer: Tensor,
        rope: Tensor,
        rows: Tensor | None,
    ) -> Tensor:
        q = self._backend.qkv(
            hidden,
            self._qkv,
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
        attended = self._backend.attention(q, kv_layer, step, state, self._scale)
        if rows is not None:
            attended, hidden = attended.index_select(0, rows), hidden.index_select(0, rows)
        return self._backend.linear_add(attended, self._output, hidden)

    def mlp(self, hidden: Tensor) -> Tensor:
        middle = self._backend.linear_silu_mul(hidden, self._gate_up)
        return self._backend.linear_add(middle, self._down, hidden)
