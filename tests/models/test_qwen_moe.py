"""Qwen-MoE against transformers, its sizes, balance loss and idle experts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from fairseq2.nn import BatchLayout
from fairseq2.utils.validation import StandardObjectValidator, ValidationError
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from moxe_plugin.models.clm import LossTerms
from moxe_plugin.models.qwen_moe import (
    QwenMoEConfig,
    QwenMoELM,
    create_qwen_moe_model,
)
from tests.common import assert_close


def _tiny(**changes: Any) -> QwenMoEConfig:
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "max_seq_len": 64,
        "model_dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 5,
        "expert_inner_dim": 24,
        "shared_expert_inner_dim": 48,
    }

    return QwenMoEConfig(**(settings | changes))


def _hf(model: QwenMoELM) -> Qwen2MoeForCausalLM:
    hf = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=320,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=48,
            output_router_logits=True,
            attn_implementation="eager",
        )
    )
    hf.load_state_dict(
        {n.removeprefix("hf."): t for n, t in model.state_dict().items()}
    )

    return hf


def _terms(model: QwenMoELM, seqs: Tensor, layout: BatchLayout) -> LossTerms:
    terms = model.forward(seqs, layout, seqs, reduction="mean", return_terms=True)
    assert isinstance(terms, LossTerms)

    return terms


def test_table_1_size_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = create_qwen_moe_model(QwenMoEConfig())

    assert sum(p.numel() for p in model.parameters()) == 349_712_000


def test_logits_are_those_of_transformers() -> None:
    model = create_qwen_moe_model(_tiny()).eval()
    hf = _hf(model)
    hf.train(mode=False)

    seqs = torch.randint(0, 320, (2, 20))
    mask = torch.ones_like(seqs)
    mask[1, 13:] = 0

    expected = hf(input_ids=seqs, attention_mask=mask).logits
    actual = model(seqs, BatchLayout.of(seqs, [20, 13]))

    assert_close(actual[0], expected[0])
    assert_close(actual[1, :13], expected[1, :13])


def test_balance_loss_is_that_of_transformers_without_padding() -> None:
    model = create_qwen_moe_model(_tiny()).train()
    hf = _hf(model).train()

    seqs = torch.randint(0, 320, (3, 11))
    seq_lens = [11, 4, 7]
    mask = (torch.arange(11) < torch.tensor(seq_lens).unsqueeze(1)).long()

    terms = _terms(model, seqs, BatchLayout.of(seqs, seq_lens))
    output = hf(input_ids=seqs, attention_mask=mask)

    expected = load_balancing_loss_func(output.router_logits, 5, 2, mask)
    assert_close(terms.aux_losses["load_balance"], cast(Tensor, expected))
    assert_close(terms.aggregate, terms.nll + 0.001 * cast(Tensor, expected))

    unmasked = load_balancing_loss_func(output.router_logits, 5, 2)
    assert not torch.isclose(cast(Tensor, unmasked), cast(Tensor, expected))

    # The gradient that the balance loss gives to a router.
    name = "model.layers.0.mlp.gate.weight"
    (actual_grad,) = torch.autograd.grad(
        terms.aux_losses["load_balance"], model.get_parameter(f"hf.{name}")
    )
    (expected_grad,) = torch.autograd.grad(
        cast(Tensor, expected), hf.get_parameter(name)
    )
    assert_close(actual_grad, expected_grad)


def test_balance_loss_of_even_routing_is_top_k() -> None:
    model = create_qwen_moe_model(_tiny()).train()
    for layer in range(2):
        # Equal probabilities: any choice of experts has the same loss.
        weight = model.get_parameter(f"hf.model.layers.{layer}.mlp.gate.weight")
        torch.nn.init.zeros_(weight)

    seqs = torch.randint(0, 320, (1, 9))
    loss = _terms(model, seqs, BatchLayout.of(seqs)).aux_losses["load_balance"]

    assert float(loss.detach()) == pytest.approx(2.0)


def test_statistics_count_the_choices_of_tokens_per_layer() -> None:
    model = create_qwen_moe_model(_tiny()).train()
    seqs = torch.randint(0, 320, (2, 5))
    layout = BatchLayout.of(seqs, [5, 2])

    terms = _terms(model, seqs, layout)
    stats, loads = terms.stats, terms.expert_loads
    assert loads is not None

    router_logits = _hf(model)(input_ids=seqs).router_logits
    for layer in range(2):
        # Rows 7 to 9 are padding.
        chosen = router_logits[layer][:7].topk(2).indices.flatten().tolist()
        counts = [chosen.count(expert) for expert in range(5)]

        assert loads[layer].tolist() == counts

        share = stats[f"layer_{layer}/busiest_expert_share"]
        assert float(share) == pytest.approx(max(counts) / 14)
        assert int(stats[f"layer_{layer}/idle_experts"]) == counts.count(0)
        assert not share.requires_grad


def test_idle_experts_get_a_gradient_of_zero() -> None:
    model = create_qwen_moe_model(_tiny(num_experts=16, num_layers=1)).train()
    seqs = torch.randint(0, 320, (1, 2))

    terms = _terms(model, seqs, BatchLayout.of(seqs))
    torch.autograd.backward(terms.nll)

    num_idle = int(terms.stats["layer_0/idle_experts"])
    assert num_idle >= 12

    grads = [
        cast(
            Tensor,
            model.get_parameter(
                f"hf.model.layers.0.mlp.experts.{expert}.down_proj.weight"
            ).grad,
        )
        for expert in range(16)
    ]
    assert sum(not grad.any() for grad in grads) == num_idle


def test_touching_idle_experts_changes_no_output() -> None:
    model = create_qwen_moe_model(_tiny()).eval()
    seqs = torch.randint(0, 320, (2, 9))

    with_gradients = model(seqs, BatchLayout.of(seqs))
    with torch.no_grad():
        without_gradients = model(seqs, BatchLayout.of(seqs))

    assert_close(with_gradients, without_gradients, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` must be greater than or equal to 1"),
        ({"num_heads": 3}, r"`model_dim` \(32\) must be an even multiple of"),
        ({"num_key_value_heads": 3}, r"`num_heads` \(4\) must be a multiple of"),
        ({"top_k": 6}, r"`top_k` must be between 1 and `num_experts` \(5\)"),
        ({"load_balance_loss_scale": -1.0}, "`load_balance_loss_scale` must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_configuration_is_explained(change: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StandardObjectValidator().validate(_tiny(**change))
