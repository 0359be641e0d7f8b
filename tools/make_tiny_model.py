"""Write a tiny random Qwen3: a folder that the server loads in a second, for demos and tests.

    python tools/make_tiny_model.py /tmp/tiny && minisgl-fast --model /tmp/tiny

The weights are noise, so the answers are too; everything else is real: safetensors, config.json,
generation_config.json, a byte-level tokenizer.json (256 bytes and three control tokens), a ChatML
template. Standard deviation 0.5, not the usual 0.02, makes the greedy output vary; with 0.02 one
token repeats for ever and a test of it proves nothing. The vocabulary is padded beyond the
tokenizer's ids, as Qwen3's is. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
STANDARD_DEVIATION = 0.5
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def write_tiny_model(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = 320,
    max_position: int = 4096,
    dtype: str = "float32",
    untied: bool = False,
    seed: int = 0,
) -> None:
    """Write the model into ``folder``, which is made if it does not exist."""
    tokenizer = make_tokenizer()
    num_tokens = tokenizer.get_vocab_size()
    if vocab < num_tokens:
        raise SystemExit(f"--vocab must be at least {num_tokens}, the tokenizer's ids")
    if heads % kv_heads or head_dim % 2:
        raise SystemExit("--heads must be a multiple of --kv-heads, and --head-dim even")
    end_of_text, _, end_of_turn = (tokenizer.token_to_id(token) for token in CONTROL_TOKENS)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": end_of_text,
        "dtype": dtype,
        "eos_token_id": end_of_turn,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_position,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": not untied,
        "vocab_size": vocab,
    }
    weights = make_weights(config, getattr(torch, dtype), seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"do_sample": True, "eos_token_id": [end_of_turn, end_of_text], "temperature": 0.7},
    )
    write_json(
        folder / "tokenizer_config.json",
        {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def make_tokenizer() -> Tokenizer:
    """One token a byte, so that any text can be encoded and any output cuts characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    )
    return tokenizer


def make_weights(
    config: dict[str, object], dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """Normal matrices, norm weights around one, under transformers' parameter names."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: value for name, value in config.items() if type(value) is int}
    hidden, head_dim = sizes["hidden_size"], sizes["head_dim"]
    q_size = sizes["num_attention_heads"] * head_dim
    kv_size = sizes["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return (values * STANDARD_DEVIATION).to(dtype)

    def norm(size: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    weights = {"model.embed_tokens.weight": matrix(sizes["vocab_size"], hidden)}
    for index in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        weights[f"{layer}input_layernorm.weight"] = norm(hidden)
        weights[f"{layer}self_attn.q_proj.weight"] = matrix(q_size, hidden)
        weights[f"{layer}self_attn.k_proj.weight"] = matrix(kv_size, hidden)
        weights[f"{layer}self_attn.v_proj.weight"] = matrix(kv_size, hidden)
        weights[f"{layer}self_attn.o_proj.weight"] = matrix(hidden, q_size)
        weights[f"{layer}self_attn.q_norm.weight"] = norm(head_dim)
        weights[f"{layer}self_attn.k_norm.weight"] = norm(head_dim)
        weights[f"{layer}post_attention_layernorm.weight"] = norm(hidden)
        weights[f"{layer}mlp.gate_proj.weight"] = matrix(sizes["intermediate_size"], hidden)
        weights[f"{layer}mlp.up_proj.weight"] = matrix(sizes["intermediate_size"], hidden)
        weights[f"{layer}mlp.down_proj.weight"] = matrix(hidden, sizes["intermediate_size"])
    weights["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(sizes["vocab_size"], hidden)
    return weights


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--intermediate", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=320)
    parser.add_argument("--max-position", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--untied", action="store_true", help="write an lm_head of its own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_tiny_model(**vars(arguments))
    print(f"Wrote a random Qwen3 to {arguments.folder}")


if __name__ == "__main__":
    main()
