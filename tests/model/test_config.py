"""config.json and generation_config.json: real files, both shapes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS

from minisgl_fast.errors import ModelError
from minisgl_fast.model.config import GenerationConfig, ModelConfig, RopeConfig

DATA = Path(__file__).parents[1] / "data" / "configs"
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}


def write(folder: Path, config: Any, generation: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def load(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.load(write(folder, {**BASE, **changes}))


def load_real(folder: Path, name: str, generation: str | None = None) -> ModelConfig:
    (folder / "config.json").write_bytes((DATA / f"{name}.json").read_bytes())
    if generation:
        (folder / "generation_config.json").write_bytes((DATA / f"{generation}.json").read_bytes())
    return ModelConfig.load(folder)


def test_qwen3(tmp_path):
    assert load_real(tmp_path, "Qwen3-0.6B", "Qwen3-generation_config") == ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        max_position=40960,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_ids=(151643, 151645),
        bos_token_id=151643,
    )


def test_qwen2_has_a_bias_that_no_key_tells_of(tmp_path):
    config = load_real(tmp_path, "Qwen2.5-0.5B")
    assert (config.attention_bias, config.output_bias, config.qk_norm) == (True, False, False)
    assert config.head_dim == 64
    assert config.max_position == 32768  # sliding_window is there but not in use


def test_llama3_scaling(tmp_path):
    config = load_real(tmp_path, "Llama-3.1-8B-Instruct")
    assert config.rope == RopeConfig(
        type="llama3",
        theta=500000.0,
        factor=8.0,
        original_max_position=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert config.max_position == 131072
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert not config.attention_bias


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.json")))
def test_every_real_file_is_read_or_refused_by_name(tmp_path, name):
    if "generation_config" in name:
        return
    if name == "Qwen3-30B-A3B":
        with pytest.raises(ModelError, match="Qwen3MoeForCausalLM is not supported"):
            load_real(tmp_path, name)
        return
    assert load_real(tmp_path, name).dtype == "bfloat16"


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_transformers_5_writes_says_the_same_as_its_config(tmp_path, name):
    CONFIGS[name].architectures = [type(CONFIGS[name]).__name__.replace("Config", "ForCausalLM")]
    CONFIGS[name].save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_bytes())
    config, theirs = ModelConfig.load(tmp_path), CONFIGS[name]
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.rope.type == theirs.rope_parameters["rope_type"]
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.max_position == theirs.max_position_embeddings
    assert config.eos_token_ids == (2,)


def test_both_shapes_of_rope_scaling_are_equal(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    old = load(tmp_path, rope_scaling={**scaling, "type": "yarn"})
    new = load(tmp_path, rope_theta=None, rope_parameters={**scaling, "rope_theta": 5000.0})
    assert old == new
    assert old.rope.type == "yarn"


def test_yarn_extends_a_context_that_the_file_gives_unscaled(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert load(tmp_path, rope_scaling=scaling).max_position == 16384


@pytest.mark.parametrize(
    ("changes", "max_position"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 1024}, 1024),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 4096),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8192}, 4096),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 1024}, 4096),
        ({"use_sliding_window": False, "sliding_window": 1024}, 4096),
        ({"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 2}, 4096),
        ({"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 1}, 1024),
        (
            {"use_sliding_window": True, "sliding_window": 1024}
            | {"layer_types": ["full_attention", "full_attention"]},
            4096,
        ),
        (
            {"use_sliding_window": True, "sliding_window": 1024}
            | {"layer_types": ["full_attention", "sliding_attention"]},
            1024,
        ),
    ],
)
def test_a_sliding_window_in_effect_caps_the_context(tmp_path, changes, max_position):
    changes = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2} | changes
    assert load(tmp_path, **changes).max_position == max_position


def test_a_missing_mistral_window_is_what_transformers_takes(tmp_path):
    names = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert load(tmp_path, **names, max_position_embeddings=32768).max_position == 4096


def test_eos_ids_of_both_files_are_united(tmp_path):
    write(tmp_path, {**BASE, "eos_token_id": 7}, {"eos_token_id": [9, 7, 3], "temperature": 0.6})
    assert ModelConfig.load(tmp_path).eos_token_ids == (3, 7, 9)
    write(tmp_path, {**BASE, "eos_token_id": [5]}, {})
    assert ModelConfig.load(tmp_path).eos_token_ids == (5,)


def test_generation_defaults(tmp_path):
    real = (DATA / "Qwen3-generation_config.json").read_text()
    write(tmp_path, BASE, json.loads(real))
    expected = GenerationConfig(
        temperature=0.6, top_p=0.95, top_k=20, eos_token_ids=(151645, 151643)
    )
    assert GenerationConfig.load(tmp_path) == expected
    (tmp_path / "generation_config.json").unlink()
    assert GenerationConfig.load(tmp_path) == GenerationConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": None}, "architectures: must name"),
        ({"architectures": [3]}, "architectures: must name"),
        ({"hidden_size": "64"}, "hidden_size: must be a positive integer, got '64'"),
        ({"hidden_size": True}, "hidden_size: must be a positive integer"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be a positive integer"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: must be at most"),
        ({"vocab_size": 2**40}, "vocab_size: must be a positive integer"),
        ({"num_attention_heads": 5}, "head_dim: is needed"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: must be a positive number"),
        ({"rope_theta": 1}, "rope_theta: must be greater than 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor: is missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling: must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias: true is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq weights: not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype: must be one of"),
        ({"eos_token_id": "</s>"}, "eos_token_id: must be a token id"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(tmp_path, changes, message):
    with pytest.raises(ModelError) as caught:
        load(tmp_path, **changes)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": NaN', "[" * 100_000, "\x00\xff"])
def test_a_file_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json: not (valid JSON|a JSON object)"):
        ModelConfig.load(tmp_path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="no such file; is this a model folder"):
        ModelConfig.load(tmp_path)


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, minisgl_fast.model.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
