"""Tests of `moxe_plugin.nn.selection` and `moxe_plugin.nn.loss_free`."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, float64, tensor
from torch.testing import assert_close

from moxe_plugin.nn.loss_free import LossFreeSelection
from moxe_plugin.nn.selection import (
    NO_EXPERT,
    DynamicSelection,
    ExpertSelection,
    GlobalWorkspaceSelection,
    TopKSelection,
)

NUM_TOKENS, NUM_EXPERTS, TOP_K = 40, 6, 2

BIAS = [0.05, -0.2, 0.1, 0.0, 0.3, -0.05]


def make_loss_free() -> LossFreeSelection:
    selection = LossFreeSelection(NUM_EXPERTS, TOP_K, bias_rate=0.01)

    with torch.no_grad():
        selection.load_bias.copy_(tensor(BIAS))

    return selection.double()


RULES: dict[str, Callable[[], ExpertSelection]] = {
    "top_k": lambda: TopKSelection(NUM_EXPERTS, TOP_K),
    "dynamic": lambda: DynamicSelection(NUM_EXPERTS, 0.6),
    "dynamic-capped": lambda: DynamicSelection(NUM_EXPERTS, 0.9, max_top_k=3),
    "global_workspace": lambda: GlobalWorkspaceSelection(NUM_EXPERTS, TOP_K, 0.8),
    "loss_free": make_loss_free,
}

all_rules = pytest.mark.parametrize("create", RULES.values(), ids=RULES.keys())


def make_probs(device: torch.device) -> Tensor:
    torch.manual_seed(7)

    # From certain to uncertain
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, dtype=float64, device=device)
    scales = torch.linspace(0.1, 4.0, NUM_TOKENS, dtype=float64, device=device)

    return (logits * scales.unsqueeze(1)).softmax(dim=1)


def choose_naively(rule: str, probs: list[float]) -> list[int]:
    """Choose the experts of one token."""
    ranked = sorted(range(NUM_EXPERTS), key=lambda i: -probs[i])

    match rule:
        case "dynamic" | "dynamic-capped":
            threshold, cap = (0.6, 6) if rule == "dynamic" else (0.9, 3)

            size = 1
            while math.fsum(probs[i] for i in ranked[:size]) < threshold:
                size += 1

            return ranked[: min(size, cap)]
        case "global_workspace":
            entropy = -sum(p * math.log(p) for p in probs)

            return ranked if entropy > 0.8 * math.log(NUM_EXPERTS) else ranked[:TOP_K]
        case "loss_free":
            biased = sorted(range(NUM_EXPERTS), key=lambda i: -(probs[i] + BIAS[i]))

            return biased[:TOP_K]
        case _:
            return ranked[:TOP_K]


@pytest.mark.parametrize("rule", RULES)
def test_rule_chooses_as_its_paper_says(rule: str, device: torch.device) -> None:
    probs = make_probs(device)

    indices, weights = RULES[rule]().to(device)(probs)

    num_chosen = set()

    for t, row in enumerate(probs.tolist()):
        chosen = choose_naively(rule, row)
        num_empty = indices.size(1) - len(chosen)

        assert indices[t].tolist() == chosen + [NO_EXPERT] * num_empty

        total = sum(row[i] for i in chosen)
        expected = [row[i] / total for i in chosen] + [0.0] * num_empty

        assert weights[t].tolist() == pytest.approx(expected, rel=1e-12, abs=0.0)

        num_chosen.add(len(chosen))

    # Else the test above would not tell the rules apart.
    varies = rule not in ("top_k", "loss_free")
    assert (len(num_chosen) > 1) == varies


@all_rules
def test_a_token_is_routed_as_if_it_were_alone(
    create: Callable[[], ExpertSelection], device: torch.device
) -> None:
    selection = create().to(device)
    probs = make_probs(device)

    indices, weights = selection(probs)

    for t in range(NUM_TOKENS):
        index, weight = selection(probs[[t]])

        assert torch.equal(index[0], indices[t])
        assert torch.equal(weight[0], weights[t])


@all_rules
def test_gradients_are_those_of_finite_differences(
    create: Callable[[], ExpertSelection], device: torch.device
) -> None:
    selection = create().to(device)

    probs = make_probs(device)[:10].requires_grad_()

    assert torch.autograd.gradcheck(lambda p: selection(p)[1], probs)


@all_rules
def test_chosen_experts_are_distinct_and_their_weights_sum_to_one(
    create: Callable[[], ExpertSelection], device: torch.device
) -> None:
    indices, weights = create().to(device)(make_probs(device))

    assert_close(weights.sum(dim=1), torch.ones_like(weights[:, 0]))

    for row in indices.tolist():
        chosen = [i for i in row if i != NO_EXPERT]

        assert chosen
        assert len(set(chosen)) == len(chosen)


def test_dynamic_number_of_experts_falls_as_the_router_gets_certain(
    device: torch.device,
) -> None:
    selection = DynamicSelection(4, 0.5)

    probs = tensor(
        [[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.3, 0.2], [0.9, 0.1, 0.0, 0.0]],
        device=device,
    )

    indices, weights = selection(probs)

    # The probabilities of the first row reach the threshold exactly.
    assert indices.tolist() == [[0, 1, -1, -1], [1, 2, -1, -1], [0, -1, -1, -1]]
    assert_close(weights[1], tensor([4 / 7, 3 / 7, 0.0, 0.0], device=device))


def test_threshold_of_one_chooses_all_but_the_impossible() -> None:
    indices, _ = DynamicSelection(3, 1.0)(tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]))

    assert indices.tolist() == [[0, 1, 2], [1, -1, -1]]


def test_workspace_is_open_in_training_only_unless_it_is_asked_for(
    device: torch.device,
) -> None:
    probs = make_probs(device)

    expected = TopKSelection(NUM_EXPERTS, TOP_K)(probs)

    selection = GlobalWorkspaceSelection(NUM_EXPERTS, TOP_K, 0.8)
    trained = selection(probs)
    assert trained[0].size(1) == NUM_EXPERTS

    assert_close(selection.eval()(probs), expected)

    selection = GlobalWorkspaceSelection(NUM_EXPERTS, TOP_K, 0.8, at_inference=True)
    assert_close(selection.eval()(probs), trained)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_extreme_workspace_holds_all_tokens_or_none(threshold: float) -> None:
    uniform = torch.full((1, 4), 0.25)
    selection = GlobalWorkspaceSelection(4, 1, threshold)

    num_chosen = (selection(uniform)[0] != NO_EXPERT).sum()

    assert num_chosen == (4 if threshold == 0.0 else 1)


def test_load_bias_counts_in_the_choice_but_not_in_the_weights() -> None:
    selection = LossFreeSelection(3, 2, bias_rate=0.1)
    probs = tensor([[0.5, 0.3, 0.2]])

    assert selection(probs)[0].tolist() == [[0, 1]]

    # Expert 0 had the mean load of 2.
    selection.adjust(tensor([2, 4, 0]))

    assert_close(selection.load_bias.detach(), tensor([0.0, -0.1, 0.1]))

    indices, weights = selection(probs)

    assert indices.tolist() == [[0, 2]]
    assert_close(weights, tensor([[5 / 7, 2 / 7]]))


def test_load_bias_evens_the_load() -> None:
    torch.manual_seed(1)

    selection = LossFreeSelection(8, 2, bias_rate=0.002)

    # A router that prefers some experts by far
    logits = torch.randn(512, 8) + torch.linspace(-2.0, 2.0, 8)
    probs = logits.softmax(dim=1)

    def count() -> Tensor:
        return selection(probs)[0].flatten().bincount(minlength=8)

    busiest = int(count().max())
    assert busiest > 300

    for _ in range(400):
        selection.adjust(count())

    # 128 of 512 tokens would be even.
    assert int(count().max()) < 160
    assert int(count().min()) > 95


def test_load_bias_has_no_gradient_and_starts_at_zero() -> None:
    with torch.device("meta"):
        selection = LossFreeSelection(4, 1, bias_rate=0.1)

    selection.to_empty(device="cpu")
    selection.reset_parameters()

    assert selection.load_bias.tolist() == [0.0] * 4
    assert not selection.load_bias.requires_grad
    assert not list(selection.buffers())


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: TopKSelection(8, 0), r"^`top_k` must be at least 1, but is 0 instead"),
        (
            lambda: TopKSelection(8, 9),
            r"^`top_k` must be at most `num_experts` \(8\), but is 9 instead\.$",
        ),
        (
            lambda: DynamicSelection(8, 0.5, 9),
            r"^`max_top_k` must be at most `num_experts` \(8\), but is 9 instead",
        ),
        (
            lambda: DynamicSelection(8, 0.0),
            r"^`threshold` must be greater than 0 and at most 1, but is 0\.0 instead",
        ),
        (
            lambda: GlobalWorkspaceSelection(8, 9, 0.5),
            r"^`top_k` must be at most `num_experts` \(8\), but is 9 instead",
        ),
        (
            lambda: GlobalWorkspaceSelection(8, 2, 1.5),
            r"^`entropy_threshold` must be between 0 and 1, but is 1\.5 instead",
        ),
        (
            lambda: LossFreeSelection(8, 9, 0.1),
            r"^`top_k` must be at most `num_experts` \(8\), but is 9 instead",
        ),
        (
            lambda: LossFreeSelection(8, 2, math.nan),
            r"^`bias_rate` must be greater than or equal to 0, but is nan instead",
        ),
    ],
)
def test_wrong_argument_is_named(
    create: Callable[[], ExpertSelection], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create()
