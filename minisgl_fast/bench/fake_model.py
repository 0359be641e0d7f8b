"""The tokenizer of an engine without a model: bytes, and common English words.

A word that follows a space is one token, so text of such words costs a token a word, as English
does in the vocabularies of real models; all else costs a token a byte.
"""

from __future__ import annotations

import json
from pathlib import Path

from minisgl_fast.bench.vocabulary import WORDS

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
SPACE = "\u0120"  # how byte-level vocabularies write it
# What a fake engine says, over and over: every word is a token of most vocabularies.
FAKE_TEXT = " the time of the year is the year of the time" + "".join(
    f" {word}" for word in WORDS[:53]
)


def write_fake_model(folder: Path) -> None:
    """Write tokenizer.json, its config and a ChatML template into a folder that exists."""
    vocabulary = {character: index for index, character in enumerate(_byte_characters())}
    merges: list[list[str]] = []
    for word in ("the", "of", "is", *WORDS):
        left = SPACE
        for character in word:
            merged = left + character
            if merged not in vocabulary:
                vocabulary[merged] = len(vocabulary)
                merges.append([left, character])
            left = merged
    added = [
        {
            "id": len(vocabulary) + index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _byte_characters() -> list[str]:
    """The printable stand-ins of bytes 0 to 255 that GPT-2's vocabulary made common."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)
    ]
