"""Tests of `mlstm_block` and `slstm_block` of `moxe_plugin.nn.native`, by blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, tensor
from torch.autograd import grad
from torch.func import functional_call
from torch.nn import Parameter

from moxe_plugin.nn import mlstm_branch, slstm
from moxe_plugin.nn.backend import ScanBackend
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.native import mlstm_block, slstm_block
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.products import rounds_to_bfloat16, why_torch
from moxe_plugin.nn.rows import find_rows, pack, unpack
from moxe_plugin.nn.slstm import SLSTMBlock

Block: TypeAlias = MLSTMBlock | SLSTMBlock

pytestmark = [
    pytest.mark.skipif(
        why_torch() is not None or why_not_loaded("gating") is not None,
        reason=f"no C++ here: {why_torch() or why_not_loaded('gating')}",
    ),
    pytest.mark.parametrize("kind", [MLSTMBlock, SLSTMBlock], ids=["mlstm", "slstm"]),
]

LENS = [
    pytest.param(None, None, id="single"),
    pytest.param(None, [70, 3], id="single-padded"),
    pytest.param(None, [0, 70], id="single-first-empty"),
    pytest.param(3, None, id="stacked"),
    pytest.param(3, [[70, 1], [0, 0], [0, 33]], id="ragged-idle"),
    # Beyond two heads' widths and a chunk.
    pytest.param(2, [[300, 0], [20, 290]], id="long"),
]


def make_block(kind: type[Block], num_experts: int | None) -> Block:
    torch.manual_seed(1)
    block = kind(32, num_heads=2, num_experts=num_experts, backend="auto")
    # What begins as zeros or ones
    for name, parameter in block.named_parameters():
        if name.endswith(("gate_weight", "recurrent_weight", "skip", "norm.weight")):
            parameter.data += 0.2 * torch.randn(parameter.shape)

    return block


def make_seqs(num_experts: int | None, lens: Any) -> tuple[Tensor, Tensor | None]:
    seq_lens = None if lens is None else tensor(lens)
    seq_len = 70 if seq_lens is None else int(seq_lens.max())
    lead = (2,) if num_experts is None else (num_experts, 2)

    return torch.randn(*lead, seq_len, 32), seq_lens


def differentiate(block: Block, seqs: Tensor, seq_lens: Tensor | None) -> list[Tensor]:
    seqs = seqs.detach().requires_grad_()
    if seq_lens is not None and block.num_experts is not None:
        # As tokens reach experts in training
        rows = find_rows(seq_lens, seqs.size(-2))
        flat = block.apply_to_host_rows(pack(seqs, rows), rows)
        outputs = unpack(flat, rows)
    else:
        outputs, _ = block(seqs, seq_lens, return_state=False)
    if seq_lens is not None:
        positions = torch.arange(seqs.size(-2))
        outputs = outputs[positions < seq_lens.unsqueeze(-1)]
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))

    return [
        outputs,
        *grad(outputs, [seqs, *block.parameters()], upstream.to(outputs.dtype)),
    ]


def differentiate_step_by_step(
    block: Block, *args: Any, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    # Each operation is a function of its own, of which many are C++.
    with monkeypatch.context() as patch:
        for module in (mlstm_branch, slstm):
            patch.setattr(module, "runs_native", lambda *_: False)

        return differentiate(block, *args)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls = []

    for module, original in (
        (mlstm_branch, mlstm_block.mlstm_block_rows),
        (slstm, slstm_block.slstm_block_rows),
    ):

        def count(*args: Any, original: Any = original, **kwargs: Any) -> Tensor:
            calls.append(original.__name__)
            outputs: Tensor = original(*args, **kwargs)

            return outputs

        monkeypatch.setattr(module, original.__name__, count)

    return calls


@pytest.fixture
def fills_new_memory() -> Iterator[None]:
    """Let new tensors begin as NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fills_new_memory")
