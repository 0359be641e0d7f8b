"""GGUF loading against the gguf package's own reader and decoder and against transformers."""

from __future__ import annotations

import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from gguf_files import (
    F32,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCAB,
    tiny_tensors,
    write_gguf,
)
from smollm2 import PATH, needs_model

import minisgl_fast.model.gguf as loader
from minisgl_fast.errors import ConfigError, ModelError
from minisgl_fast.model.gguf import load_tensors
from minisgl_fast.model.gguf_metadata import config_fields, read_config_fields, read_metadata

torch.set_num_threads(1)

QUANTIZERS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
# (type, byte offsets of the float16 scales in a block): gguf has no quantiser for these.
K_QUANTS = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
KNOWN_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass
class Heads:
    """The part of ModelConfig that the loader reads."""

    num_heads: int = HEADS
    num_kv_heads: int = KV_HEADS


def load(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict(load_tensors(path, Heads(), dtype))  # type: ignore[arg-type]


def one_tensor_file(
    path: Path, kind: gguf.GGMLQuantizationType, raw: numpy.ndarray, name: str = "output.weight"
) -> Path:
    return write_gguf(path, "qwen3", {name: (raw, kind)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type_name", QUANTIZERS)
def test_a_quantised_tensor_is_decoded_as_gguf_decodes_it(tmp_path, type_name, dtype):
    kind = gguf.GGMLQuantizationType[type_name]
    values = numpy.random.default_rng(2).standard_normal((48, 96), dtype=numpy.float32)
    raw = gguf.quants.quantize(values, kind)
    path = one_tensor_file(tmp_path / "x.gguf", kind, raw)
    loaded = load(path, dtype)["lm_head.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind).reshape(48, 96)).to(dtype)
    assert loaded.shape == (48, 96)
    assert torch.equal(loaded, expected)
    assert (loaded.float() - torch.from_numpy(values)).abs().max() < 0.5  # and it is the tensor


@pytest.mark.parametrize("type_name", K_QUANTS)
def test_a_k_quant_is_decoded_as_gguf_decodes_it(tmp_path, type_name):
    kind = gguf.GGMLQuantizationType[type_name]
    random = numpy.random.default_rng(3)
    num_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = random.integers(0, 256, (24, num_bytes), dtype=numpy.uint8)
    for offset in K_QUANTS[type_name]:  # finite scales, as a quantiser would write
        scales = random.standard_normal((24, 1)).astype(numpy.float16)
        blocks[:, offset : offset + 2] = scales.view(numpy.uint8)
    raw = blocks.reshape(12, 2 * num_bytes)
    path = one_tensor_file(tmp_path / "x.gguf", kind, raw)
    loaded = load(path)["lm_head.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert loaded.shape == (12, 512)
    assert torch.isfinite(expected).all() and expected.unique().numel() > 100
    assert torch.equal(loaded, expected)


@pytest.mark.parametrize("chunk", [256, 1024, 7 * 256])
def test_chunks_join_to_the_whole_tensor(tmp_path, monkeypatch, chunk):
    kind = gguf.GGMLQuantizationType.Q8_0
    values = numpy.random.default_rng(4).standard_normal((32, 96), dtype=numpy.float32)
    path = one_tensor_file(tmp_path / "x.gguf", kind, gguf.quants.quantize(values, kind))
    whole = load(path)["lm_head.weight"]
    monkeypatch.setattr(loader, "_CHUNK_VALUES", chunk)
    assert torch.equal(load(path)["lm_head.weight"], whole)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_1", "Q6_K"])
def test_a_large_tensor_is_decoded_in_little_memory(tmp_path, type_name):
    kind = gguf.GGMLQuantizationType[type_name]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 16384, 512  # 8M values: 32 MiB in float32
    raw = numpy.zeros((rows, columns // block_values * block_bytes), numpy.uint8)
    path = one_tensor_file(tmp_path / "x.gguf", kind, raw)
    tensors = load_tensors(path, Heads(), torch.bfloat16)  # type: ignore[arg-type]
    tracemalloc.start()  # sees numpy's arrays, not torch's result
    name, tensor = next(tensors)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (name, tensor.shape) == ("lm_head.weight", (rows, columns))
    assert peak_bytes < 16 << 20


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_tiny_model_has_transformers_names_shapes_and_values(tmp_path, architecture):
    tensors = tiny_tensors(architecture)
    loaded = load(write_gguf(tmp_path / "x.gguf", architecture, tensors))
    assert len(loaded) == len(tensors)
    assert torch.equal(
        loaded["model.embed_tokens.weight"], torch.from_numpy(tensors["token_embd.weight"][0])
    )
    for name, (data, _) in tensors.items():
        if not name.startswith("blk."):
            continue
        _, layer, kind, suffix = name.split(".")
        actual = loaded[f"model.layers.{layer}.{KNOWN_NAMES[kind]}.{suffix}"]
        assert actual.shape == data.shape
        if architecture != "llama" or kind not in ("attn_q", "attn_k"):
            assert torch.equal(actual, torch.from_numpy(data))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_tiny_model_equals_transformers_conversion(tmp_path, architecture):
    from transformers import AutoModelForCausalLM, GgufConfig

    tokens = [f"t{i}" for i in range(VOCAB)]
    # transformers leaves key_length unread for qwen3 and takes its class's default of 128.
    head_dim = 128 if architecture == "qwen3" else HEAD_DIM
    path = write_gguf(
        tmp_path / "x.gguf",
        architecture,
        tiny_tensors(architecture, head_dim=head_dim),
        head_dim,
        tokenizer__ggml__tokens=(tokens, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING),
    )
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    loaded = load(path)
    expected = reference.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    fields, config = read_config_fields(path), reference.config
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ):
        assert fields[name] == getattr(config, name), name
    assert fields["rms_norm_eps"] == pytest.approx(config.rms_norm_eps)
    assert fields["rope_theta"] == config.rope_parameters["rope_theta"]
    assert fields["architectures"] == [type(reference).__name__]


def test_the_llama_unpermute_puts_pairs_back_into_halves(tmp_path):
    # llama.cpp stores row 2i of a head for transformers' row i, and 2i + 1 for i + head_dim / 2.
    tensors = tiny_tensors("llama")
    loaded = load(write_gguf(tmp_path / "x.gguf", "llama", tensors))
    stored = torch.from_numpy(tensors["blk.1.attn_k.weight"][0])
    actual = loaded["model.layers.1.self_attn.k_proj.weight"]
    for head in range(KV_HEADS):
        for i in range(HEAD_DIM // 2):
            row = head * HEAD_DIM
            assert torch.equal(actual[row + i], stored[row + 2 * i])
            assert torch.equal(actual[row + i + HEAD_DIM // 2], stored[row + 2 * i + 1])


def test_tied_and_untied_embeddings_are_told_apart(tmp_path):
    tied = write_gguf(tmp_path / "tied.gguf", "qwen3", tiny_tensors("qwen3", tied=True))
    untied = write_gguf(tmp_path / "untied.gguf", "qwen3", tiny_tensors("qwen3"))
    assert "lm_head.weight" not in load(tied)
    assert read_config_fields(tied)["tie_word_embeddings"] is True
    assert read_config_fields(untied)["tie_word_embeddings"] is False


def test_a_bias_on_q_is_the_attention_bias(tmp_path):
    qwen2 = write_gguf(tmp_path / "a.gguf", "qwen2", tiny_tensors("qwen2"))
    qwen3 = write_gguf(tmp_path / "b.gguf", "qwen3", tiny_tensors("qwen3"))
    assert read_config_fields(qwen2)["attention_bias"] is True
    assert read_config_fields(qwen3)["attention_bias"] is False


def test_config_fields_round_float32_to_its_shortest_decimal(tmp_path):
    fields = read_config_fields(write_gguf(tmp_path / "x.gguf", "qwen3", tiny_tensors("qwen3")))
    assert fields["rms_norm_eps"] == 1e-6
    assert fields["rope_theta"] == 10000.0
    assert fields["eos_token_id"] == [7]
    assert fields["head_dim"] == HEAD_DIM


def test_end_of_turn_joins_the_eos_ids(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf",
        "qwen3",
        {},
        tokenizer__ggml__eot_token_id=(9, gguf.GGUFValueType.UINT32),
        tokenizer__ggml__eom_token_id=(7, gguf.GGUFValueType.UINT32),
    )
    assert config_fields(read_metadata(path))["eos_token_id"] == [7, 9]


def test_yarn_scaling_is_read_from_the_metadata(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf",
        "qwen3",
        {},
        qwen3__rope__scaling__type=("yarn", gguf.GGUFValueType.STRING),
        qwen3__rope__scaling__factor=(4.0, gguf.GGUFValueType.FLOAT32),
        qwen3__rope__scaling__original_context_length=(128, gguf.GGUFValueType.UINT32),
    )
    assert config_fields(read_metadata(path))["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def test_llama3_scaling_is_read_from_the_frequency_tensor(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": 10000.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    factors = (plain / scaled).numpy()
    tensors = {**tiny_tensors("llama"), "rope_freqs.weight": (factors, F32)}
    path = write_gguf(tmp_path / "x.gguf", "llama", tensors)
    assert read_config_fields(path)["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in load(path)
    tensors["rope_freqs.weight"] = (factors[::-1].copy(), F32)
    path = write_gguf(tmp_path / "y.gguf", "llama", tensors)
    with pytest.raises(ModelError, match="not Llama 3's rope scaling"):
        read_config_fields(path)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_file_is_one_clear_line(tmp_path, cut):
    path = write_gguf(tmp_path / "x.gguf", "llama", tiny_tensors("llama"))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ModelError, match=r"is truncated: .* download it again\.$") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_every_cut_of_the_header_is_a_model_error(tmp_path):
    whole = write_gguf(tmp_path / "x.gguf", "llama", tiny_tensors("llama")).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(0, 2200, 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            load(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x89PNG\r\n" * 40, b"GGUF" + b"\xff" * 400])
def test_a_foreign_file_is_a_model_error(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        load(path)
    with pytest.raises(ModelError):
        read_config_fields(path)


def test_an_unknown_architecture_names_those_that_work(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", "gemma3", {})
    for call in (load, read_config_fields):
        with pytest.raises(ModelError, match="'gemma3'.*llama, qwen2, qwen3"):
            call(path)


def test_an_unknown_tensor_or_type_is_refused_before_anything_is_yielded(tmp_path):
    tensors = tiny_tensors("llama")
    strange = {**tensors, "blk.0.ffn_gate_inp.weight": tensors["output_norm.weight"]}
    path = write_gguf(tmp_path / "x.gguf", "llama", strange)
    with pytest.raises(ModelError, match="blk.0.ffn_gate_inp.weight"):
        load_tensors(path, Heads(), torch.float32)  # type: ignore[arg-type]
    kind = gguf.GGMLQuantizationType.TQ2_0
    path = one_tensor_file(tmp_path / "y.gguf", kind, numpy.zeros((4, 66), numpy.uint8))
    with pytest.raises(ModelError, match="ggml type 35; supported are F32, F16"):
        load_tensors(path, Heads(), torch.float32)  # type: ignore[arg-type]


def test_missing_metadata_is_named(tmp_path):
    metadata = read_metadata(write_gguf(tmp_path / "x.gguf", "llama", {}))
    del metadata["llama.block_count"]
    with pytest.raises(ModelError, match="llama.block_count"):
        config_fields(metadata)


def test_without_the_gguf_package_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    kind = gguf.GGMLQuantizationType.Q8_0
    raw = gguf.quants.quantize(numpy.ones((4, 32), numpy.float32), kind)
    quantised = one_tensor_file(tmp_path / "x.gguf", kind, raw)
    plain = write_gguf(tmp_path / "y.gguf", "llama", tiny_tensors("llama"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'minisgl_fast\[gguf\]'"):
        load(quantised)
    assert load(plain)


@needs_model
def test_smollm2_equals_the_gguf_reader_bit_for_bit():
    loaded = dict(load_tensors(PATH, Heads(9, 3), torch.bfloat16))  # type: ignore[arg-type]
    assert read_config_fields(PATH)["rms_norm_eps"] == 1e-5
    tensors = gguf.GGUFReader(PATH).tensors
    assert len(loaded) == len(tensors) == 272
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for tensor in tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.startswith("blk."):
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{KNOWN_NAMES[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                rows, heads = values.shape[0], 9 if kind == "attn_q" else 3
                values = values.reshape(heads, rows // heads // 2, 2, 576)
                values = values.swapaxes(1, 2).reshape(rows, 576)
        else:
            name = outer[tensor.name.removesuffix(".weight")] + ".weight"
        # A copy: the reader maps the file read-only, and torch warns of such memory.
        expected = torch.from_numpy(numpy.array(values)).to(torch.bfloat16)
        assert torch.equal(loaded[name], expected), tensor.name
