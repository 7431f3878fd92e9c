"""MoxE with other rules of selection than the paper's, with and without difficulty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn import Parameter

from moxe_plugin.models.clm import LossTerms
from moxe_plugin.models.moxe import MoxEConfig, MoxELM
from moxe_plugin.nn.loss_free import LossFreeSelection
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.selection import NO_EXPERT
from moxe_plugin.nn.statistics import count_expert_loads
from tests.common import assert_close
from tests.models.families import create_model, get_family, random_ids

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

SELECTIONS = ["dynamic", "global_workspace", "loss_free"]

all_selections = pytest.mark.parametrize("selection", SELECTIONS)
all_routers = pytest.mark.parametrize("router", ["difficulty", "standard"])
all_expert_states = pytest.mark.parametrize(
    "expert_state", ["subsequence", "token", "dense"]
)


def _create(
    selection: str,
    router: str = "difficulty",
    expert_state: str = "subsequence",
    *,
    is_training: bool = False,
) -> MoxELM:
    """Create a model whose tokens differ in their experts."""

    def change(config: MoxEConfig) -> None:
        config.router = router  # type: ignore[assignment]  # parametrized
        config.expert_state = expert_state  # type: ignore[assignment]  # likewise
        config.dynamic_threshold = 0.6
        config.workspace_threshold = 0.85
        config.workspace_at_inference = True

    torch.manual_seed(4)

    model = create_model("moxe", f"tiny_{selection}", change=change)
    assert isinstance(model, MoxELM)

    with torch.no_grad():
        layer: Any
        for layer in model.decoder.layers:
            layer.router.weight.mul_(3.0)

            if isinstance(rule := layer.router.selection, LossFreeSelection):
                rule.load_bias.copy_(torch.tensor([0.2, -0.1, 0.0, 0.1]))

    return model.train(is_training)


def _logits(model: MoxELM, seqs: Tensor, seq_lens: list[int] | None = None) -> Tensor:
    logits = model(seqs, BatchLayout.of(seqs, seq_lens))
    assert isinstance(logits, Tensor)

    return logits


def _terms(model: MoxELM, seqs: Tensor, seq_lens: list[int] | None = None) -> LossTerms:
    terms = model(seqs, BatchLayout.of(seqs, seq_lens), seqs, return_terms=True)
    assert isinstance(terms, LossTerms)

    return terms


def _route(model: MoxELM, seqs: Tensor) -> list[Routing]:
    return model.trace(seqs, BatchLayout.of(seqs))[1]


@all_routers
@all_selections
def test_tokens_differ_in_their_number_of_experts(selection: str, router: str) -> None:
    """What this file tests otherwise would be tested of top-k."""
    routings = _route(_create(selection, router), random_ids(3, 20))

    num_experts = [(r.expert_indices != NO_EXPERT).sum(dim=1) for r in routings]

    assert all((len(n.unique()) > 1) == (selection != "loss_free") for n in num_experts)

    if selection == "loss_free":
        by_prob = [r.router_probs.topk(2).indices for r in routings]

        assert any(
            (r.expert_indices != i).any()
            for r, i in zip(routings, by_prob, strict=True)
        )


@all_expert_states
@all_routers
@all_selections
@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
def test_routing_never_sees_later_tokens_or_other_sequences(
    selection: str, router: str, expert_state: str, is_training: bool
) -> None:
    model = _create(selection, router, expert_state, is_training=is_training)
    seqs = random_ids(3, 12)

    changed = seqs.clone()
    changed[:, 7:] = random_ids(3, 5)
    changed[0] = random_ids(12)

    logits, routings = model.trace(seqs, BatchLayout.of(seqs))
    changed_logits, changed_routings = model.trace(changed, BatchLayout.of(changed))

    assert_close(changed_logits[1:, :7], logits[1:, :7], atol=1e-9, rtol=0.0)
    assert not torch.allclose(changed_logits[1:, 7:], logits[1:, 7:])

    for before, after in zip(routings, changed_routings, strict=True):
        for name in ("expert_indices", "expert_weights"):
            actual, expected = (
                getattr(routing, name).view(3, 12, -1)[1:, :7]
                for routing in (after, before)
            )
            assert_close(actual, expected)


@all_expert_states
@all_selections
def test_padding_and_other_rows_change_nothing(
    selection: str, expert_state: str
) -> None:
    model = _create(selection, expert_state=expert_state, is_training=True)
    seqs, seq_lens = random_ids(3, 9), [9, 4, 1]

    logits = _logits(model, seqs, seq_lens)

    for row, seq_len in enumerate(seq_lens):
        alone = _logits(model, seqs[row : row + 1, :seq_len])

        assert_close(logits[row : row + 1, :seq_len], alone, atol=1e-9, rtol=0.0)

    wider = torch.cat([seqs, random_ids(3, 4)], dim=1)
    # The targets of padding do not count.
    torch.testing.assert_close(
        _terms(model, wider, seq_lens), _terms(model, seqs, seq_lens)
    )


@all_expert_states
@all_routers
@all_selections
def test_generation_with_state_is_the_full_forward(
    selection: str, router: str, expert_state: str
) -> None:
    model = _create(selection, router, expert_state)
    seqs = random_ids(2, 10)

    expected = _logits(model, seqs)

    for chunks in ([1] * 10, [4, 1, 1, 3, 1]):
        state_bag = IncrementalStateBag(max_num_steps=64)
        outputs = []
        with torch.no_grad():
            for chunk in seqs.split(chunks, dim=1):
                layout = BatchLayout.of(chunk)
                outputs.append(model(chunk, layout, state_bag=state_bag))
                state_bag.increment_step_nr(chunk.size(1))

        assert_close(torch.cat(outputs, dim=1), expected, atol=1e-9, rtol=0.0)


@all_selections
def test_layer_is_the_weighted_sum_of_experts_on_their_own_tokens(
    selection: str,
) -> None:
    """A whole layer against experts that are applied one by one, to one sequence."""
    model = _create(selection)
    layer: Any = model.decoder.layers[0]

    inputs: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    output, routing = layer(torch.randn(1, 15, 32, dtype=torch.float64), None)

    expected = torch.zeros_like(output)

    for e in range(4):
        bank = layer.experts.mlstm if e < 2 else layer.experts.slstm
        place = routing.expert_indices == e
        is_chosen = place.any(dim=1)

        if not is_chosen.any():
            continue

        # (S',M) -> (E/2,1,S',M)
        grid = inputs[0][:, is_chosen].expand(2, -1, -1, -1)
        result, _ = bank(grid, None, None, return_state=False)

        weights = routing.expert_weights.where(place, 0.0).sum(dim=1)[is_chosen]
        expected[0, is_chosen] += weights.unsqueeze(1) * result[e % 2, 0]

    assert_close(output, expected, atol=1e-10, rtol=0.0)


@all_expert_states
@all_selections
def test_gradients_are_those_of_finite_differences(
    selection: str, expert_state: str
) -> None:
    model = _create(selection, expert_state=expert_state, is_training=True)
    seqs = random_ids(2, 5)

    def compute_loss() -> Tensor:
        # In float64, unlike fairseq2's cross-entropy
        logits = _logits(model, seqs)
        aux = sum(_terms(model, seqs).aux_losses.values())

        return logits.log_softmax(-1).square().mean() + aux

    router: Any = model.decoder.layers[0].router
    parameters: list[Parameter] = [router.weight, router.difficulty_weight]

    grads = torch.autograd.grad(compute_loss(), parameters)

    for parameter, grad in zip(parameters, grads, strict=True):
        direction = torch.randn_like(parameter)

        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = compute_loss()
            parameter.sub_(direction, alpha=2e-6)
            below = compute_loss()
            parameter.add_(direction, alpha=1e-6)

        slope = (above - below) / 2e-6
        assert_close((grad * direction).sum(), slope, rtol=1e-5, atol=1e-9)


@all_selections
def test_every_parameter_but_the_load_bias_is_trained(selection: str) -> None:
    model = _create(selection, is_training=True)

    # As fairseq2's recipes do
    model.requires_grad_(False)
    model.requires_grad_(True)

    seqs = random_ids(1, 2)
    _terms(model, seqs).aggregate.backward()

    frozen = {n for n, p in model.named_parameters() if p.grad is None}

    assert frozen == {n for n, _ in model.named_parameters() if "load_bias" in n}
    assert bool(frozen) == (selection == "loss_free")
    assert not list(model.buffers())


@all_selections
def test_checkpointed_layers_compute_the_same(selection: str) -> None:
    model = _create(selection, is_training=True)
    seqs = random_ids(2, 9)

    def run() -> tuple[LossTerms, list[Tensor]]:
        model.zero_grad()
        terms = _terms(model, seqs, [9, 4])
        terms.aggregate.backward()

        return terms, [p.grad for p in model.parameters() if p.grad is not None]

    terms, grads = run()
    get_family("moxe").apply_layerwise_ac(model, every_nth_layer=1)
    actual_terms, actual_grads = run()

    torch.testing.assert_close(actual_terms, terms)
    torch.testing.assert_close(actual_grads, grads)


def test_dynamic_has_a_loss_of_its_own() -> None:
    terms = _terms(_create("dynamic", is_training=True), random_ids(2, 6))

    assert set(terms.aux_losses) == {
        "difficulty",
        "group",
        "router_z",
        "load_balance",
        "dynamic",
    }
    assert 0.0 < float(terms.aux_losses["dynamic"].detach()) < 1.39


def test_experts_per_token_are_reported_where_they_vary() -> None:
    for selection in SELECTIONS:
        model = _create(selection)
        seqs = random_ids(3, 8)

        stats, routings = _terms(model, seqs).stats, _route(model, seqs)

        for idx, routing in enumerate(routings):
            name = f"layer_{idx}/experts_per_token"
            assert (name in stats) == (selection != "loss_free")

            if name in stats:
                num_chosen = (routing.expert_indices != NO_EXPERT).sum()
                assert float(stats[name]) == pytest.approx(float(num_chosen) / 24)


def test_loads_are_counted_without_padding() -> None:
    model = _create("loss_free", is_training=True)
    seqs = random_ids(2, 8)

    loads = _terms(model, seqs, [8, 3]).expert_loads
    alone = [_terms(model, s).expert_loads for s in (seqs[:1], seqs[1:, :3])]

    assert loads is not None
    assert loads.shape == (2, 4)
    assert loads.sum(dim=1).tolist() == [22, 22]

    assert alone[0] is not None
    assert alone[1] is not None
    assert torch.equal(loads, alone[0] + alone[1])


@pytest.mark.parametrize("selection", [*SELECTIONS])
def test_only_a_rule_without_a_loss_adjusts_to_loads(selection: str) -> None:
    model = _create(selection)
    seqs = random_ids(2, 8)

    loads, routings = _terms(model, seqs).expert_loads, _route(model, seqs)

    assert model.adjusts_to_loads == (selection == "loss_free")

    assert loads is not None
    assert loads.tolist() == [count_expert_loads(r).tolist() for r in routings]


def test_model_follows_the_loads_of_each_layer() -> None:
    model = _create("loss_free")
    rules = [m for m in model.modules() if isinstance(m, LossFreeSelection)]

    before = [rule.load_bias.clone() for rule in rules]

    model.adjust_to_loads(torch.tensor([[5, 5, 5, 5], [9, 0, 3, 4]]))

    changes = [r.load_bias - b for r, b in zip(rules, before, strict=True)]
    expected = torch.tensor([[0.0] * 4, [-1e-3, 1e-3, 1e-3, 0.0]])

    assert_close(torch.stack(changes).float().detach(), expected, atol=1e-8, rtol=0.0)


@pytest.mark.parametrize(
    ("selection", "change", "num_idle_experts"),
    [
        ("loss_free", {}, 2),
        ("dynamic", {}, 0),
        ("dynamic", {"max_top_k": 3}, 1),
        ("global_workspace", {}, 2),
        ("global_workspace", {"workspace_at_inference": True}, 0),
    ],
    ids=str,
)
def test_idle_parameters_are_those_that_no_token_has_for_sure(
    selection: str, change: dict[str, object], num_idle_experts: int
) -> None:
    def apply(config: MoxEConfig) -> None:
        for name, value in change.items():
            setattr(config, name, value)

    model = create_model("moxe", f"tiny_{selection}", change=apply)
    assert isinstance(model, MoxELM)

    num_expert_params = sum(
        p.numel() for n, p in model.named_parameters() if ".experts." in n
    )

    expected = 320 * 32 + num_idle_experts / 4 * num_expert_params
    assert model.num_idle_parameters() == pytest.approx(expected)


@all_selections
def test_tiny_model_learns_one_batch(selection: str) -> None:
    model = create_model("moxe", f"tiny_{selection}", dtype=torch.float32)
    assert isinstance(model, MoxELM)

    seqs = random_ids(2, 12)
    inputs, targets = seqs[:, :-1], seqs[:, 1:]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2
    )

    losses = []

    for _ in range(12):
        optimizer.zero_grad()
        layout = BatchLayout.of(inputs)
        terms = model(inputs, layout, targets, reduction="mean", return_terms=True)
        terms.aggregate.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        losses.append(terms.nll.item())

        if model.adjusts_to_loads:
            assert terms.expert_loads is not None
            model.adjust_to_loads(terms.expert_loads)

    assert losses[-1] < 0.6 * losses[0]
