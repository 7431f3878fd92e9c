"""Tests of `moxe_plugin.nn.native.causal_conv`, against the convolution in torch."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64, tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from moxe_plugin.nn import backend as backend_module
from moxe_plugin.nn import layers
from moxe_plugin.nn.backend import ScanBackend, convolves_natively
from moxe_plugin.nn.layers import CausalConv
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.native.causal_conv import ConvInputs, convolve_rows_backward
from moxe_plugin.nn.native.library import (
    NativeLibraryError,
    load_library,
    why_not_loaded,
)
from moxe_plugin.nn.products import follows_autocast
from moxe_plugin.nn.rows import find_rows
from moxe_plugin.nn.slstm import SLSTMBlock
from tests.nn.bfloat16_cases import assert_rounded_once, in_each_dtype, needs_bfloat16

needs_compiler = pytest.mark.skipif(
    why_not_loaded("causal_conv") is not None,
    reason=f"no C++ here: {why_not_loaded('causal_conv')}",
)

# An idle expert; sequences that are empty, shorter than the window, and longer than
# what the gradients sum at a time.
LENS = [[2, 0, 70], [0, 0, 0], [1, 3, 0], [130, 5, 1]]


def make_conv(
    dim: int,
    kernel_size: int,
    num_experts: int | None,
    dtype: torch.dtype,
    *,
    activates: bool = False,
) -> CausalConv:
    conv = CausalConv(
        dim, kernel_size=kernel_size, activates=activates, num_experts=num_experts
    )
    torch.nn.init.normal_(conv.bias)

    return conv.to(dtype)


def differentiate(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return outputs and the gradients of a function of all."""
    directions = torch.Generator().manual_seed(3)
    # The same in every type.
    upstream = [
        torch.randn(x.shape, generator=directions).bfloat16().to(x.dtype)
        for x in outputs
    ]

    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def assert_same(run: Callable[[ScanBackend], list[Tensor]], dtype: torch.dtype) -> None:
    # The two add up in different orders.
    tolerance = 1e-10 if dtype == float64 else 1e-5

    assert_close(run("native"), run("torch"), rtol=tolerance, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize("activates", [False, True], ids=["sums", "silu"])
@pytest.mark.parametrize("has_window", [False, True], ids=["begin", "window"])
@pytest.mark.parametrize("dim", [5, 53])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [float64, float32], ids=str)
def test_native_rows_are_those_of_torch_with_all_gradients(
    kernel_size: int, dim: int, has_window: bool, activates: bool, dtype: torch.dtype
) -> None:
    num_experts, num_seqs = len(LENS), len(LENS[0])
    conv = make_conv(dim, kernel_size, num_experts, dtype, activates=activates)
    rows = find_rows(tensor(LENS), 130)

    # In the blocks, too, it is half of what a projection gives.
    wide = torch.randn(sum(rows.counts), 2 * dim, dtype=dtype, requires_grad=True)
    window = torch.randn(num_experts, num_seqs, kernel_size - 1, dim, dtype=dtype)
    window.requires_grad_()

    def run(backend: ScanBackend) -> list[Tensor]:
        flat = wide.chunk(2, dim=-1)[1]
        out = conv.convolve_rows(flat, rows, window if has_window else None, backend)

        # Without a tap before the present, torch does not read the window.
        reads_window = has_window and kernel_size > 1

        return differentiate(
            [out], [wide, *conv.parameters(), *([window] if reads_window else [])]
        )

    assert_same(run, dtype)


