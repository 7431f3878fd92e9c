"""Tests of `moxe_plugin.nn.expert_steps` and `moxe_plugin.nn.expert_device_steps`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, float64, tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
)
from torch.nn import Module, Parameter
from torch.testing import assert_close
from typing_extensions import override

from moxe_plugin.nn import expert_device_steps
from moxe_plugin.nn.expert_layouts import ExpertStateKind
from moxe_plugin.nn.expert_states import ExpertsState
from moxe_plugin.nn.experts import ExpertSteps, SparseExperts
from moxe_plugin.nn.mlstm import MLSTMBlock
from tests.nn.expert_cases import (
    LENS,
    SEQ_LEN,
    SPLITS,
    VARIES,
    Case,
    Split,
    apply,
    make_case,
    make_experts,
)

SPARSE: list[ExpertStateKind] = ["subsequence", "token"]

NUM_SEQS = pytest.mark.parametrize("num_seqs", [1, 3])


@pytest.fixture(params=["host", "device", "device_copies", "device_all"])
def steps(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> ExpertSteps:
    how: str = request.param

    if how == "device_copies":
        # Copying costs nothing: done wherever it can be.
        monkeypatch.setattr(expert_device_steps, "_PARAM_PASSES", 0)
    elif how == "device_all":
        monkeypatch.setattr(expert_device_steps, "_PARAM_PASSES", 1e9)

    return "host" if how == "host" else "device"


@VARIES
@NUM_SEQS
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("expert_state", SPARSE)
def test_steps_equal_the_whole(
    expert_state: ExpertStateKind,
    split: Split,
    num_seqs: int,
    varies: bool,
    steps: ExpertSteps,
    device: torch.device,
) -> None:
    experts = make_experts(expert_state, split, device, steps)
    case = make_case(device, varies=varies).cut(slice(num_seqs), slice(None))

    expected, expected_state = apply(experts, case)

    outputs, state = [], None

    with torch.inference_mode():
        for s in range(SEQ_LEN):
            step = case.cut(slice(None), slice(s, s + 1))
            # The first step has nothing to reuse.
            output, state = apply(experts, step, state, reuse_state=s % 2 == 0)

            outputs.append(output)

    assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-9, atol=1e-10)
    assert_close(state, expected_state, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seq_lens", LENS)
def test_a_step_after_a_long_text_equals_the_whole(
    seq_lens: list[int] | None, device: torch.device
) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)
    case, last = make_case(device, seq_lens), make_case(device, seq_len=1)

    with torch.inference_mode():
        _, state = apply(experts, case)
        output, _ = apply(experts, last, state)

    for n in range(case.seqs.size(0)):
        end = SEQ_LEN if seq_lens is None else seq_lens[n]

        begin, step = case.cut(slice(n, n + 1), slice(end)), slice(n, n + 1)
        whole = Case(
            torch.cat([begin.seqs, last.seqs[step]], dim=1),
            torch.cat([begin.indices, last.indices[step]], dim=1),
            torch.cat([begin.weights, last.weights[step]], dim=1),
            None,
        )
        expected, _ = apply(experts, whole)

        assert_close(output[n], expected[0, -1:], rtol=1e-9, atol=1e-10)


def list_tensors(state: ExpertsState | None) -> list[Tensor]:
    assert state is not None

    return [x for bank in state for x in (bank or ())]


def test_a_step_leaves_the_state_before_it_as_it_was(
    steps: ExpertSteps, device: torch.device
) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device, steps)

    with torch.inference_mode():
        _, state = apply(experts, make_case(device))
        tensors = list_tensors(state)
        copies = [x.clone() for x in tensors]

        apply(experts, make_case(device, seq_len=1), state)

    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)


def test_a_step_writes_into_a_state_that_it_may_reuse(
    steps: ExpertSteps, device: torch.device
) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device, steps)
    case = make_case(device, seq_len=1)

    with torch.no_grad():
        _, state = apply(experts, make_case(device))
        # What a step leaves is contiguous.
        _, state = apply(experts, case, state)
        _, expected = apply(experts, case, state)
        _, actual = apply(experts, case, state, reuse_state=True)

    assert_close(actual, expected)
    for x, y in zip(list_tensors(actual), list_tensors(state), strict=True):
        assert x is y


def test_a_step_does_not_write_what_inference_mode_made(device: torch.device) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)
    case = make_case(device, seq_len=1)

    with torch.inference_mode():
        _, state = apply(experts, make_case(device))
        _, expected = apply(experts, case, state)

    with torch.no_grad():
        _, actual = apply(experts, case, state, reuse_state=True)

    assert_close(actual, expected)
    for x, y in zip(list_tensors(actual), list_tensors(state), strict=True):
        assert x is not y


def test_a_step_does_not_write_what_autograd_saw(device: torch.device) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)

    _, state = apply(experts, make_case(device))
    copies = [x.clone() for x in list_tensors(state)]

    with torch.no_grad():
        apply(experts, make_case(device, seq_len=1), state, reuse_state=True)

    for x, copy in zip(list_tensors(state), copies, strict=True):
        assert torch.equal(x, copy)


def test_experts_that_tokens_chose_are_copied_where_they_are_few() -> None:
    # Of 64 experts, two sequences choose four; of four, they might choose all.
    for num_experts, is_copied in ((64, True), (4, False)):
        bank = MLSTMBlock(64, num_heads=2, num_experts=num_experts)
        seen: list[int] = []

        def apply_bank(
            seqs: Tensor, state: Any, params: Mapping[str, Tensor], seen: Any = seen
        ) -> tuple[Tensor, Any]:
            seen.append(params["up_proj"].size(0))

            return seqs, state

        tokens = torch.ones(2, 64)
        output = expert_device_steps.step_bank_on_device(
            *(bank, apply_bank, tensor([[0, 3], [2, -1]]), tokens),
            *(tensor([[0.25, 0.5], [2.0, 1.0]]), bank.initial_state(2)),
        )

        assert seen == [4 if is_copied else num_experts]
        assert output[:, 0].tolist() == [0.75, 2.0]


@VARIES
def test_steps_on_a_device_ask_nothing_of_it(varies: bool) -> None:
    # Fake tensors have no values: whoever asks for one fails.
    with FakeTensorMode():
        device = torch.device("cpu")
        case = make_case(device, seq_len=1, varies=varies)

        with torch.no_grad():
            on_device = make_experts("subsequence", (2, 3, 0), device, "device")
            _, state = apply(on_device, case)
            output, _ = apply(on_device, case, state, reuse_state=True)

            on_host = make_experts("subsequence", (2, 3, 0), device, "host")
            with pytest.raises(DataDependentOutputException):
                apply(on_host, case)

    assert output.shape == case.seqs.shape


def test_a_state_counts_where_none_is_wanted_after_it(
    steps: ExpertSteps, device: torch.device
) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device, steps)
    case = make_case(device, seq_len=1)

    with torch.no_grad():
        _, state = apply(experts, make_case(device))
        copies = [x.clone() for x in list_tensors(state)]

        expected, _ = apply(experts, case, state)
        actual, after = experts(
            case.seqs, case.routing, None, state, return_state=False
        )

    assert_close(actual, expected)
    assert after is None
    for x, copy in zip(list_tensors(state), copies, strict=True):
        assert torch.equal(x, copy)


def test_a_step_of_no_sequence_is_empty(
    steps: ExpertSteps, device: torch.device
) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device, steps)
    case = make_case(device, seq_len=1).cut(slice(0), slice(None))

    with torch.no_grad():
        output, state = apply(experts, case)

    assert output.shape == (0, 1, 6)
    assert all(x.size(1) == 0 for x in list_tensors(state))


def test_an_unknown_kind_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^`steps` must be one of auto, host, device"):
        make_experts("subsequence", (2, 3, 0), torch.device("cpu"), "gpu")  # type: ignore[arg-type]  # the mistake


class CountingBank(Module):
    """Experts that return their weight, and tell which of them were asked."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()

        self.weight = Parameter(torch.arange(1.0, 1 + num_experts))
        self.asked: list[float] = []

    @override
    def forward(
        self, seqs: Tensor, seq_lens: Tensor | None, state: Any, *, return_state: bool
    ) -> tuple[Tensor, None]:
        self.asked += self.weight.tolist()

        return self.weight.view(-1, 1, 1, 1).expand(*seqs.shape), None


def test_a_step_asks_the_chosen_experts_only(device: torch.device) -> None:
    mlstm, slstm = CountingBank(4).to(device), CountingBank(4).to(device)
    experts = SparseExperts(
        8, mlstm=mlstm, slstm=slstm, expert_state="token", steps="host"
    )

    # Experts 1 and 3 are of the first bank, 6 is the third of the second.
    case = Case(
        torch.zeros(2, 1, 5, device=device),
        tensor([[[1, 6]], [[6, 3]]], device=device),
        tensor([[[0.5, 0.5]], [[0.25, 0.75]]], device=device),
        None,
    )

    with torch.inference_mode():
        output, _ = apply(experts, case)

    assert (mlstm.asked, slstm.asked) == ([2.0, 4.0], [3.0])
    # 0.5 * 2 + 0.5 * 3 and 0.25 * 3 + 0.75 * 4
    assert output[:, 0, 0].tolist() == [2.5, 3.75]


def test_training_computes_all_experts(device: torch.device) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)
    case = make_case(device, seq_len=1).cut(slice(1), slice(None))

    output, _ = apply(experts, case)
    torch.autograd.backward(output.sum())

    assert output.dtype == float64
    for param in experts.parameters():
        assert param.grad is not None
