"""Tests of `moxe_plugin.nn.products`: gradients, and what is computed by what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor, bfloat16, float16, float32, float64
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moxe_plugin.nn import products
from moxe_plugin.nn.native.library import (
    NativeLibraryError,
    load_library,
    why_not_loaded,
)
from moxe_plugin.nn.native.products import Product
from moxe_plugin.nn.products import (
    add_product,
    matmul,
    multiply,
    multiply_all,
    rounds_factors,
    rounds_to_bfloat16,
    runs_native,
    why_torch,
)


def find_obstacle() -> str | None:
    """Return why no product can run in C++ here."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return f"torch uses {capability}, and they need AVX512"

    return why_not_loaded("products")


needs_avx512 = pytest.mark.skipif(
    find_obstacle() is not None, reason=f"no products in C++ here: {find_obstacle()}"
)

ERROR_OF_NATIVE: Final = "`MOXE_PRODUCTS` must be 'auto' or 'torch' on this machine"


@pytest.fixture
def chooses() -> Iterator[None]:
    """Let what is chosen be chosen again, in the test and after it."""
    for function in (why_torch, rounds_to_bfloat16, load_library, why_not_loaded):
        function.cache_clear()

    yield

    for function in (why_torch, rounds_to_bfloat16, load_library, why_not_loaded):
        function.cache_clear()


@pytest.fixture
def takes_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take C++ wherever it can be, whatever processor and environment say."""
    monkeypatch.setattr(products, "why_torch", lambda: None)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Product]]:
    """Return what is given to C++, in whose place torch computes it: runs anywhere."""
    monkeypatch.setattr(products, "why_torch", lambda: None)

    calls: list[Sequence[Product]] = []

    def record(
        wanted: Sequence[Product],
        *,
        adds: bool = False,
        streams: bool = False,  # noqa: ARG001  # as the function has it
    ) -> None:
        calls.append(wanted)
        for lhs, rhs, out in wanted:
            out.copy_(lhs @ rhs + (out if adds else 0.0))

    monkeypatch.setattr("moxe_plugin.nn.native.products.multiply_all", record)

    return calls


@pytest.fixture
def _multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that the processor multiplies it."""
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: True)


