"""The tiny model folder against transformers and our own readers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_folder import TOOL
from tiny_folder import make_tiny_model as make

from minisgl_fast.model.config import GenerationConfig, ModelConfig


@pytest.mark.parametrize("arguments", [(), ("--untied", "--layers", "3", "--dtype", "bfloat16")])
def test_transformers_loads_the_folder_and_its_greedy_output_varies(tmp_path, arguments):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = make(tmp_path / "tiny", *arguments)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hé"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=24, do_sample=False, eos_token_id=319)
    new = output[0, ids["input_ids"].shape[1] :].tolist()
    assert len(new) == 24 and len(set(new)) > 8


def test_our_configuration_reads_what_was_asked_for(tmp_path):
    folder = make(tmp_path / "tiny", "--layers", "3", "--heads", "8", "--untied")
    config = ModelConfig.load(folder)
    assert (config.architecture, config.num_layers, config.num_heads) == ("Qwen3ForCausalLM", 3, 8)
    assert config.qk_norm and not config.tie_word_embeddings
    assert config.vocab_size == 320
    assert set(config.eos_token_ids) == {256, 258}
    assert GenerationConfig.load(folder).temperature == 0.7


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first, second, other = (
        make(tmp_path / name, "--seed", seed) / "model.safetensors"
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_a_vocabulary_below_the_tokenizer_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, tmp_path / "tiny", "--vocab", "100"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "--vocab must be at least 259, the tokenizer's ids\n"
