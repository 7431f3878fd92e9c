"""Tests of `moxe_plugin.nn.triton.mlstm`, against the cell in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moxe_plugin.nn import mlstm_cell
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.mlstm_cell import MLSTMMemory, mlstm_step
from moxe_plugin.nn.triton.mlstm import mlstm_chunkwise

pytest.importorskip("triton")

CHUNK_SIZE = 16


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def draw_inputs(
    seq_len: int, dim: int, *, input_shift: float = -1.0, forget_shift: float = 3.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq_len * 100 + dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(3, 2, *shape, generator=generator)

    vectors = [normal(seq_len, dim) for _ in range(3)]
    gates = [normal(seq_len) * 2 + s for s in (input_shift, forget_shift)]

    return [*vectors, *gates, normal(dim, dim), normal(dim), normal()]


def compute(
    chunkwise: object,
    inputs: list[Tensor],
    lens: Tensor | None,
    *,
    has_memory: bool,
    return_memory: bool = True,
) -> list[Tensor]:
    """Give outputs, memory and all gradients, the last of a random combination."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    memory = MLSTMMemory(*inputs[5:]) if has_memory else None
    assert callable(chunkwise)
    h, last = chunkwise(
        *inputs[:5],
        memory,
        None if lens is None else lens[:, None],
        chunk_size=CHUNK_SIZE,
        return_memory=return_memory,
    )
    if lens is not None:
        valid = torch.arange(h.size(-2)) < lens[:, None, None]
        h = torch.where(valid[..., None], h, 0)
    assert (last is not None) == return_memory
    results = [h, *(last or ())]
    generator = torch.Generator().manual_seed(1)
    total = sum(
        ((x * torch.randn(x.shape, generator=generator)).sum() for x in results),
        torch.zeros(()),
    )
    used = inputs if has_memory else inputs[:5]
    grads = torch.autograd.grad(total, used)

    return [x.detach() for x in (*results, *grads)]


def assert_near_reference(
    inputs: list[Tensor],
    lens: Tensor | None = None,
    *,
    has_memory: bool = True,
    return_memory: bool = True,
) -> None:
    """Compare with float64: to 1e-5, or as near as the reference in float32 is.

    Where a denominator almost vanishes, both lose digits. Errors are relative to a
    tensor's largest value, or 1: a forget gate's gradient is a difference of such.
    """
    exact_inputs = [x.double() for x in inputs]
    actual, reference, exact = (
        compute(f, x, lens, has_memory=has_memory, return_memory=return_memory)
        for f, x in (
            (mlstm_chunkwise, inputs),
            (mlstm_cell.mlstm_chunkwise, inputs),
            (mlstm_cell.mlstm_chunkwise, exact_inputs),
        )
    )
    for x, y, z in zip(actual, reference, exact, strict=True):
        assert x.shape == z.shape
        if z.numel() == 0:
            continue
        error, allowed = (w.sub(z).abs().max().item() for w in (x, y))
        scale = max(z.abs().max().item(), 1.0)
        assert error <= max(1e-5 * scale, 1.5 * allowed)


@pytest.mark.parametrize("has_memory", [False, True], ids=["empty", "memory"])
@pytest.mark.parametrize(
    ("seq_len", "dim"), [(1, 8), (3, 24), (17, 40), (33, 8), (33, 72)]
)
def test_kernels_equal_the_reference(seq_len: int, dim: int, has_memory: bool) -> None:
    inputs = draw_inputs(seq_len, dim)
    lens = torch.tensor([seq_len, 0, (seq_len + 1) // 2])
    for given in (None, lens):
        assert_near_reference(inputs, given, has_memory=has_memory)


@pytest.mark.parametrize(
    ("input_shift", "forget_shift"), [(60.0, 3.0), (0.0, -60.0), (-60.0, 3.0)]
)
def test_kernels_equal_the_reference_at_extreme_gates(
    input_shift: float, forget_shift: float
) -> None:
    inputs = draw_inputs(19, 8, input_shift=input_shift, forget_shift=forget_shift)
    assert_near_reference(inputs)


def test_memory_is_left_out_on_request() -> None:
    inputs = draw_inputs(17, 8)
    assert_near_reference(inputs, has_memory=False, return_memory=False)


def test_kernels_equal_steps() -> None:
    def step_by_step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        memory: MLSTMMemory,
        *_: None,
        **__: object,
    ) -> tuple[Tensor, MLSTMMemory]:
        outputs = []
        for t in range(q.size(-2)):
            h, memory = mlstm_step(
                q[..., t, :], k[..., t, :], v[..., t, :], i[..., t], f[..., t], memory
            )
            outputs.append(h)
        return torch.stack(outputs, dim=-2), memory

    inputs = draw_inputs(19, 8)
    actual = compute(mlstm_chunkwise, inputs, None, has_memory=True)
    expected = compute(step_by_step, inputs, None, has_memory=True)
    for x, y in zip(actual, expected, strict=True):
        scale = max(y.abs().max().item(), 1.0)
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * scale)


