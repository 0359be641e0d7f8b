"""The header of a GGUF file: its key-value metadata and where its tensors lie.

Layout (docs/gguf.md of ggml, versions 2 and 3, little-endian): ``GGUF``, u32 version, u64 number of
tensors, u64 number of pairs, the pairs, the tensor infos, padding to ``general.alignment``, the data.

Rules: no torch, no numpy and no ``gguf`` package, whose reader takes seconds to open a file because
it builds an array per vocabulary entry; only the header's pages are touched; every length is checked
against the file before it is used, so that a broken or hostile file ends in a ModelError.
"""

from __future__ import annotations

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
