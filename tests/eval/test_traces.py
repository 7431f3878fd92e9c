"""Traces are the model's own losses and routing, at the right tokens."""

from __future__ import annotations

import pytest
import torch
from fairseq2.nn import BatchLayout
from torch.nn.functional import log_softmax

from moxe_plugin.eval.traces import trace_tokens
from moxe_plugin.models.moxe.model import MoxELM
from moxe_plugin.nn.routing import Router, Routing
from tests.common import BOS_IDX, assert_close
from tests.eval.conftest import Load
from tests.models.families import create_model

TEXT = list(b"A rather ordinary sentence.")


@pytest.fixture
def model(load: Load) -> MoxELM:
    """Return a tiny random MoxE."""
    model = load("moxe").model
    assert isinstance(model, MoxELM)

    return model


def test_losses_are_those_of_the_whole_text(model: MoxELM) -> None:
    trace = trace_tokens(model, TEXT, BOS_IDX)

    seqs = torch.tensor([[BOS_IDX, *TEXT]])
    logprobs = log_softmax(model(seqs, BatchLayout.of(seqs)), dim=-1)
    expected = torch.stack([-logprobs[0, i, token] for i, token in enumerate(TEXT)])

    assert trace.token_ids.tolist() == TEXT
    assert_close(trace.nll_nats, expected.detach())


def test_routing_is_that_of_the_routers(model: MoxELM) -> None:
    seen: list[Routing] = []
    routers = [m for m in model.modules() if isinstance(m, Router)]
    hooks = [
        r.register_forward_hook(lambda *args: seen.append(args[2])) for r in routers
    ]

    trace = trace_tokens(model, TEXT, BOS_IDX)

    for hook in hooks:
        hook.remove()

    assert len(trace.layers) == len(seen) == model.config.num_layers

    for layer, routing in zip(trace.layers, seen, strict=True):
        assert layer.difficulty is not None
        assert routing.difficulty is not None
        assert_close(layer.difficulty, routing.difficulty[1:])
        assert_close(layer.router_probs, routing.router_probs[1:])
        assert_close(layer.unbiased_probs, routing.unbiased_probs[1:])
        assert_close(layer.expert_indices, routing.expert_indices[1:])
        assert_close(layer.expert_weights, routing.expert_weights[1:])


def test_a_token_shows_first_in_its_own_loss_and_routing(model: MoxELM) -> None:
    place = 11
    other = [*TEXT[:place], ord("#"), *TEXT[place + 1 :]]

    before, after = (trace_tokens(model, text, BOS_IDX) for text in (TEXT, other))

    changes = [(before.nll_nats, after.nll_nats)]
    changes += [
        (a.router_probs, b.router_probs)
        for a, b in zip(before.layers, after.layers, strict=True)
    ]

    for a, b in changes:
        assert_close(a[:place], b[:place])
        assert not torch.allclose(a[place], b[place])


def test_routing_of_padded_rows_is_that_of_each_row_alone(
    fairseq2_setup: None,  # noqa: ARG001  # fixtures cannot use `usefixtures`
) -> None:
    model = create_model("moxe").eval()
    assert isinstance(model, MoxELM)

    rows = [[BOS_IDX, *TEXT], [BOS_IDX, *TEXT[:7]]]
    width = len(rows[0])
    seqs = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])

    logits, routings = model.trace(seqs, BatchLayout.of(seqs, [len(r) for r in rows]))

    for idx, row in enumerate(rows):
        own = torch.tensor([row])
        own_logits, own_routings = model.trace(own, BatchLayout.of(own))

        assert_close(logits[idx, : len(row)], own_logits[0])

        for routing, own_routing in zip(routings, own_routings, strict=True):
            probs = routing.router_probs.unflatten(0, (2, width))[idx, : len(row)]
            assert_close(probs, own_routing.router_probs)


def test_a_router_without_difficulty_has_none_in_its_trace(
    fairseq2_setup: None,  # noqa: ARG001  # fixtures cannot use `usefixtures`
) -> None:
    model = create_model("moxe", "tiny_standard", dtype=torch.bfloat16).eval()
    assert isinstance(model, MoxELM)

    trace = trace_tokens(model, TEXT, BOS_IDX)

    for layer in trace.layers:
        assert layer.difficulty is None
        assert_close(layer.router_probs.sum(dim=-1), torch.ones(len(TEXT)))
        assert_close(layer.router_probs, layer.unbiased_probs)

    assert trace.nll_nats.dtype == torch.float32


def test_trace_refuses_what_it_cannot_read(model: MoxELM) -> None:
    with pytest.raises(ValueError, match="`token_ids` must have at least one token"):
        trace_tokens(model, [], BOS_IDX)

    packed = torch.tensor(TEXT)
    with pytest.raises(ValueError, match="`seqs` must not be packed"):
        model.trace(packed, BatchLayout.of(packed, [20, len(TEXT) - 20], packed=True))