@pytest.mark.parametrize(("num_experts", "lens"), LENS)
def test_block_and_gradients_are_those_of_torch(
    kind: type[Block],
    num_experts: int | None,
    lens: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count_calls(monkeypatch)
    block = make_block(kind, num_experts)
    args = make_seqs(num_experts, lens)

    actual = differentiate(block, *args)
    assert len(calls) == 1
    block.backend = "torch"
    expected = differentiate(block, *args)

    assert len(calls) == 1
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() <= 5e-5 * y.norm()


@pytest.mark.skipif(
    why_torch() is not None or not rounds_to_bfloat16(),
    reason="no products of bfloat16 in C++ here",
)
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize("autocasts", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize(("num_experts", "lens"), LENS)
def test_block_of_bfloat16_is_as_exact_as_single_steps(
    kind: type[Block],
    num_experts: int | None,
    lens: Any,
    autocasts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = make_block(kind, num_experts)
    seqs, seq_lens = make_seqs(num_experts, lens)
    if not autocasts:
        block, seqs = block.bfloat16(), seqs.bfloat16()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        actual = differentiate(block, seqs, seq_lens)
        expected = differentiate_step_by_step(
            *(block, seqs, seq_lens), monkeypatch=monkeypatch
        )

    block.backend = "torch"
    exact = differentiate(block.double(), seqs.double(), seq_lens)
    for x, y, z in zip(actual, expected, exact, strict=True):
        assert x.dtype == y.dtype
        # Where a normaliser is small, a cell magnifies what its inputs are rounded by.
        # Under autocast, small products by themselves round nothing.
        limit = 1.5 * (y - z).norm() + 2 ** (-5 if autocasts else -7) * z.norm()
        assert (x - z).norm() <= limit


@pytest.mark.skipif(
    why_torch() is not None or not rounds_to_bfloat16(),
    reason="no products of bfloat16 in C++ here",
)
@pytest.mark.parametrize(
    ("model_dim", "seq_len"),
    [
        # Gradients of weights, of more rows than are summed at once
        pytest.param(32, 300, id="many-rows"),
        # All other products: of more channels
        pytest.param(1216, 1, id="many-channels"),
    ],
)
def test_long_sums_of_bfloat16_are_as_exact_as_single_steps(
    kind: type[Block], model_dim: int, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    torch.manual_seed(1)
    block = kind(model_dim, num_heads=2, backend="auto").bfloat16()
    seqs = torch.randn(8, seq_len, model_dim).bfloat16()

    actual = differentiate(block, seqs, None)
    assert len(calls) == 1
    expected = differentiate_step_by_step(block, seqs, None, monkeypatch=monkeypatch)

    assert len(calls) == 1
    block.backend = "torch"
    exact = differentiate(block.double(), seqs.double(), None)
    for x, y, z in zip(actual, expected, exact, strict=True):
        assert (x - z).norm() <= 1.2 * (y - z).norm() + 2**-9 * z.norm()


def test_gradients_are_computed_as_the_outputs_were(kind: type[Block]) -> None:
    block = make_block(kind, None)
    seqs = torch.randn(2, 9, 32)
    expected = differentiate(block, seqs, None)

    outputs, _ = block(seqs.requires_grad_(), return_state=False)
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        actual = grad(outputs, [seqs, *block.parameters()], upstream)

    for x, y in zip(actual, expected[1:], strict=True):
        assert torch.equal(x, y)


def test_bank_may_be_called_with_the_parameters_of_some_experts(
    kind: type[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    block = make_block(kind, 3)
    seqs, _ = make_seqs(3, None)
    expected, _ = block(seqs, return_state=False)
    params = {name: x[1:2] for name, x in block.named_parameters()}

    actual, _ = functional_call(block, params, (seqs[1:2],), {"return_state": False})

    assert len(calls) == 2
    assert torch.equal(actual, expected[1:2])


def test_rows_may_lie_apart(kind: type[Block]) -> None:
    block = make_block(kind, None)
    seqs = torch.randn(9, 2, 32).transpose(0, 1)

    actual = differentiate(block, seqs, None)
    expected = differentiate(block, seqs.contiguous(), None)

    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_weights_may_lie_transposed(kind: type[Block]) -> None:
    block = make_block(kind, None)
    seqs = torch.randn(2, 9, 32)
    expected = differentiate(block, seqs, None)
    for module in block.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            if weight.ndim >= 2:
                dense = weight.detach().mT.contiguous().mT
                setattr(module, name, Parameter(dense))

    actual = differentiate(block, seqs, None)

    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_of_no_row_all_gradients_are_zero(
    kind: type[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    block = make_block(kind, 3)

    _, *grads = differentiate(block, *make_seqs(3, [[0, 0], [0, 0], [0, 0]]))

    # Without a row, no form of the mLSTM's cell is the right one.
    assert len(calls) == (kind is SLSTMBlock)
    assert all((x == 0).all() for x in grads)


def test_frozen_weights_get_no_gradient(kind: type[Block]) -> None:
    seqs = torch.randn(2, 9, 32)
    names = [name for name, _ in make_block(kind, None).named_parameters()]
    _, of_seqs, *expected = differentiate(make_block(kind, None), seqs, None)

    for frozen in names:
        block = make_block(kind, None)
        block.get_parameter(frozen).requires_grad = False
        outputs, _ = block(seqs, return_state=False)
        outputs.backward(
            torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
        )

        for name, y in zip(names, expected, strict=True):
            x = block.get_parameter(name).grad
            if name == frozen:
                assert x is None
            else:
                assert x is not None
                assert torch.equal(x, y)

    block = make_block(kind, None).requires_grad_(False)
    seqs.requires_grad_()
    outputs, _ = block(seqs, return_state=False)
    outputs.backward(
        torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    )

    assert seqs.grad is not None
    assert torch.equal(seqs.grad, of_seqs)


def test_without_gradients_outputs_are_the_same(kind: type[Block]) -> None:
    block = make_block(kind, None)
    seqs = torch.randn(2, 9, 32)
    expected, _ = block(seqs, return_state=False)

    with torch.no_grad():
        actual, _ = block(seqs, return_state=False)

    assert not actual.requires_grad
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_parameters_of_another_type_are_not_read(
    kind: type[Block], backend: ScanBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    block = make_block(kind, None)
    block.backend = backend
    seqs = torch.randn(2, 9, 32)
    expected, _ = block(seqs, return_state=False)
    assert len(calls) == 1
    for name, parameter in block.named_parameters():
        if "bias" in name and "conv" not in name:
            parameter.data = parameter.data.double()

    actual, _ = block(seqs, return_state=False)

    assert len(calls) == 1
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_with_a_state_steps_run_by_themselves(
    kind: type[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    block = make_block(kind, None)
    seqs = torch.randn(2, 5, 32)

    actual, state = block(seqs)

    assert state is not None
    assert not calls
    expected, _ = block(seqs, return_state=False)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_sizes_that_cpp_is_not_made_for_are_those_of_torch(
    kind: type[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is SLSTMBlock:
        pytest.skip("the sLSTM projects nothing in groups of some width")
    calls = count_calls(monkeypatch)
    torch.manual_seed(1)
    block = MLSTMBlock(32, num_heads=2, qkv_block_size=16)
    seqs = torch.randn(2, 9, 32)

    actual = differentiate(block, seqs, None)
    block.backend = "torch"
    expected = differentiate(block, seqs, None)

    assert not calls
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() <= 2e-5 * y.norm()
