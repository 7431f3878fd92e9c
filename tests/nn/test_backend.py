"""Tests of `moxe_plugin.nn.backend` and of the C++ scan behind it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, float32, float64
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from moxe_plugin.nn import backend as backend_module
from moxe_plugin.nn.backend import ScanBackend, resolve_backend
from moxe_plugin.nn.native import library
from moxe_plugin.nn.native.library import (
    NativeLibraryError,
    load_library,
    why_not_loaded,
)
from moxe_plugin.nn.slstm import SLSTMBlock
from moxe_plugin.nn.slstm_parameters import SLSTMState

needs_compiler = pytest.mark.skipif(
    why_not_loaded("slstm_scan") is not None,
    reason=f"no C++ here: {why_not_loaded('slstm_scan')}",
)


def run_block(
    block: SLSTMBlock,
    backend: ScanBackend,
    seqs: Tensor,
    seq_lens: Tensor | None,
    state: SLSTMState | None,
) -> list[Tensor]:
    """Return outputs, final state, and the gradients of a function of both."""
    block.backend = backend

    leaves = [seqs, *block.parameters(), *(() if state is None else state[1:])]
    outputs, last = block(seqs, seq_lens, state)
    assert last is not None

    if seq_lens is not None:
        valid = torch.arange(seqs.size(-2)) < seq_lens.unsqueeze(-1)
        outputs = outputs * valid.unsqueeze(-1)

    results = [outputs, *last]
    directions = torch.Generator().manual_seed(3)
    loss = torch.stack(
        [
            # log_n of an empty memory is -1e30.
            (x.clamp(min=-1e4) * torch.randn(x.shape, generator=directions)).sum()
            for x in results
        ]
    ).sum()

    return [*results, *torch.autograd.grad(loss, leaves)]


@needs_compiler
@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "with_state"])
@pytest.mark.parametrize("with_lens", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(
    ("num_experts", "num_rows", "seq_len", "head_dim"),
    [(None, 2, 0, 3), (None, 1, 1, 8), (None, 4, 5, 3), (3, 6, 7, 17), (2, 5, 9, 36)],
)
@pytest.mark.parametrize("dtype", [float64, float32], ids=str)
def test_native_scan_is_the_reference_with_all_gradients(
    num_experts: int | None,
    num_rows: int,
    seq_len: int,
    head_dim: int,
    with_lens: bool,
    with_state: bool,
    dtype: torch.dtype,
) -> None:
    heads = 2
    experts = () if num_experts is None else (num_experts,)
    dim = heads * head_dim

    block = SLSTMBlock(dim, num_heads=heads, num_experts=num_experts).to(dtype)
    with torch.no_grad():
        block.recurrent_weight.normal_(std=0.3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*experts, num_rows, *shape, dtype=dtype).requires_grad_()

    seqs, seq_lens, state = randn(seq_len, dim), None, None
    if with_lens:
        seq_lens = torch.randint(seq_len + 1, (*experts, num_rows))
    if with_state:
        memory = [randn(heads, head_dim) for _ in range(3)]
        state = SLSTMState(randn(3, dim).detach(), *memory)

    expected = run_block(block, "torch", seqs, seq_lens, state)
    actual = run_block(block, "native", seqs, seq_lens, state)

    # The two add up in different orders.
    rtol, atol = (1e-10, 1e-12) if dtype == float64 else (1e-4, 1e-4)
    assert_close(actual, expected, rtol=rtol, atol=atol)


@needs_compiler
@pytest.mark.parametrize("gate", [-1e4, -80.0, 80.0, 1e4])
def test_native_scan_is_finite_at_extreme_gates(gate: float) -> None:
    block = SLSTMBlock(16, num_heads=2, backend="native")
    with torch.no_grad():
        block.gate_bias[:, 0] = gate
        block.gate_bias[0, 1] = -gate

    seqs = torch.randn(2, 5, 16, requires_grad=True)
    outputs, _ = block(seqs)
    outputs.square().sum().backward()

    for tensor in (outputs, seqs.grad, *(p.grad for p in block.parameters())):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"`backend` must be one of auto, .* 'cuda'"):
        resolve_backend("cuda", torch.zeros(1))  # type: ignore[arg-type]


def test_native_is_for_tensors_that_cpp_can_read() -> None:
    with FakeTensorMode():
        fake = torch.zeros(1)

    assert resolve_backend("auto", fake) == "torch"

    with pytest.raises(ValueError, match="'native' with a FakeTensor"):
        resolve_backend("native", fake)


def test_native_backend_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="'native' with a tensor on 'meta'"):
        resolve_backend("native", torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    ("size", "expected"), [(99 * 1024, "torch"), (227 * 1024, "triton")]
)
def test_auto_takes_triton_where_its_kernels_fit(
    size: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=size)
    # What a tensor on a GPU tells of itself
    seqs = SimpleNamespace(
        device=torch.device("cuda", 0), is_cuda=True, dtype=torch.float32
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(backend_module, "_has_triton", lambda: True)
    backend_module.has_shared_memory.cache_clear()

    try:
        assert resolve_backend("auto", cast(Tensor, seqs)) == expected
    finally:
        backend_module.has_shared_memory.cache_clear()


def test_without_compiler_auto_says_so_and_native_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no_such_compiler"))
    monkeypatch.setenv("MOXE_CACHE_DIR", str(tmp_path))
    caches = (load_library, why_not_loaded, backend_module._choose_for_cpu)
    for function in caches:
        function.cache_clear()

    try:
        assert resolve_backend("auto", torch.zeros(1)) == "torch"
        assert "no C++ compiler" in caplog.text
        with pytest.raises(NativeLibraryError, match="install g"):
            resolve_backend("native", torch.zeros(1))
    finally:
        for function in caches:
            function.cache_clear()


@needs_compiler
def test_compiled_library_is_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOXE_CACHE_DIR", str(tmp_path))
    load_library.cache_clear()
    load_library("cross_entropy")
    [path] = (tmp_path / "native").iterdir()

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(library, "_compile", refuse)
    load_library.cache_clear()
    load_library("cross_entropy")

    assert path.suffix == ".so"
