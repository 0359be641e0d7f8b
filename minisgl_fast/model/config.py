"""What a checkpoint says about itself: ``config.json`` and ``generation_config.json``.

Both are read in the shapes that transformers 4 and 5 write (``rope_theta`` + ``rope_scaling`` or
``rope_parameters``; ``torch_dtype`` or ``dtype``). One decoder serves every architecture, so what
differs between them ends here as flags. Rules:

- Nothing is assumed about a value before it is checked: a wrong type, a missing key or a feature
  that this server lacks is a ``ModelError`` of one line that names the file and the key.
- A sliding window is never half obeyed: full attention equals windowed attention as long as the
  context fits the window, so a window in effect caps ``max_position``.
- No torch here: the frontend process reads these files too.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minisgl_fast.errors import ModelError

MAX_CONFIG_BYTES = 16 << 20
MAX_LAYERS = 1024
DTYPES = ("bfloat16", "float16", "float32")

# What transformers' configuration class of each architecture takes for a key that is absent.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "MistralForCausalLM": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "Qwen2ForCausalLM": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "Qwen3ForCausalLM": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base ``theta`` and, for llama3 and yarn, how its frequencies are scaled.

    ``original_max_position`` is the context of pre-training. ``attention_factor`` None means that
    yarn derives it (from ``mscale`` and ``mscale_all_dim`` if both are set, else from ``factor``).
    """

    type: Literal["default", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder. Sizes count values, not bytes.

    ``attention_bias``: q, k and v projections have a bias; ``output_bias``: so has the projection
    after attention. ``max_position``: longest context, scaling and sliding window taken into
    account. ``vocab_size`` may be padded beyond the tokenizer's ids. ``eos_token_ids`` is the union
    of config.json's and generation_config.json's. ``dtype`` is what the checkpoint was saved in.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_word_embeddings: bool
    qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even, got {self.head_dim}.")

    @property
    def num_parameters(self) -> int:
        """Weights of the checkpoint; tied ones count once."""
        query = self.num_heads * self.head_dim
        key_value = self.num_kv_heads * self.head_dim
        layer = 2 * self.hidden_size * (query + key_value)
        layer += 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        layer += 2 * self.head_dim * self.qk_norm
        layer += (query + 2 * key_value) * self.attention_bias + self.hidden_size * self.output_bias
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_layers * layer + self.hidden_size

    @staticmethod
    def load(path: str | Path) -> ModelConfig:
        """Read a model folder or a ``.gguf`` file. ``ModelError`` says what cannot be served."""
        path = Path(path)
        if path.suffix == ".gguf":
            from minisgl_fast.model.gguf_metadata import read_config_fields

            return _parse_config(_Fields(path, read_config_fields(path)), ())
        generation = GenerationConfig.load(path)
        return _parse_config(_Fields.read(path / "config.json"), generation.eos_token_ids)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Defaults of sampling that come with a model; None where the model gives none."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    @staticmethod
    def load(path: str | Path) -> GenerationConfig:
        """Read ``generation_config.json`` of a folder; without one (or for GGUF) all is None."""
        file = Path(path) / "generation_config.json"
        if not file.is_file():
            return GenerationConfig()
        fields = _Fields.read(file)
        return GenerationConfig(
            temperature=fields.optional_number("temperature"),
            top_p=fields.optional_number("top_p"),
            top_k=fields.optional_integer("top_k"),
            min_p=fields.optional_number("min_p"),
            repetition_penalty=fields.optional_number("repetition_penalty"),
            eos_token_ids=fields.token_ids("eos_token_id"),
        )


def _parse_config(fields: _Fields, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    architecture = _architecture(fields)
    fields.defaults = ARCHITECTURES[architecture]
    _refuse_what_is_missing_here(fields)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_layers = fields.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise fields.error("num_hidden_layers", f"must be at most {MAX_LAYERS}, got {num_layers}")
    max_position = fields.integer("max_position_embeddings")
    rope = _rope(fields, max_position)
    if rope.type == "yarn":  # the file keeps the unscaled length; the scaled one is what yarn buys
        max_position = max(max_position, int(rope.factor * rope.original_max_position))
    if "head_dim" in fields.defaults or fields.get("head_dim") is not None:
        head_dim = fields.integer("head_dim")
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        raise fields.error("head_dim", "is needed: hidden_size is no multiple of the heads")
    has_bias_key = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    key_bias = has_bias_key and fields.boolean("attention_bias", False)
    eos = {*fields.token_ids("eos_token_id"), *eos_token_ids}
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise fields.error("dtype", f"must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=rope,
        max_position=_cap_by_window(fields, architecture, num_layers, max_position),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        attention_bias=key_bias or architecture == "Qwen2ForCausalLM",
        output_bias=key_bias,
        dtype=str(dtype),
        eos_token_ids=tuple(sorted(eos)),
        bos_token_id=fields.optional_integer("bos_token_id"),
    )


def _architecture(fields: _Fields) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise fields.error("architectures", "must name the model's architecture")
    if names[0] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise fields.error("architectures", f"{names[0]} is not supported (supported: {known})")
    return names[0]


def _refuse_what_is_missing_here(fields: _Fields) -> None:
    quantization = fields.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise fields.error("quantization_config", f"{method or 'quantized'} weights: not supported")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.error("hidden_act", f"{fields.get('hidden_act')!r} is not supported")
    if fields.boolean("mlp_bias", False):
        raise fields.error("mlp_bias", "true is not supported")


def _rope(fields: _Fields, max_position: int) -> RopeConfig:
    """Rope in either shape; keys inside ``rope_parameters`` win over those beside it."""
    merged = {"rope_theta": fields.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        value = fields.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise fields.error(key, "must be an object")
        merged.update({name: item for name, item in value.items() if item is not None})
    partial = merged.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise fields.error("partial_rotary_factor", f"{partial} is not supported")
    rope = _Fields(fields.file, merged)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.number("rope_theta", 10000.0)
    if theta <= 1.0:
        raise fields.error("rope_theta", f"must be greater than 1, got {theta:g}")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type not in ("llama3", "yarn"):
        raise fields.error("rope_type", f"{rope_type!r} is not supported (default, llama3, yarn)")
    original = rope.integer("original_max_position_embeddings", max_position)
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise fields.error("high_freq_factor", "must be greater than low_freq_factor")
        return RopeConfig(
            type="llama3",
            theta=theta,
            factor=rope.number("factor"),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeConfig(
        type="yarn",
        theta=theta,
        factor=rope.number("factor", max_position / original),
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale") or 0.0,
        mscale_all_dim=rope.optional_number("mscale_all_dim") or 0.0,
        truncate=rope.boolean("truncate", True),
    )


def _cap_by_window(fields: _Fields, architecture: str, num_layers: int, max_position: int) -> int:
    """``max_position``, or the sliding window if one is in effect in some layer and smaller."""
    if fields.get("sliding_window", fields.defaults.get("sliding_window")) is None:
        return max_position
    if architecture.startswith("Qwen"):
        layer_types = fields.get("layer_types")
        if not fields.boolean("use_sliding_window", False):
            return max_position
        if isinstance(layer_types, list):
            if "sliding_attention" not in layer_types:
                return max_position
        elif fields.integer("max_window_layers") >= num_layers:
            return max_position
    elif architecture != "MistralForCausalLM":
        return max_position
    return min(max_position, fields.integer("sliding_window"))


class _Fields:
    """A JSON object whose values are checked as they are taken out."""

    def __init__(self, file: Path, values: dict[str, Any]) -> None:
        self.file = file
        self.values = values
        self.defaults: dict[str, Any] = {}

    @staticmethod
    def read(file: Path) -> _Fields:
        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise ModelError(f"{file}: larger than {MAX_CONFIG_BYTES >> 20} MiB.")
            values = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ModelError(f"{file}: no such file; is this a model folder?") from None
        except OSError as error:
            raise ModelError(f"{file}: {error.strerror}.") from None
        except (ValueError, RecursionError):
            raise ModelError(f"{file}: not valid JSON.") from None
        if not isinstance(values, dict):
            raise ModelError(f"{file}: not a JSON object.")
        return _Fields(file, values)

    def error(self, key: str, message: str) -> ModelError:
        return ModelError(f"{self.file}: {key}: {message}.")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; ``defaults`` or ``default`` if the key is absent or null."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.error(key, f"must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; ``defaults`` or ``default`` if absent or null."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a positive number, got {value!r}")
        if not math.isfinite(value) or value <= 0:
            raise self.error(key, f"must be a positive number, got {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(key, f"must be an integer, got {value!r}")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, got {value!r}")
        if not math.isfinite(value) or value < 0:
            raise self.error(key, f"must be a number of at least 0, got {value!r}")
        return float(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids or null."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
                raise self.error(key, f"must be a token id or a list of them, got {value!r}")
        return tuple(ids)

    def _present(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = self.defaults.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value
