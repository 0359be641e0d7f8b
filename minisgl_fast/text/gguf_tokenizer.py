"""A byte-level BPE tokenizer rebuilt from the metadata of a GGUF file.

GGUF stores vocabulary, merges and token types, but of the pre-tokenizer only a name
(``tokenizer.ggml.pre``). The names below are those of the families that this server runs; splitting
differently gives wrong token ids without any error, so an unknown name is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from minisgl_fast.errors import ModelError
from minisgl_fast.text.tokenizer_config import from_gguf

# ggml's token types (1 is normal)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"


class _Family(NamedTuple):
    """``split`` None: the regular expression of GPT-2."""

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = _Family()
_DIGITS = _Family(single_digits=True)
_LLAMA3 = _Family(_LLAMA3_SPLIT, ignore_merges=True, add_bos=True)
_FAMILIES = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "qwen2": _Family(_QWEN2_SPLIT, nfc=True),
    "deepseek-r1-qwen": _Family(_QWEN2_SPLIT),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """From ``gguf_metadata.read_metadata``. ModelError if the vocabulary is not of a known kind."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(
            f"The GGUF file holds a tokenizer of type {kind!r}; only byte-level BPE ('gpt2') can "
            "be rebuilt. Use a folder with tokenizer.json."
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _FAMILIES:
        raise ModelError(
            f"The GGUF file names the pre-tokenizer {name!r}; known are {', '.join(_FAMILIES)}. "
            "Use a folder with tokenizer.json."
        )
    return _build(metadata, _FAMILIES[name])


def _build(metadata: dict[str, Any], family: _Family) -> Tokenizer:
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    merges = _texts(metadata, "tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        types = [1] * len(tokens)
    kept = [index for index, kind in enumerate(types) if kind != _UNUSED]
    vocabulary = {tokens[index]: index for index in kept}
    if len(vocabulary) != len(kept):
        raise ModelError("The GGUF file holds two tokens with the same text.")
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=[_pair(merge) for merge in merges],
            ignore_merges=family.ignore_merges,
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"The GGUF file's merges do not fit its vocabulary: {error}.") from error
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(
        [_added(tokens[index], True) for index in kept if types[index] == _CONTROL]
    )
    tokenizer.add_tokens(
        [_added(tokens[index], False) for index in kept if types[index] == _USER_DEFINED]
    )
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(family)
    tokenizer.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.add_bos_token", family.add_bos):
        bos = from_gguf(metadata).special_tokens.get("bos_token")
        if bos is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=None, special_tokens=[(bos, vocabulary[bos])]
            )
    return tokenizer


def _pre_tokenizer(family: _Family) -> pre_tokenizers.PreTokenizer:
    if family.split is not None:
        split = pre_tokenizers.Split(Regex(family.split), behavior="isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if family.single_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    return byte_level


def _added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _texts(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"The GGUF file lacks {key}.")
    return value