def differentiate(
    function: Callable[[Tensor, Tensor], Tensor], lhs: Tensor, rhs: Tensor
) -> list[Tensor]:
    """Return the outputs, and the gradients of those that need one."""
    out = function(lhs, rhs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    leaves = [x for x in (lhs, rhs) if x.requires_grad]

    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@needs_avx512
@pytest.mark.usefixtures("takes_native")
@pytest.mark.parametrize("needs", ["both", "lhs", "rhs"])
@pytest.mark.parametrize(
    ("batch", "m", "k", "n"),
    [
        ((), 5, 7, 9),
        ((), 33, 257, 31),
        ((3,), 1, 300, 17),
        ((2, 3), 16, 40, 513),
        ((2, 1, 3), 4, 5, 6),
        ((), 4, 0, 3),
        ((2,), 0, 4, 3),
        ((0, 2), 4, 4, 3),
    ],
    ids=str,
)
def test_products_and_gradients_are_those_of_torch(
    batch: tuple[int, ...], m: int, k: int, n: int, needs: str
) -> None:
    lhs, rhs = torch.randn(*batch, m, k), torch.randn(*batch, n, k).mT
    lhs.requires_grad_(needs != "rhs")
    rhs.requires_grad_(needs != "lhs")

    actual = differentiate(matmul, lhs, rhs)
    expected = differentiate(torch.matmul, lhs, rhs)

    # Sums of some hundred terms about 1 in size, in another order.
    assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert_close(multiply(lhs.detach(), rhs.detach()), actual[0], rtol=0, atol=0)


@needs_avx512
@pytest.mark.usefixtures("takes_native")
def test_batches_that_are_no_view_of_matrices_are_multiplied() -> None:
    lhs, rhs = torch.randn(3, 2, 5, 7).transpose(0, 1), torch.randn(2, 3, 7, 4)
    vectors = torch.randn(2, 3, 1, 7).expand(2, 3, 5, 7)

    assert_close(multiply(lhs, rhs), lhs @ rhs)
    assert_close(multiply(vectors, rhs), vectors @ rhs)


@needs_avx512
@pytest.mark.usefixtures("takes_native")
def test_a_product_is_added_in_place() -> None:
    lhs, rhs, matrix = torch.randn(6, 20), torch.randn(20, 9), torch.randn(10, 30)
    old = matrix.clone()

    add_product(matrix[2:8, 5:14], lhs, rhs)

    old[2:8, 5:14] += lhs @ rhs
    assert_close(matrix, old)


def into_zeros(lhs: Tensor, rhs: Tensor) -> Tensor:
    out = lhs.new_zeros(*lhs.shape[:-1], rhs.size(-1))
    multiply_all([Product(lhs, rhs, out)])

    return out


def onto_zeros(lhs: Tensor, rhs: Tensor) -> Tensor:
    out = lhs.new_zeros(*lhs.shape[:-1], rhs.size(-1))
    add_product(out, lhs, rhs)

    return out


FUNCTIONS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "matmul": matmul,
    "multiply": multiply,
    "multiply_all": into_zeros,
    "add_product": onto_zeros,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_on_a_cpu_is_given_to_cpp(
    name: str, native_calls: list[Sequence[Product]]
) -> None:
    lhs, rhs = torch.randn(3, 5), torch.nn.Parameter(torch.randn(5, 4))

    assert_close(FUNCTIONS[name](lhs, rhs.data), lhs @ rhs.data)
    assert len(native_calls) == 1
    assert runs_native(lhs, rhs)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [float64, bfloat16], ids=str)