@needs_compiler
@pytest.mark.parametrize("with_lens", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("num_experts", [None, 2], ids=["single", "stacked"])
@pytest.mark.parametrize("seq_len", [0, 1, 2, 9, 67])
@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@pytest.mark.parametrize("activates", [False, True], ids=["sums", "silu"])
@pytest.mark.parametrize("dtype", [float64, float32], ids=str)
def test_native_batches_are_those_of_torch_with_all_gradients(
    kernel_size: int,
    seq_len: int,
    num_experts: int | None,
    with_lens: bool,
    activates: bool,
    dtype: torch.dtype,
) -> None:
    dim, num_seqs = 19, 3
    lead = (num_seqs,) if num_experts is None else (num_experts, num_seqs)
    conv = make_conv(dim, kernel_size, num_experts, dtype, activates=activates)

    seqs = torch.randn(*lead, seq_len, dim, dtype=dtype, requires_grad=True)
    window = torch.randn(*lead, kernel_size - 1, dim, dtype=dtype, requires_grad=True)
    seq_lens = torch.randint(seq_len + 1, lead) if with_lens else None

    def run(backend: ScanBackend) -> list[Tensor]:
        outputs = conv(seqs, window, seq_lens, backend)

        return differentiate([*outputs], [seqs, window, *conv.parameters()])

    assert_same(run, dtype)


@needs_compiler
@needs_bfloat16
@pytest.mark.parametrize("activates", [False, True], ids=["sums", "silu"])
@pytest.mark.parametrize("has_window", [False, True], ids=["begin", "window"])
@pytest.mark.parametrize("dim", [5, 48, 101])
@pytest.mark.parametrize("kernel_size", [1, 4])
def test_bfloat16_is_rounded_once(
    kernel_size: int, dim: int, has_window: bool, activates: bool
) -> None:
    num_experts, num_seqs = len(LENS), len(LENS[0])
    conv = make_conv(dim, kernel_size, num_experts, bfloat16, activates=activates)
    rows = find_rows(tensor(LENS), 130)

    joint = torch.randn(sum(rows.counts), 2 * dim).bfloat16()
    window = torch.randn(num_experts, num_seqs, kernel_size - 1, dim).bfloat16()

    def run(backend: ScanBackend, dtype: torch.dtype) -> list[Tensor]:
        module = deepcopy(conv).to(dtype)
        leaves = [x.to(dtype).requires_grad_() for x in (joint, window)]
        flat = leaves[0].chunk(2, dim=-1)[1]
        reads_window = has_window and kernel_size > 1
        out = module.convolve_rows(
            flat, rows, leaves[1] if reads_window else None, backend
        )

        return differentiate(
            [out], [*leaves[: 2 if reads_window else 1], *module.parameters()]
        )

    assert_rounded_once(run("native", bfloat16), run("torch", float64))


@needs_compiler
@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("num_experts", [1, 3])
def test_native_results_do_not_depend_on_the_number_of_threads(
    num_experts: int,
) -> None:
    # Other channels than those of one thread begin and end each thread's.
    dim = 203
    conv = make_conv(dim, 4, num_experts, float32, activates=True)
    rows = find_rows(torch.randint(90, (num_experts, 4)), 90)
    flat = torch.randn(sum(rows.counts), dim, requires_grad=True)
    window = torch.randn(num_experts, 4, 3, dim, requires_grad=True)

    def run(num_threads: int) -> list[Tensor]:
        torch.set_num_threads(num_threads)
        out = conv.convolve_rows(flat, rows, window, "native")

        return differentiate([out], [flat, window, *conv.parameters()])

    assert_close(run(2), run(1), rtol=0, atol=0)


@needs_compiler
def test_gradients_that_are_not_asked_for_leave_the_others_alone() -> None:
    conv = make_conv(7, 4, 2, float64)
    rows = find_rows(tensor([[3, 0], [1, 4]]), 4)
    flat = torch.randn(8, 7, dtype=float64, requires_grad=True)
    window = torch.randn(2, 2, 3, 7, dtype=float64, requires_grad=True)

    leaves = [flat, window, conv.weight, conv.bias]
    _, *expected = differentiate([conv.convolve_rows(flat, rows, window)], leaves)

    for leaf, gradient in zip(leaves, expected, strict=True):
        for x in leaves:
            x.requires_grad_(x is leaf)

        _, actual = differentiate([conv.convolve_rows(flat, rows, window)], [leaf])
        assert_close(actual, gradient, rtol=0, atol=0)


@needs_compiler
def test_only_plain_tensors_of_one_precision_are_convolved_in_cpp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.zeros(1)

    assert convolves_natively("auto", x, torch.nn.Parameter(x))
    assert convolves_natively("native", x.double())
    assert convolves_natively("auto", x.bfloat16())

    assert not convolves_natively("torch", x)
    assert not convolves_natively("triton", x)
    assert not convolves_natively("auto", x, x.double())
    assert not convolves_natively("auto", x, x.bfloat16())
    assert not convolves_natively("auto", x.to("meta"))
    with FakeTensorMode():
        assert not convolves_natively("auto", torch.zeros(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolves_natively("auto", x) == follows_autocast()
    with torch.autocast("cpu", dtype=torch.float16):
        assert not convolves_natively("auto", x)

    with pytest.raises(ValueError, match=r"`backend` must be one of auto, .* 'cuda'"):
        convolves_natively("cuda", x)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert not convolves_natively("auto", x)


@needs_compiler
@pytest.mark.parametrize("with_lens", [False, True], ids=["batch", "rows"])
@pytest.mark.parametrize("block_type", [MLSTMBlock, SLSTMBlock])
def test_blocks_choose_what_computes_their_convolution(
    block_type: type[MLSTMBlock] | type[SLSTMBlock],
    with_lens: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("in C++")

    monkeypatch.setattr(layers, "causal_conv", refuse)

    seqs = torch.zeros(2, 1, 3, 32)
    seq_lens = tensor([[3], [2]]) if with_lens else None
    block = block_type(32, num_heads=2, num_experts=2, backend="torch")
    block(seqs, seq_lens)

    block.backend = "auto"
    with pytest.raises(RuntimeError, match=r"in C\+\+"):
        block(seqs, seq_lens)


def test_without_compiler_auto_says_so_and_native_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no_such_compiler"))
    monkeypatch.setenv("MOXE_CACHE_DIR", str(tmp_path))
    caches = (load_library, why_not_loaded, backend_module._why_convolution_is_torchs)
    for function in caches:
        function.cache_clear()

    try:
        assert not convolves_natively("auto", torch.zeros(1))
        assert "no C++ compiler" in caplog.text
        with pytest.raises(NativeLibraryError, match="install g"):
            convolves_natively("native", torch.zeros(1))
    finally:
        for function in caches:
            function.cache_clear()


@needs_compiler
@in_each_dtype
@pytest.mark.parametrize("kernel_size", [4, 3])
@pytest.mark.parametrize("activates", [False, True])
def test_gradient_is_added_to_what_there_is(
    dtype: torch.dtype, kernel_size: int, activates: bool
) -> None:
    lens = array("q", [length for of_expert in LENS for length in of_expert])
    flat, upstream, before = torch.randn(3, sum(lens), 37, dtype=dtype)
    inputs = ConvInputs(
        flat,
        None,
        torch.randn(len(LENS), kernel_size, 37, dtype=dtype),
        torch.randn(len(LENS), 37, dtype=dtype),
    )
    expected = convolve_rows_backward(upstream, inputs, lens, activates=activates)
    onto = before.clone()

    actual = convolve_rows_backward(
        upstream, inputs, lens, activates=activates, onto=onto
    )

    assert actual.flat is onto
    assert expected.flat is not None
    # Of bfloat16 the sum alone is rounded.
    rtol = {bfloat16: 2**-7, float32: 1e-5, float64: 1e-13}[dtype]
    assert_close(onto, before + expected.flat, rtol=rtol, atol=4 * rtol)
    for x, y in zip(actual[2:], expected[2:], strict=True):
        assert x is not None
        assert y is not None
        assert torch.equal(x, y)
