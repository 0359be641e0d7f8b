"""Tensor maps: what the driver is asked for, and what a kernel that is given one then loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl_fast.backend import kernel
from minisgl_fast.backend.compile import expand, kernels_folder
from minisgl_fast.backend.nvrtc import load_nvrtc
from minisgl_fast.errors import EngineError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
    reason="tensor maps need a Hopper GPU or a newer one",
)


def test_a_map_is_asked_for_in_rows_columns_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def record(*numbers: int) -> bytes:
        asked.append(numbers)
        return bytes(128)

    monkeypatch.setattr(kernel, "_tensor_map", record)
    matrix = torch.zeros(24, 320, dtype=torch.bfloat16)[3:, 64:256]
    assert kernel.tensor_map(matrix, 16, 64) == bytes(128)
    assert asked == [(matrix.data_ptr(), 21, 192, 640, 16, 64)]


def test_a_refused_map_says_of_which_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*numbers: int) -> bytes:
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE")

    monkeypatch.setattr(kernel, "_tensor_map", refuse)
    matrix = torch.zeros(3, 8, dtype=torch.bfloat16)
    with pytest.raises(EngineError, match=r"3 x 8, 16 bytes a row, box 2 x 4.*INVALID_VALUE"):
        kernel.tensor_map(matrix, 2, 4)


def test_error_says_that_the_launcher_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_tensor_map", None)
    with pytest.raises(EngineError, match="need the compiled launcher"):
        kernel.tensor_map(torch.zeros(8, 64, dtype=torch.bfloat16), 8, 64)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    "change",
    [
        {"address": 8},  # not a multiple of 16
        {"row_stride_bytes": 1032},  # not a multiple of 16
        {"num_rows": 0},
        {"box_rows": 257},
        {"box_rows": 0},
        {"box_columns": 72},  # over 128 bytes
        {"box_columns": 4},  # not a multiple of 16 bytes
    ],
    ids=lambda change: "-".join(f"{name}-{value}" for name, value in change.items()),
)
def test_the_driver_refuses_what_a_map_cannot_be(change: dict[str, int]) -> None:
    from minisgl_fast.backend.launcher import tensor_map

    matrix = torch.zeros(128, 512, dtype=torch.bfloat16, device="cuda")
    numbers = {
        "address": matrix.data_ptr(),
        "num_rows": 128,
        "num_columns": 512,
        "row_stride_bytes": 1024,
        "box_rows": 64,
        "box_columns": 64,
    }
    assert len(tensor_map(**numbers)) == 128
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        tensor_map(
            **{**numbers, **change, "address": numbers["address"] + change.get("address", 0)}
        )


@pytest.fixture(scope="module")
def copy_box(tmp_path_factory: pytest.TempPathFactory) -> kernel.Kernel:
    """The kernel of tensor_map.cu."""
    cupy: Any = pytest.importorskip("cupy", reason="the GPU backend needs CuPy")
    folder, name = tmp_path_factory.mktemp("kernel"), "tensor_map.cu"
    shutil.copy(kernels_folder() / "common.cuh", folder)
    shutil.copy(Path(__file__).with_name(name), folder)
    device = torch.cuda.current_device()
    options = (f"--gpu-architecture={kernel.device_arch(device)}", "--std=c++17")
    cubin, _ = load_nvrtc().compile(expand(name, folder), name, options)
    (folder / "test.cubin").write_bytes(cubin)
    function = cupy.RawModule(path=str(folder / "test.cubin")).get_function("copy_box")
    return kernel.Kernel(name, function, device, pdl=False)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("row", "column"),
    [(0, 0), (7, 64), (30, 0), (-3, 0), (5, 136), (0, -8)],
    ids=["first", "inside", "below", "above", "right", "left"],
)
def test_a_box_arrives_swizzled_with_zeros_from_outside(
    copy_box: kernel.Kernel, row: int, column: int
) -> None:
    box_rows, box_columns, added = 16, 64, 3
    # Around the matrix are rows and columns that are not its own.
    whole = torch.arange(64 * 256, device="cuda").to(torch.int16).view(torch.bfloat16).view(64, 256)
    matrix = whole[8:48, 32:192]
    tensor_map = kernel.tensor_map(matrix, box_rows, box_columns)
    assert tensor_map is not None
    out = torch.full((box_rows * box_columns // 2 + 8,), -1, dtype=torch.int32, device="cuda")
    num_bytes = box_rows * box_columns * 2
    numbers = (row, out.data_ptr(), num_bytes, float(added))
    copy_box.launch((1,), 128, (column, tensor_map, *numbers), num_bytes)

    padded = torch.zeros(40 + 64, 160 + 128, dtype=torch.int16, device="cuda")
    padded[32:72, 64:224] = matrix.view(torch.int16)
    expected = padded[32 + row :, 64 + column :][:box_rows, :box_columns]
    chunks = expected.reshape(box_rows, 8, 8)  # of 16 bytes
    places = torch.arange(8, device="cuda") ^ (torch.arange(box_rows, device="cuda") % 8)[:, None]
    swizzled = torch.gather(chunks, 1, places[:, :, None].expand(-1, -1, 8))
    words = swizzled.reshape(-1).view(torch.int32) + added
    assert torch.equal(out[:-8], words)
    assert (out[-8:] == -1).all()
