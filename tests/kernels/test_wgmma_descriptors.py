"""The wgmma operands of prefill attention: K-major and transposed tiles as pages hold them.

Small integers, so that the products are exact and any wrong address shows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from minisgl_fast.backend.compile import expand, kernels_folder
from minisgl_fast.backend.kv_layout import swizzle
from minisgl_fast.backend.nvrtc import load_nvrtc

cupy = pytest.importorskip("cupy", reason="the GPU backend needs CuPy")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="wgmma needs a Hopper GPU",
    ),
]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_over_a_swizzled_page_are_exact(head_dim: int, tmp_path: Path) -> None:
    name = "wgmma_descriptors.cu"
    for path in (*kernels_folder().glob("*.cuh"), Path(__file__).with_name(name)):
        shutil.copy(path, tmp_path)
    options = ("--gpu-architecture=sm_90a", "--std=c++17", f"-DHEAD_DIM={head_dim}")
    cubin, _ = load_nvrtc().compile(expand(name, tmp_path), name, options)
    (tmp_path / "test.cubin").write_bytes(cubin)
    function = cupy.RawModule(path=str(tmp_path / "test.cubin")).get_function("wgmma_descriptors")

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(-4, 5, size, device="cuda").to(torch.bfloat16)

    q, p = integers(64, head_dim), integers(64, 128)
    k, v = integers(1, 128, 1, head_dim), integers(1, 128, 1, head_dim)
    page = swizzle(k, v)
    scores = torch.full((64, 128), float("nan"), device="cuda")
    output = torch.full((64, head_dim), float("nan"), device="cuda")
    shared_bytes = 3 * 128 * head_dim * 2 + 1024
    function.max_dynamic_shared_size_bytes = shared_bytes
    arguments = tuple(x.data_ptr() for x in (q, p, page, scores, output))
    function((1,), (128,), arguments, shared_mem=shared_bytes)
    cupy.cuda.Device().synchronize()
    assert torch.equal(scores, q.float() @ k[0, :, 0].float().T)
    assert torch.equal(output, p.float() @ v[0, :, 0].float())
