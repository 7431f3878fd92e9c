"""Tests of whole blocks and banks on ragged rows, against the same in torch."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64, nn

from moxe_plugin.nn import backend as backend_module
from moxe_plugin.nn.backend import MAX_ROWS_LEN, ScanBackend
from moxe_plugin.nn.difficulty_router import DifficultyRouter
from moxe_plugin.nn.experts import SparseExperts
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.selection import TopKSelection
from moxe_plugin.nn.slstm import SLSTMBlock

pytest.importorskip("triton")

from moxe_plugin.nn.triton import block_products, head_products  # needs Triton

pytestmark = pytest.mark.usefixtures("wide_sums")

MODEL_DIM = 32


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter goes through a run to its end, however few rows there are.
    monkeypatch.setattr(block_products, "_RUN", 128)
    monkeypatch.setattr(head_products, "_RUN", 64)


def make_block(kind: str, num_experts: int | None = None) -> MLSTMBlock | SLSTMBlock:
    if kind == "slstm":
        return SLSTMBlock(MODEL_DIM, num_heads=2, num_experts=num_experts)

    return MLSTMBlock(
        MODEL_DIM, num_heads=2, qkv_block_size=16, num_experts=num_experts
    )


def set_backend(module: nn.Module, backend: ScanBackend) -> None:
    for part in module.modules():
        if isinstance(part, (MLSTMBlock, SLSTMBlock)):
            part.backend = backend


def compare(
    module: nn.Module,
    seqs: Tensor,
    run: Callable[[nn.Module, Tensor], Tensor],
    *,
    with_autocast: bool = False,
) -> None:
    """Compare outputs and all gradients with those of torch in float64."""
    dtype = float32 if with_autocast else bfloat16
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        # So that nothing is 0 or 1 as at first.
        for param in module.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))

    module.to(dtype)
    reference = deepcopy(module).double()
    set_backend(module, "triton")
    set_backend(reference, "torch")
    grad = torch.randn(seqs.shape, generator=generator).to(dtype)

    results = []
    for part, own_dtype in ((module, dtype), (reference, float64)):
        leaf = seqs.to(dtype).to(own_dtype).clone().requires_grad_()
        with torch.autocast("cpu", bfloat16, enabled=with_autocast):
            output = run(part, leaf)
        output.backward(grad.to(own_dtype))
        grads = {name: p.grad for name, p in part.named_parameters()}
        results.append({"output": output, "input": leaf.grad, **grads})

    for name, expected in results[1].items():
        actual = results[0][name]
        assert actual is not None, name
        assert expected is not None, name
        assert actual.dtype == dtype
        # Of biases of gates the terms cancel, as they do in bfloat16 in torch.
        tolerance = 0.2 if name.endswith("gate_bias") else 0.05
        error = (actual - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("with_autocast", [False, True])
@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_a_block_on_rows_is_the_block(kind: str, with_autocast: bool) -> None:
    torch.manual_seed(1)
    block = make_block(kind)

    compare(
        block,
        torch.randn(3, 21, MODEL_DIM),
        lambda part, seqs: part(seqs, return_state=False)[0],
        with_autocast=with_autocast,
    )


@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_gradients_of_float32_parameters_are_not_rounded(kind: str) -> None:
    torch.manual_seed(4)
    block = make_block(kind)
    set_backend(block, "triton")

    with torch.autocast("cpu", bfloat16):
        output, _ = block(torch.randn(3, 21, MODEL_DIM), return_state=False)
    output.float().square().sum().backward()

    # What is no product of torch's, which gives bfloat16
    for weight in (block.norm.weight, block.conv.weight, block.conv.bias):
        assert weight.grad is not None
        assert not torch.equal(weight.grad, weight.grad.to(bfloat16).float())


@pytest.mark.parametrize(("with_lens", "with_autocast"), [(False, True), (True, False)])
def test_experts_on_rows_are_the_experts(with_lens: bool, with_autocast: bool) -> None:
    torch.manual_seed(2)
    experts = SparseExperts(
        5, mlstm=make_block("mlstm", 2), slstm=make_block("slstm", 3)
    )
    router = DifficultyRouter(
        MODEL_DIM, TopKSelection(5, 2), num_mlstm_experts=2, difficulty_bias_scale=0.3
    )
    seqs = torch.randn(3, 14, MODEL_DIM)
    seq_lens = torch.tensor([14, 0, 5]) if with_lens else None
    with torch.no_grad():
        routing: Routing = router(seqs.flatten(0, 1))
    # Expert 0 of the first bank and expert 3 of the second have no token.
    choices = torch.rand(len(routing.expert_weights), 3).argsort(dim=1)[:, :2]
    routing = routing._replace(expert_indices=torch.tensor([1, 2, 4])[choices])

    def run(part: nn.Module, seqs: Tensor) -> Tensor:
        weights = routing.expert_weights.to(
            float64 if seqs.dtype == float64 else float32
        )
        output: Tensor = part(
            *(seqs, routing._replace(expert_weights=weights), seq_lens),
            return_state=False,
        )[0]

        return output

    compare(experts, seqs, run, with_autocast=with_autocast)


@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_gradient_may_be_expanded(kind: str) -> None:
    torch.manual_seed(3)
    block = make_block(kind).to(bfloat16)
    block.backend = "triton"
    seqs = torch.randn(2, 5, MODEL_DIM, dtype=bfloat16, requires_grad=True)
    leaves = [seqs, *block.parameters()]

    actual = torch.autograd.grad(block(seqs, return_state=False)[0].sum(), leaves)
    output = block(seqs, return_state=False)[0]
    expected = torch.autograd.grad(output, leaves, torch.ones_like(output))

    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_rows_are_for_training_in_16_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make_block(kind).to(bfloat16)
    block.backend = "triton"
    seqs = torch.zeros(2, 3, MODEL_DIM, dtype=bfloat16)

    assert block.trains_on_rows(seqs)
    assert not block.trains_on_rows(seqs.float())
    assert not block.trains_on_rows(seqs[:, :1].expand(2, MAX_ROWS_LEN + 1, -1))
    with torch.autocast("cpu", bfloat16):
        assert block.trains_on_rows(seqs.float())
        assert not block.trains_on_rows(seqs.double())
    block.backend = "torch"
    assert not block.trains_on_rows(seqs)

    # Nor where they do not fit
    block.backend = "triton"
    with monkeypatch.context() as patch:
        patch.setattr(backend_module, "has_shared_memory", lambda _: False)
        assert not block.trains_on_rows(seqs)
    assert block.trains_on_rows(seqs)

    # What has a state goes another way.
    monkeypatch.setattr(type(block), "apply_to_rows", lambda *_: pytest.fail("rows"))
    assert block(seqs)[1] is not None


@pytest.mark.parametrize(
    "block",
    [
        # Heads that no two tiles fit, and taps that the kernels do not have
        SLSTMBlock(48, num_heads=2),
        SLSTMBlock(32, num_heads=2, conv_kernel_size=3),
        MLSTMBlock(32, num_heads=2, qkv_block_size=8),
        MLSTMBlock(32, num_heads=2, qkv_block_size=16, conv_kernel_size=3),
    ],
    ids=["slstm_width", "slstm_taps", "mlstm_blocks", "mlstm_taps"],
)
def test_sizes_without_kernels_are_not_for_rows(block: MLSTMBlock | SLSTMBlock) -> None:
    block.to(bfloat16)
    block.backend = "triton"
    seqs = torch.zeros(2, 3, block.model_dim, dtype=bfloat16)

    assert not block.trains_on_rows(seqs)
    assert block(seqs, return_state=False)[0].shape == seqs.shape
