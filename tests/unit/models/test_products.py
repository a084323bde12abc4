"""Products by oneDNN give what torch's own give, forward and backward, and are taken only where they are faster."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from m4train.models import products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Everything goes through oneDNN; how often it was called is the length of the list."""
    calls: list[int] = []
    real = products._onednn
    monkeypatch.setattr(products, "_LEAST", 1)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_onednn", lambda *given: calls.append(1) or real(*given))
    return calls


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("shape", [(1, 7, 5), (33, 64, 160), (257, 96, 31), (2, 3, 8, 8), (0, 4, 6), (40, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_outputs_and_gradients_are_those_of_torch(shape, bias, strided, forced) -> None:
    torch.manual_seed(0)
    *rows, size, out = shape
    given = [torch.randn(*rows, size), torch.randn(out, size), torch.randn(out) if bias else None]
    if strided:
        given[0] = torch.randn(*rows, 2 * size)[..., ::2]
        given[1] = torch.randn(size, out).t()
    gradient = torch.randn(*rows, 2 * out)[..., ::2] if strided else torch.randn(*rows, out)
    results = []
    for function in (products.linear, F.linear):
        taken = [None if x is None else x.detach().requires_grad_() for x in given]
        result = function(*taken)
        result.backward(gradient)
        results.append([result.detach(), *(x.grad for x in taken if x is not None)])
    assert len(forced) == (3 if given[0].numel() else 0)
    for found, expected in zip(*results):
        close(found, expected)


@pytest.mark.parametrize("trained", ["x", "weight", "bias", "none"])
def test_only_what_is_wanted_is_computed_and_kept(trained, forced) -> None:
    given = {"x": torch.randn(6, 4), "weight": torch.randn(5, 4), "bias": torch.randn(5)}
    if trained != "none":
        given[trained].requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = products.linear(*given.values())
    needed = {"x": ["weight"], "weight": ["x"]}.get(trained, [])
    assert [x.data_ptr() for x in kept] == [given[name].data_ptr() for name in needed]
    if trained == "none":
        assert not result.requires_grad
        return
    result.sum().backward()
    assert [name for name, x in given.items() if x.grad is not None] == [trained]
    assert len(forced) == (1 if trained == "bias" else 2)


def test_plain_products_and_sums_of_them(forced) -> None:
    torch.manual_seed(0)
    left, right, total = torch.randn(5000, 9), torch.randn(9, 20), torch.randn(5000, 20)
    close(products.product(left, right), left @ right)
    close(products.product(left.t().contiguous().t(), right.t().contiguous().t()), left @ right)
    expected = total + left @ right
    products.add_product(total, left, right)
    close(total, expected)
    assert len(forced) == 4  # 5,000 rows are summed in two parts


@pytest.mark.parametrize(
    "case", ["half precision", "float64", "autocast", "oneDNN switched off", "small", "another processor"]
)
def test_otherwise_it_is_torch_itself(case, forced, monkeypatch) -> None:
    dtype = {"half precision": torch.bfloat16, "float64": torch.float64}.get(case, torch.float32)
    x, weight = torch.randn(8, 8, dtype=dtype), torch.randn(8, 8, dtype=dtype)
    if case == "small":
        monkeypatch.setattr(products, "_LEAST", 513)
    if case == "another processor":
        monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
        torch.backends.mkldnn.flags(enabled=case != "oneDNN switched off"),
    ):
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))
        if case != "autocast":
            assert torch.equal(products.product(x, weight), x @ weight)
    assert not forced


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("HygonGenuine", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        (None, "AVX512", False),
    ],
)
def test_processors(vendor, capability, faster, monkeypatch, tmp_path) -> None:
    described = tmp_path / "cpuinfo"
    if vendor:
        described.write_text(f"vendor_id : {vendor}\nflags : avx2\n")
    monkeypatch.setattr(products, "Path", lambda name: described if name == "/proc/cpuinfo" else Path(name))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    products.onednn_is_faster.cache_clear()
    try:
        assert products.onednn_is_faster() is faster
    finally:
        products.onednn_is_faster.cache_clear()


@pytest.mark.parametrize("oneDNN", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_an_input_that_is_given_again_is_not_kept(oneDNN, trained, forced, monkeypatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: oneDNN)
    torch.manual_seed(0)
    source, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=trained)
    inner = source.sin()
    expected = torch.autograd.grad((F.linear(inner, weight) ** 2).sum(), [source, *[weight] * trained])
    kept: list[int] = []
    inner = source.sin()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        result = products.linear(products.recomputed(inner, torch.sin, source), weight)
    assert sorted(kept) == sorted([weight.data_ptr(), *[source.data_ptr()] * trained])
    for found, wanted in zip(torch.autograd.grad((result**2).sum(), [source, *[weight] * trained]), expected):
        close(found, wanted)


def test_a_graph_whose_backward_pass_is_done_keeps_nothing_to_make_inputs_of(forced) -> None:
    """A trainer may still hold the output of a micro-batch while it computes the next one."""
    weight, given = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    source = torch.ones_like(given)
    gone = weakref.ref(source.untyped_storage())
    output = products.linear(products.recomputed(given * source, torch.mul, given, source), weight).sum()
    del source
    assert gone() is not None
    output.backward()
    assert gone() is None
    close(weight.grad, given.sum(0).expand(3, 4))
