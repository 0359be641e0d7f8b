"""cuBLASLt's algorithms on the GPU: each computes the product, with one rounding."""

from __future__ import annotations

import pytest
import torch
from gpu_products import draw, relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = [pytest.mark.gpu, needs_gpu]

CASES = [(n, k, rows) for n, k in ((7168, 5120), (5120, 17408)) for rows in (9, 16, 64, 256)]


@pytest.mark.parametrize(("n", "k", "rows"), CASES)
def test_every_algorithm_computes_the_product(n: int, k: int, rows: int) -> None:
    from minisgl_fast.backend.cublaslt import Product, load_cublaslt

    library = load_cublaslt(torch.device("cuda", torch.cuda.current_device()))
    assert library is not None
    x, weight, before = draw(1, rows, k), draw(2, n, k), draw(3, rows, n) * 50
    product = x.double() @ weight.double().T
    shape = Product(rows, n, k, n)
    algorithms = library.algorithms(shape)
    assert algorithms
    for algorithm in algorithms:
        out = torch.full_like(before, float("nan"))
        library.run(shape, algorithm, x, weight, out, add=False)
        assert relative_error(out, product) < 3e-3
        again = torch.full_like(before, float("nan"))
        library.run(shape, algorithm, x, weight, again, add=False)
        assert torch.equal(out, again)
        out.copy_(before)
        library.run(shape, algorithm, x, weight, out, add=True)
        assert relative_error(out, product + before.double()) < 3e-3


def test_planned_products_equal_torch_and_survive_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl_fast.backend import product_plans
    from minisgl_fast.backend.product_plans import ProductPlans

    plans = ProductPlans(torch.device("cuda", torch.cuda.current_device()))
    x, weight = draw(1, 16, 5120), draw(2, 7168, 5120)
    out = torch.empty(16, 7168, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(product_plans, "MARGIN", -10.0)  # whatever is fastest of cuBLASLt's
    assert not plans.run(x, weight, out)
    with plans.planning():
        assert not plans.run(x, weight, out)
    assert plans.run(x, weight, out)
    expected = x.double() @ weight.double().T
    assert relative_error(out, expected) < 3e-3
    eager = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert plans.run(x, weight, out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)