def test_other_types_are_torchs(
    name: str,
    dtype: torch.dtype,
    native_calls: list[Sequence[Product]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: False)
    lhs, rhs = torch.randn(3, 5, dtype=dtype), torch.randn(5, 4, dtype=dtype)

    assert_close(FUNCTIONS[name](lhs, rhs), lhs @ rhs)
    assert native_calls == []


@pytest.mark.usefixtures("_multiplies_bfloat16")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_is_given_to_cpp_where_the_processor_multiplies_it(
    name: str, native_calls: list[Sequence[Product]]
) -> None:
    lhs, rhs = torch.randn(9, 5, dtype=bfloat16), torch.randn(5, 4, dtype=bfloat16)

    out = FUNCTIONS[name](lhs, rhs)

    assert_close(out, lhs @ rhs)
    assert len(native_calls) == 1


@pytest.mark.usefixtures("_multiplies_bfloat16")
def test_types_are_mixed_only_where_that_is_asked_for(
    native_calls: list[Sequence[Product]],
) -> None:
    lhs, rhs = torch.randn(9, 5), torch.randn(5, 4, dtype=bfloat16)

    assert runs_native(lhs, rhs, mixes=True)
    assert not runs_native(lhs, rhs)
    with pytest.raises(RuntimeError, match="same dtype"):
        multiply(lhs, rhs)
    assert native_calls == []


@needs_avx512
@pytest.mark.usefixtures("takes_native")
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_gradients_of_bfloat16_are_rounded_once(batch: tuple[int, ...]) -> None:
    lhs = torch.randn(*batch, 33, 257, dtype=bfloat16)
    rhs = torch.randn(*batch, 257, 31, dtype=bfloat16)
    grad = torch.randn(*batch, 33, 31, dtype=bfloat16)
    leaves = [x.requires_grad_() for x in (lhs, rhs)]

    out = matmul(lhs, rhs)
    actual = [out, *torch.autograd.grad(out, leaves, grad)]

    left, right, of_out = (x.detach().double() for x in (lhs, rhs, grad))
    expected = [left @ right, of_out @ right.mT, left.mT @ of_out]
    for result, exact in zip(actual, expected, strict=True):
        assert result.dtype == bfloat16
        # Half a unit in the last of 8 places; the rest is for sums in float32.
        assert_close(result.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_devices_are_torchs(
    name: str, native_calls: list[Sequence[Product]]
) -> None:
    lhs, rhs = torch.empty(3, 5, device="meta"), torch.empty(5, 4, device="meta")

    out = FUNCTIONS[name](lhs, rhs)

    assert (out.shape, out.device.type) == ((3, 4), "meta")
    assert native_calls == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modes_of_torch_see_what_is_computed(
    name: str, native_calls: list[Sequence[Product]]
) -> None:
    with FlopCounterMode(display=False) as counter:
        FUNCTIONS[name](torch.randn(3, 5), torch.randn(5, 4))

    assert counter.get_total_flops() == 2 * 3 * 4 * 5
    assert native_calls == []


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
def test_autocast_that_cpp_does_not_follow_is_torchs(
    dtype: torch.dtype,
    native_calls: list[Sequence[Product]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: dtype == float16)
    lhs, rhs = torch.randn(3, 5), torch.randn(5, 4)

    with torch.autocast("cpu", dtype=dtype):
        actual = matmul(lhs, rhs)

    assert_close(actual, lhs.to(dtype) @ rhs.to(dtype))
    assert native_calls == []


def test_gradients_are_computed_under_the_autocast_of_their_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "why_torch", lambda: None)
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: True)
    rounded: list[bool] = []

    def record(wanted: Sequence[Product], **_: bool) -> None:
        for lhs, rhs, out in wanted:
            rounded.append(rounds_factors(lhs, rhs))
            with torch.autocast("cpu", enabled=False):
                torch.matmul(lhs, rhs, out=out)

    monkeypatch.setattr("moxe_plugin.nn.native.products.multiply_all", record)
    lhs, rhs = torch.randn(3, 5, requires_grad=True), torch.randn(5, 4)

    with torch.autocast("cpu", dtype=bfloat16):
        out = matmul(lhs, rhs.requires_grad_())
    differentiate(lambda *_: out, lhs, rhs)

    assert rounded == [True, True, True]
    assert not rounds_factors(lhs, rhs)


def test_compiled_code_is_torchs(native_calls: list[Sequence[Product]]) -> None:
    lhs, rhs = torch.randn(3, 5, requires_grad=True), torch.randn(5, 4)

    compiled = torch.compile(matmul, backend="eager", fullgraph=True)

    for actual, expected in zip(
        differentiate(compiled, lhs, rhs),
        differentiate(torch.matmul, lhs, rhs),
        strict=True,
    ):
        assert_close(actual, expected)
    assert native_calls == []


def test_sums_may_be_more_precise_than_factors(
    native_calls: list[Sequence[Product]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: False)
    lhs, rhs = torch.randn(3, 5, dtype=bfloat16), torch.randn(5, 4, dtype=bfloat16)
    out, double = torch.ones(3, 4), torch.ones(3, 4, dtype=float64)

    add_product(out, lhs, rhs)
    add_product(double, lhs.to(float32), rhs.to(float32))

    assert_close(out, 1.0 + (lhs @ rhs).to(float32))
    assert_close(double, (1.0 + lhs.to(float32) @ rhs.to(float32)).double())
    assert native_calls == []


@pytest.mark.parametrize("sizes", [(1, 3, 5, 4), (2, 3, 5, 4)], ids=["one", "several"])
@pytest.mark.parametrize("width", [4, 7], ids=["whole", "slice"])
def test_torch_writes_results_where_they_belong(
    sizes: tuple[int, ...], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "why_torch", lambda: "asked for")
    batch, m, k, n = sizes
    lhs, rhs = torch.randn(batch, m, k), torch.randn(batch, k, n)
    matrices = torch.full((batch, m, width), 7.0)

    multiply_all([Product(lhs, rhs, matrices[..., :n])])

    assert_close(matrices[..., :n], lhs @ rhs)
    assert (matrices[..., n:] == 7.0).all()


def test_no_product_asks_for_no_library(
    native_calls: list[Sequence[Product]],
) -> None:
    multiply_all([])

    assert native_calls == []


@pytest.mark.usefixtures("chooses")
@pytest.mark.parametrize(
    ("choice", "capability", "obstacle", "reason"),
    [
        ("", "AVX512", None, None),
        ("auto", "AVX512", None, None),
        ("auto", "AVX2", None, "torch uses AVX2 here"),
        ("auto", "AVX512", "no compiler", "no compiler"),
        ("native", "AVX512", None, None),
        ("torch", "AVX512", None, "`MOXE_PRODUCTS` is 'torch'"),
    ],
)
def test_environment_and_processor_choose(
    choice: str,
    capability: str,
    obstacle: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, choice, capability, obstacle)

    found = why_torch()

    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")
    assert runs_native(torch.zeros(1)) == (reason is None)


@pytest.mark.usefixtures("chooses")
@pytest.mark.parametrize(
    ("choice", "has_amx", "expected"),
    [
        ("auto", False, True),
        ("auto", True, False),
        ("native", True, True),
        ("torch", False, False),
    ],
)
def test_bfloat16_is_torchs_where_the_processor_has_amx(
    choice: str, has_amx: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, choice, "AVX512", None)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_amx)

    assert rounds_to_bfloat16() == expected
    assert runs_native(torch.zeros(1)) == (choice != "torch")
    assert runs_native(torch.zeros(1, dtype=bfloat16)) == expected


@pytest.mark.usefixtures("chooses")
@pytest.mark.parametrize(
    ("capability", "obstacle", "reason"),
    [
        ("AVX2", None, "they need AVX512, and torch uses AVX2 here"),
        ("AVX512", "there is no compiler", "there is no compiler"),
    ],
)
def test_native_is_an_error_where_it_cannot_be(
    capability: str, obstacle: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "native", capability, obstacle)

    for _ in range(2):
        with pytest.raises(NativeLibraryError) as info:
            matmul(torch.zeros(2, 3), torch.zeros(3, 2))
        assert str(info.value) == f"{ERROR_OF_NATIVE}, but is 'native': {reason}."


@pytest.mark.usefixtures("chooses")
def test_unknown_choice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOXE_PRODUCTS", "mkl")

    with pytest.raises(
        ValueError,
        match=r"`MOXE_PRODUCTS` must be one of auto, native, torch, but is 'mkl'",
    ):
        multiply(torch.zeros(2, 3), torch.zeros(3, 2))

    # What never runs in C++ does not ask.
    multiply(torch.zeros(2, 3).double(), torch.zeros(3, 2).double())


@pytest.mark.usefixtures("chooses")
def test_without_compiler_auto_is_torch_and_native_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no_such_compiler"))
    monkeypatch.setenv("MOXE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    lhs, rhs = torch.randn(2, 3), torch.randn(3, 2)

    monkeypatch.setenv("MOXE_PRODUCTS", "auto")
    assert "no_such_compiler' (install g++, or set CXX)" in (why_torch() or "")
    assert_close(multiply(lhs, rhs), lhs @ rhs, rtol=0, atol=0)

    why_torch.cache_clear()
    monkeypatch.setenv("MOXE_PRODUCTS", "native")
    with pytest.raises(NativeLibraryError, match=rf"{ERROR_OF_NATIVE}.*install g\+\+"):
        multiply(lhs, rhs)


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
    capability: str,
    obstacle: str | None,
) -> None:
    """Pretend to be on another machine."""
    monkeypatch.setenv("MOXE_PRODUCTS", choice)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "why_not_loaded", lambda _: obstacle)
