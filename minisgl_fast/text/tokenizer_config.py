"""What stands beside a tokenizer: the names of its special tokens and its chat templates.

For a folder that is tokenizer_config.json and chat_template.jinja (which wins, as transformers 5
writes templates there); for a .gguf file it is the metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import orjson

from minisgl_fast.errors import ModelError
from minisgl_fast.model.gguf_metadata import read_metadata

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_GGUF_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",  # spelt so by ggml
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# A GGUF file has no generation_config.json that could name all ends: other keys name some, and
# Qwen's also end with this one. (SmolLM2 has it too, but as the unknown token.)
_GGUF_END_KEYS = ("eos", "eot", "eom")
_END_OF_TEXT = "<|endoftext|>"


class TokenizerConfig(NamedTuple):
    """``special_tokens``: "bos_token", "eos_token", ... to the token's text.

    ``end_tokens``: texts that end a generation. ``chat_templates``: sources by name ("default",
    "tool_use"); empty for a model without one.
    """

    special_tokens: dict[str, str]
    end_tokens: tuple[str, ...]
    chat_templates: dict[str, str]


def load_tokenizer_config(path: Path) -> TokenizerConfig:
    """From a model folder or a .gguf file. ModelError if a file is there but broken."""
    if path.suffix == ".gguf":
        return from_gguf(read_metadata(path))
    return _from_folder(path)


def from_gguf(metadata: dict[str, Any]) -> TokenizerConfig:
    tokens = metadata.get("tokenizer.ggml.tokens", [])

    def text(key: str) -> str | None:
        token_id = metadata.get(key)
        known = isinstance(token_id, int) and 0 <= token_id < len(tokens)
        return tokens[token_id] if known else None

    special = {name: text(key) for name, key in _GGUF_KEYS.items()}
    ends = [text(f"tokenizer.ggml.{kind}_token_id") for kind in _GGUF_END_KEYS]
    if _END_OF_TEXT in tokens and special["unk_token"] != _END_OF_TEXT:
        ends.append(_END_OF_TEXT)
    prefix = "tokenizer.chat_template"
    templates = {
        "default" if key == prefix else key[len(prefix) + 1 :]: value
        for key, value in metadata.items()
        if isinstance(value, str) and (key == prefix or key.startswith(prefix + "."))
    }
    return TokenizerConfig(
        {name: token for name, token in special.items() if token is not None},
        tuple(token for token in ends if token is not None),
        templates,
    )


def _from_folder(path: Path) -> TokenizerConfig:
    config: dict[str, Any] = {}
    file = path / "tokenizer_config.json"
    if file.is_file():
        try:
            config = orjson.loads(file.read_bytes())
        except ValueError as error:
            raise ModelError(f"{file} is not valid JSON.") from error
        if not isinstance(config, dict):
            raise ModelError(f"{file} does not hold a JSON object.")
    special = {}
    for role in _ROLES:
        token = config.get(f"{role}_token")
        if isinstance(token, dict):  # an AddedToken written out
            token = token.get("content")
        if isinstance(token, str):
            special[f"{role}_token"] = token
    ends = (special["eos_token"],) if "eos_token" in special else ()
    return TokenizerConfig(special, ends, _folder_templates(path, config.get("chat_template")))


def _folder_templates(path: Path, configured: object) -> dict[str, str]:
    templates: dict[str, str] = {}
    if isinstance(configured, str):
        templates["default"] = configured
    elif isinstance(configured, list):
        for entry in configured:
            name, source = (
                entry.get(k) if isinstance(entry, dict) else None for k in ("name", "template")
            )
            if not isinstance(name, str) or not isinstance(source, str):
                raise ModelError(f"chat_template in {path}/tokenizer_config.json is malformed.")
            templates[name] = source
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            templates["default"] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"Cannot read {file}.") from error
    return templates
