"""How an algorithm is chosen for a product: by time, with torch's own choice as the one to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from minisgl_fast.backend import product_plans
from minisgl_fast.backend.cublaslt import Algorithm, Product
from minisgl_fast.backend.product_plans import ProductPlans

CPU = torch.device("cpu")


class Library:
    """Three algorithms that compute with torch and note which one did."""

    def __init__(self) -> None:
        self.offered = [Algorithm(status=0, waves=float(i)) for i in range(3)]
        self.ran: list[int] = []

    def algorithms(self, product: Product, most: int) -> list[Algorithm]:
        return self.offered

    def run(self, product, algorithm, x, weight, out, *, add: bool) -> None:
        assert product == Product(len(x), *weight.shape, out.stride(0))
        self.ran.append(int(algorithm.waves))
        result = F.linear(x, weight)
        out.copy_(out + result if add else result)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(product_plans, "load_cublaslt", lambda device: library)
    return library


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, library: Library) -> ProductPlans:
    return timed(monkeypatch, library, 100.0, [99.0, 70.0, 80.0])


def timed(
    monkeypatch: pytest.MonkeyPatch, library: Library, torchs: float, algorithms: list[float]
) -> ProductPlans:
    """Plans whose measurements are these."""

    def times(
        self: ProductPlans,
        launches: Sequence[Callable[[torch.Tensor], object]],
        weights: Sequence[torch.Tensor],
        num_times: int,
    ) -> list[float]:
        found = []
        for launch in launches:
            before = len(library.ran)
            for weight in weights:
                launch(weight)
            found.append(algorithms[library.ran[-1]] if len(library.ran) > before else torchs)
        return found

    monkeypatch.setattr(ProductPlans, "_times", times)
    return ProductPlans(CPU)


def aligned(*shape: int) -> torch.Tensor:
    """Random values at an address as a GPU's allocator gives them."""
    count = torch.Size(shape).numel()
    base = torch.randn(count + 64)
    offset = -base.data_ptr() % 256 // 4
    return base[offset : offset + count].view(shape)


@pytest.fixture(autouse=True)
def aligned_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_plans, "ALIGNMENT", 4)


def test_nothing_is_planned_outside_planning(plans: ProductPlans, library: Library) -> None:
    assert not plans.run(aligned(4, 8), aligned(16, 8), aligned(4, 16))
    with plans.planning():
        pass
    assert not plans.run(aligned(4, 8), aligned(16, 8), aligned(4, 16))
    assert library.ran == []


@pytest.mark.parametrize("add", [False, True])
def test_the_fastest_algorithm_computes_from_then_on(
    plans: ProductPlans, library: Library, add: bool
) -> None:
    x, weight = aligned(4, 8), aligned(16, 8)
    before = aligned(4, 16)
    with plans.planning():
        assert not plans.run(x, weight, before.clone(), add=add)
        assert library.ran == []  # a step is timed when it is over
    assert library.ran == [0, 1, 2, 1, 2, 0]  # quickly, then the best of them again
    for _ in range(2):
        out = before.clone()
        with plans.planning():  # known already
            assert plans.run(x, weight, out, add=add)
        torch.testing.assert_close(out, F.linear(x, weight) + (before if add else 0))
    assert library.ran[6:] == [1, 1]
    assert not plans.run(aligned(5, 8), weight, aligned(5, 16), add=add)  # other rows: torch


def test_a_product_is_timed_with_the_weights_of_several_layers(
    plans: ProductPlans, library: Library
) -> None:
    x = aligned(4, 8)
    with plans.planning():
        for _ in range(product_plans.MAX_LAYERS + 3):
            assert not plans.run(x, aligned(16, 8), aligned(4, 16))
    assert library.ran.count(0) == 2 * product_plans.MAX_LAYERS


def test_torch_keeps_what_is_not_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, library: Library
) -> None:
    plans = timed(monkeypatch, library, 100.0, [99.6, 99.7, 120.0])
    x, weight, out = aligned(4, 8), aligned(16, 8), aligned(4, 16)
    with plans.planning():
        assert not plans.run(x, weight, out)
    assert not plans.run(x, weight, out)


def test_a_step_that_fails_plans_nothing(plans: ProductPlans, library: Library) -> None:
    x, weight, out = aligned(4, 8), aligned(16, 8), aligned(4, 16)
    with pytest.raises(ZeroDivisionError), plans.planning():
        plans.run(x, weight, out)
        raise ZeroDivisionError
    assert library.ran == []
    assert not plans.run(x, weight, out)


def test_many_rows_are_never_planned(plans: ProductPlans, library: Library) -> None:
    rows = product_plans.MAX_ROWS + 1
    with plans.planning():
        assert not plans.run(aligned(rows, 8), aligned(16, 8), aligned(rows, 16))
    assert library.ran == []


def test_a_product_that_lies_otherwise_goes_to_torch(
    monkeypatch: pytest.MonkeyPatch, plans: ProductPlans, library: Library
) -> None:
    x, weight, out = aligned(4, 8), aligned(16, 8), aligned(4, 16)
    with plans.planning():
        plans.run(x, weight, out)
    assert plans.run(x, weight, out)
    assert not plans.run(aligned(4, 16)[:, ::2], weight, out)
    monkeypatch.setattr(product_plans, "ALIGNMENT", 256)
    shifted = aligned(4 * 8 + 1)[1:].view(4, 8)
    assert not plans.run(shifted, weight, out)


def test_without_the_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_plans, "load_cublaslt", lambda device: None)
    plans = ProductPlans(CPU)
    with plans.planning():
        assert not plans.run(aligned(4, 8), aligned(16, 8), aligned(4, 16))
