"""The header of a GGUF file: key-value metadata, model configuration and where its tensors lie.

Layout (docs/gguf.md of ggml, versions 2 and 3, little-endian): ``GGUF``, u32 version, u64 number
of tensors, u64 number of pairs, the pairs, the tensor infos, padding to ``general.alignment``, the
data.

Rules: no torch, no numpy and no ``gguf`` package, whose reader takes seconds to open a file
because it builds an array per vocabulary entry; only the header's pages are touched; every length
is checked against the file before it is used, so that a broken or hostile file ends in a
ModelError.
"""

from __future__ import annotations

import math
import mmap
import struct
from os import PathLike
from typing import Any, NamedTuple

from minisgl_fast.errors import ModelError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 4
_MAX_ROPE_BYTES = 4096

# general.architecture -> the class of transformers whose weights and computation it is.
# Mistral's files say llama: the two are the same computation.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class TensorInfo(NamedTuple):
    """One tensor: ``shape`` is row-major (torch's order, the reverse of the file's).

    ``ggml_type`` is ggml's number of the storage type (0 F32, 1 F16, 8 Q8_0, 30 BF16, ...);
    ``offset`` is in bytes from the start of the file.
    """

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class GGUFHeader(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """The key-value pairs: int, float, bool, str or (nested) list of them. ModelError if broken."""
    return _read(path).metadata


def read_header(path: str | PathLike[str]) -> GGUFHeader:
    """Metadata and tensor infos by name. ModelError if the file is no readable GGUF."""
    return _read(path)


def _read(path: str | PathLike[str]) -> GGUFHeader:
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Cursor(data).header()
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (_Malformed, struct.error, ValueError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}.") from error


class _Malformed(Exception):
    """What is wrong with the file; ``_read`` adds the path."""


class _Cursor:
    """A position in the mapped file, moved on by every read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.offset = 0

    def header(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise _Malformed("it does not start with GGUF")
        self.offset = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise _Malformed(f"version {version} is not supported (2 and 3 are)")
        num_tensors = self.count(24)
        num_pairs = self.count(13)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        infos = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Malformed(f"general.alignment is {alignment!r}")
        start = -(-self.offset // alignment) * alignment
        return GGUFHeader(
            metadata,
            {name: info._replace(offset=start + info.offset) for name, info in infos},
        )

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.offset)[0]
        self.offset += struct.calcsize("<" + code)
        return value

    def count(self, min_item_bytes: int) -> int:
        """A u64 number of items that the rest of the file can really hold."""
        number: int = self.scalar("Q")
        if number * min_item_bytes > self.size - self.offset:
            raise _Malformed(f"a length of {number} at byte {self.offset - 8} passes its end")
        return number

    def string(self) -> str:
        num_bytes = self.count(1)
        self.offset += num_bytes
        return self.data[self.offset - num_bytes : self.offset].decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < _MAX_ARRAY_DEPTH:
            item_kind = self.scalar("I")
            if item_kind in _SCALARS:
                code = _SCALARS[item_kind]
                number = self.count(struct.calcsize("<" + code))
                values = struct.unpack_from(f"<{number}{code}", self.data, self.offset)
                self.offset += struct.calcsize(f"<{number}{code}")
                return list(values)
            number = self.count(8)
            return [self.value(item_kind, depth + 1) for _ in range(number)]
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        raise _Malformed(f"value type {kind} at byte {self.offset} is not known")

    def tensor(self) -> tuple[str, TensorInfo]:
        name = self.string()
        num_dimensions = self.scalar("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise _Malformed(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(num_dimensions))
        return name, TensorInfo(shape[::-1], self.scalar("I"), self.scalar("Q"))


def read_config_fields(path: str | PathLike[str]) -> dict[str, Any]:
    """``config_fields`` of a file, with what only its tensors tell.

    Adds ``tie_word_embeddings`` (no ``output.weight``), ``attention_bias`` (q has a bias) and the
    rope scaling of Llama 3, which llama.cpp keeps as the tensor ``rope_freqs.weight`` alone.
    """
    header = read_header(path)
    fields = config_fields(header.metadata)
    fields["tie_word_embeddings"] = "output.weight" not in header.tensors
    fields["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if "rope_freqs.weight" in header.tensors and fields["rope_scaling"] is None:
        factors = _read_rope_factors(path, header.tensors["rope_freqs.weight"])
        fields["rope_scaling"] = _llama3_scaling(path, fields, factors)
    return fields


def config_fields(metadata: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json (transformers 4 shape) that the metadata holds.

    ``eos_token_id`` is a list: end of sequence, of turn and of message, as far as they are named.
    Raises ModelError for an architecture that is not one of ``ARCHITECTURES`` or a missing field.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"GGUF architecture {architecture!r} is not supported; {', '.join(ARCHITECTURES)} are."
        )
    prefix = f"{architecture}."
    if metadata.get(f"{prefix}expert_count"):
        raise ModelError("GGUF files with experts (mixture of experts) are not supported.")
    hidden_size = _positive_int(metadata, f"{prefix}embedding_length")
    num_heads = _positive_int(metadata, f"{prefix}attention.head_count")
    head_dim = _positive_int(metadata, f"{prefix}attention.key_length", hidden_size // num_heads)
    if _positive_int(metadata, f"{prefix}rope.dimension_count", head_dim) != head_dim:
        raise ModelError("GGUF files that rotate only a part of each head are not supported.")
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "vocab_size": _positive_int(
            metadata, f"{prefix}vocab_size", len(vocabulary) if vocabulary else None
        ),
        "hidden_size": hidden_size,
        "intermediate_size": _positive_int(metadata, f"{prefix}feed_forward_length"),
        "num_hidden_layers": _positive_int(metadata, f"{prefix}block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _positive_int(
            metadata, f"{prefix}attention.head_count_kv", num_heads
        ),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _positive_int(metadata, f"{prefix}context_length"),
        "rms_norm_eps": _float(metadata, f"{prefix}attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(metadata, f"{prefix}rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, prefix),
        "torch_dtype": {0: "float32", 1: "float16"}.get(
            metadata.get("general.file_type", -1), "bfloat16"
        ),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(metadata),
    }


def _positive_int(metadata: dict[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]  # one entry a layer, all the same
    if type(value) is not int or value < 1:
        raise ModelError(f"GGUF metadata {key} must be a positive integer, got {value!r}.")
    return value


def _float(metadata: dict[str, Any], key: str, default: float | None = None) -> float:
    value: Any = metadata.get(key, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ModelError(f"GGUF metadata {key} must be a positive number, got {value!r}.")
    return shortest_float32(value)


def shortest_float32(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-5, not 9.99999974e-06."""
    for num_digits in range(1, 9):
        candidate = float(f"{value:.{num_digits}g}")
        if struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return float(f"{value:.9g}")


def _eos_token_ids(metadata: dict[str, Any]) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (metadata.get(f"tokenizer.ggml.{key}") for key in keys)
    return list(dict.fromkeys(token for token in ids if type(token) is int))


def _rope_scaling(metadata: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    prefix += "rope.scaling."
    kind = metadata.get(f"{prefix}type", "none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _float(metadata, f"{prefix}factor")}
    original = f"{prefix}original_context_length"
    if original in metadata:
        scaling["original_max_position_embeddings"] = _positive_int(metadata, original)
    for name in ("beta_fast", "beta_slow"):
        if f"{prefix}yarn_{name}" in metadata:
            scaling[name] = _float(metadata, f"{prefix}yarn_{name}")
    return scaling


def _read_rope_factors(path: str | PathLike[str], info: TensorInfo) -> tuple[float, ...]:
    num_bytes = 4 * info.shape[0] if len(info.shape) == 1 and info.ggml_type == 0 else 0
    with open(path, "rb") as file:
        file.seek(info.offset)
        data = file.read(min(num_bytes, _MAX_ROPE_BYTES))
    if not num_bytes or len(data) != num_bytes:
        raise ModelError(f"{path}: rope_freqs.weight cannot be read; download the file again.")
    return struct.unpack(f"<{info.shape[0]}f", data)


def _llama3_scaling(
    path: str | PathLike[str], fields: dict[str, Any], factors: tuple[float, ...]
) -> dict[str, Any] | None:
    """Llama 3.1's parameters from the divisors of its rotary frequencies.

    The largest divisor is ``factor``; the other parameters are the same in every Llama 3.1 to 3.3
    (1, 4, 8192), and the divisors that they give (transformers' ``_compute_llama3_parameters``)
    must be those of the file.
    """
    factor = float(f"{max(factors):.4g}")  # writers that divide leave float32 noise
    if factor == 1.0:
        return None
    low, high, original = 1.0, 4.0, 8192
    head_dim, theta = fields["head_dim"], fields["rope_theta"]
    expected = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(expected) != len(factors) or not all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, factors, strict=True)
    ):
        raise ModelError(f"{path}: rope_freqs.weight is not Llama 3's rope scaling.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
