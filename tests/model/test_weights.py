"""Checkpoints on disk: sharded or not, tied or not, in any float type; and broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from step_driver import Driver
from tiny_models import make_model, oracle_logits, write_model

from minisgl_fast.backend.reference import ReferenceBackend
from minisgl_fast.errors import ModelError
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.model.qwen3 import Qwen3
from minisgl_fast.model.weights import ModelWeights, dummy_weights, load_weights

torch.set_num_threads(1)

CPU = torch.device("cpu")
TOKENS = list(range(7, 60))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    return load_weights(folder, ModelConfig.load(folder), dtype, CPU)


def last_logits(folder: Path) -> torch.Tensor:
    driver = Driver.load(folder)
    driver.add(0, TOKENS)
    return driver.run([(0, len(TOKENS))])[0]


def write(folder: Path, name: str = "qwen3", **options: object) -> Path:
    return write_model(make_model(name), folder, **options)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied"])
def test_a_sharded_checkpoint_gives_the_same_logits(tmp_path, name):
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    write(single, name)
    write(sharded, name, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert not (sharded / "model.safetensors").exists()
    assert torch.equal(last_logits(sharded), last_logits(single))


def test_a_tied_head_that_is_stored_all_the_same_is_not_used(tmp_path):
    write(tmp_path, "qwen3-tied")
    expected = oracle_logits(make_model("qwen3-tied"), TOKENS)[-1]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, {"lm_head.weight": torch.full((320, 64), 3.0)})
    weights = load(tmp_path)
    assert weights.lm_head.data_ptr() == weights.embed_tokens.data_ptr()
    torch.testing.assert_close(last_logits(tmp_path), expected, atol=1e-3, rtol=1e-3)


def test_an_untied_head_is_its_own(tmp_path):
    write(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = load(tmp_path)
    assert torch.equal(weights.lm_head, stored["lm_head.weight"])
    assert not torch.equal(weights.lm_head, weights.embed_tokens)


def test_projections_are_joined_in_order(tmp_path):
    write(tmp_path, "qwen2")
    stored = load_file(tmp_path / "model.safetensors")
    layer = load(tmp_path).layers[1]
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    qkv = [f"{attention}{letter}_proj" for letter in "qkv"]
    assert torch.equal(layer.qkv, torch.cat([stored[f"{name}.weight"] for name in qkv]))
    assert layer.qkv_bias is not None
    assert torch.equal(layer.qkv_bias, torch.cat([stored[f"{name}.bias"] for name in qkv]))
    gate_up = [stored[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.gate_up, torch.cat(gate_up))
    assert layer.output_bias is None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_to_the_dtype_of_the_run(tmp_path, stored, wanted):
    write_model(make_model("llama").to(stored), tmp_path)
    weights = load(tmp_path, wanted)
    expected = load_file(tmp_path / "model.safetensors")["model.norm.weight"].to(wanted)
    assert weights.layers[0].qkv.dtype == weights.lm_head.dtype == wanted
    assert torch.equal(weights.norm, expected)


def test_progress_ends_complete(tmp_path):
    calls: list[tuple[str, int, int]] = []
    write(tmp_path)
    config = ModelConfig.load(tmp_path)
    load_weights(tmp_path, config, torch.float32, CPU, lambda *call: calls.append(call))
    assert calls[0] == ("Loading weights", 0, 25)
    assert calls[-1] == ("Loading weights", 25, 25)


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    write(tmp_path)
    rewrite(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    load(tmp_path)


NORM, QKV = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: None}, "missing from the checkpoint: model.norm.weight."),
        ({NORM: None, QKV: None}, "model.norm.weight, model.layers.1.self_attn.k_proj.weight."),
        ({"lm_head.weight": None}, "missing from the checkpoint: lm_head.weight"),
        ({QKV: torch.zeros(64, 65)}, f"{QKV} has shape [64, 65], the configuration says [64, 64]"),
        ({NORM: torch.zeros(64, 1)}, "has shape [64, 1], the configuration says [64]"),
        ({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}, "has no tensor 'model.layers.2"),
        ({"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}, "has no tensor 'model.layers.0"),
        ({NORM: torch.zeros(64, dtype=torch.int8)}, "is stored as torch.int8"),
        ({NORM: torch.zeros(64, dtype=torch.float64)}, "is stored as torch.float64"),
    ],
)
def test_a_checkpoint_that_does_not_match_is_one_clear_line(tmp_path, change, message):
    write(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_misshapen_head_is_refused_even_where_it_is_not_used(tmp_path):
    write(tmp_path, "qwen3-tied")
    rewrite(tmp_path, {"lm_head.weight": torch.zeros(320, 65)})
    with pytest.raises(ModelError, match=r"lm_head\.weight has shape \[320, 65\]"):
        load(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1, -5000])
def test_a_file_cut_at_any_place_is_named(tmp_path, num_bytes):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or not a safetensors"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is named by .* but missing"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    save_file({**load_file(shards[0]), **load_file(shards[1])}, shards[1])
    with pytest.raises(ModelError, match="or it is twice"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "is not a file name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is not a file name"),
        ({"weight_map": {"a": 3}}, "is not a file name"),
        ({"weight_map": [1]}, "not an index"),
        ({}, "not an index"),
        ([], "not an index"),
    ],
)
def test_an_index_that_is_none_or_points_elsewhere(tmp_path, index, message):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_a_pickled_checkpoint_is_not_read(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled checkpoints .* are not read"):
        load(tmp_path)


def test_a_model_that_no_memory_holds(tmp_path):
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no memory for"):
        load(tmp_path)


def test_dummy_weights_run_and_repeat_with_their_seed(tmp_path):
    write(tmp_path, "qwen3-tied")
    config = ModelConfig.load(tmp_path)
    weights = [dummy_weights(config, torch.float32, CPU, seed) for seed in (1, 1, 2)]
    assert torch.equal(weights[0].layers[1].gate_up, weights[1].layers[1].gate_up)
    assert not torch.equal(weights[0].layers[1].gate_up, weights[2].layers[1].gate_up)
    driver = Driver(Qwen3(config, weights[0], ReferenceBackend()), config)
    tokens = [5]
    driver.add(0, tokens)
    for _ in range(20):
        driver.sequences[0].tokens.append(int(driver.run([(0, 1)]).argmax()))
    assert len(set(driver.sequences[0].tokens)) > 10