def test_bfloat16_is_as_near_to_float32_as_its_precision() -> None:
    inputs = draw_inputs(33, 24)
    inputs[:3] = [x.bfloat16() for x in inputs[:3]]
    actual = compute(mlstm_chunkwise, inputs, None, has_memory=True)
    inputs[:3] = [x.float() for x in inputs[:3]]
    expected = compute(mlstm_cell.mlstm_chunkwise, inputs, None, has_memory=True)
    # A rounding is 2**-9 = 0.002; outputs pass about four, gradients about ten.
    for x, y in zip(actual, expected, strict=True):
        assert (x.float() - y).norm() <= 0.02 * y.norm()


def test_unsupported_choices_are_errors() -> None:
    inputs = draw_inputs(3, 8)
    q, k, v, i, f = inputs[:5]
    with pytest.raises(ValueError, match="`chunk_size` must be from 1 to 64"):
        mlstm_chunkwise(q, k, v, i, f, chunk_size=65)
    with pytest.raises(ValueError, match="must all be float32, bfloat16 or float16"):
        mlstm_chunkwise(q.double(), k, v, i, f, chunk_size=16)


def test_no_position_leaves_the_memory_and_its_gradient() -> None:
    inputs = draw_inputs(0, 8)
    for has_memory in (False, True):
        assert_near_reference(inputs, has_memory=has_memory)

    q, k, v, i, f, *state = inputs
    h, memory = mlstm_chunkwise(
        q, k, v, i, f, MLSTMMemory(*state), chunk_size=CHUNK_SIZE
    )
    assert h.shape == (3, 2, 0, 8)
    assert memory is not None
    torch.testing.assert_close(list(memory), state, rtol=0, atol=0)


def test_second_derivative_is_an_error() -> None:
    q, k, v, i, f, *_ = draw_inputs(3, 8)
    q.requires_grad_()
    h, _ = mlstm_chunkwise(q, k, v, i, f, chunk_size=CHUNK_SIZE)
    (grad,) = torch.autograd.grad(h.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_more_rows_than_65535_fit_into_the_grids_of_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moxe_plugin.nn.triton import mlstm_backward, mlstm_forward

    grids = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    for module, names in (
        (mlstm_forward, ("state", "output")),
        (mlstm_backward, ("state_grad", "query_key_grad", "value_grad")),
    ):
        for name in names:
            monkeypatch.setattr(module, f"{name}_kernel", Recorder())

    # Two tiles of 32 and three chunks; the least memory that has so many rows.
    vectors = torch.zeros(1, 1, 1).expand(70_000, 3, 33).requires_grad_()
    gates = torch.zeros(70_000, 3)
    h, _ = mlstm_chunkwise(vectors, vectors, vectors, gates, gates, chunk_size=1)
    torch.autograd.grad(h.sum(), vectors)

    by_tile, by_chunk = (70_000 * 2 * 2,), (70_000 * 3 * 2,)
    assert grids == [by_tile, by_chunk, by_tile, by_chunk, by_chunk]


def test_misspelt_backend_is_named() -> None:
    block = MLSTMBlock(32, num_heads=2, backend="trition")  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ValueError, match=r"`backend` must be one of auto, .*'trition'"):
        block(torch.randn(1, 3, 32))


@pytest.mark.parametrize("seq_len", [5, 0])
def test_block_computes_the_same_in_triton(seq_len: int) -> None:
    block = MLSTMBlock(32, num_heads=2, num_experts=2)
    seqs = torch.randn(2, 2, seq_len, 32)
    lens = torch.tensor([[5, 2], [0, 4]]).clamp(max=seq_len)
    expected, expected_state = block(seqs, lens)
    block.backend = "triton"
    actual, state = block(seqs, lens)
    valid = torch.arange(seq_len) < lens[..., None]
    torch.testing.assert_close(actual[valid], expected[valid], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
