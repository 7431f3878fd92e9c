"""MoxE's own promises, for its variants."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from fairseq2.utils.validation import StandardObjectValidator, ValidationError
from torch import Tensor

from moxe_plugin.models.clm import LossTerms
from moxe_plugin.models.moxe import MoxEConfig, MoxELM
from moxe_plugin.models.moxe.architectures import ABLATIONS
from tests.common import assert_close
from tests.models.families import create_model, get_arch, random_ids

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


def _set(**fields: Any) -> Callable[[MoxEConfig], None]:
    def change(config: MoxEConfig) -> None:
        for name, value in fields.items():
            setattr(config, name, value)

    return change


VARIANTS = {
    "subsequence": _set(),
    "token": _set(expert_state="token"),
    "dense": _set(expert_state="dense"),
    "standard-router": _set(router="standard", num_experts=6),
    "ffn": _set(router="standard", experts="ffn"),
    "mlstm": _set(
        router="standard", num_mlstm_experts=4, mixer_blocks=["mlstm", "mlstm"]
    ),
    "slstm": _set(
        router="standard", num_mlstm_experts=0, mixer_blocks=["slstm", "slstm"]
    ),
    "uneven-groups": _set(num_experts=5, num_mlstm_experts=2, top_k=3),
    "masked": _set(modulation="masked", difficulty_threshold=0.4),
    "proportional": _set(modulation="proportional", difficulty_threshold=0.4),
}

all_variants = pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())


def _create(
    change: Callable[[MoxEConfig], None] | None = None, **kwargs: Any
) -> MoxELM:
    model = create_model("moxe", change=change, **kwargs)
    assert isinstance(model, MoxELM)

    return model


def _terms(model: MoxELM, seqs: Tensor) -> LossTerms:
    terms = model(seqs, BatchLayout.of(seqs), seqs, return_terms=True)
    assert isinstance(terms, LossTerms)

    return terms


@all_variants
def test_variant_generates_as_it_reads(change: Callable[[MoxEConfig], None]) -> None:
    model = _create(change).eval()
    seqs = random_ids(2, 9)

    expected = model(seqs, BatchLayout.of(seqs))

    state_bag = IncrementalStateBag(max_num_steps=64)
    outputs = []
    with torch.no_grad():
        for chunk in seqs.split([4, 1, 1, 3], dim=1):
            outputs.append(model(chunk, BatchLayout.of(chunk), state_bag=state_bag))
            state_bag.increment_step_nr(chunk.size(1))

    assert_close(torch.cat(outputs, dim=1), expected, atol=1e-9, rtol=0.0)


@all_variants
def test_variant_ignores_padding_and_trains_every_parameter(
    change: Callable[[MoxEConfig], None],
) -> None:
    model = _create(change).train()
    seqs = random_ids(2, 8)
    layout = BatchLayout.of(seqs, [8, 3])

    loss = model(seqs, layout, seqs)
    loss.backward()

    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert all(
        bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None
    )

    other = seqs.clone()
    other[1, 3:] = random_ids(5)
    assert torch.equal(model(other, layout, seqs), loss)


def test_names_of_terms_follow_the_router() -> None:
    with_difficulty = _terms(_create(), random_ids(2, 5))
    assert set(with_difficulty.aux_losses) == {
        "difficulty",
        "group",
        "router_z",
        "load_balance",
    }
    assert "layer_1/difficulty" in with_difficulty.stats

    standard = _terms(_create(_set(router="standard")), random_ids(2, 5))
    assert set(standard.aux_losses) == {"router_z", "load_balance"}
    assert "layer_1/difficulty" not in standard.stats


def test_aggregate_is_the_weighted_sum_of_equation_21() -> None:
    scales = {
        "difficulty": 0.5,
        "group": 0.25,
        "router_z": 0.125,
        "load_balance": 2.0,
    }
    model = _create(_set(**{f"{name}_loss_scale": s for name, s in scales.items()}))
    with torch.no_grad():
        terms = _terms(model.train(), random_ids(3, 6))

    expected = float(terms.nll) + 18 * sum(
        scale * float(terms.aux_losses[name]) for name, scale in scales.items()
    )
    assert float(terms.aggregate) == pytest.approx(expected, rel=1e-6)


def test_statistics_are_consistent() -> None:
    stats = _terms(_create(), random_ids(3, 6)).stats

    for layer in range(2):
        value = {
            name.removeprefix(f"layer_{layer}/"): float(stat)
            for name, stat in stats.items()
            if name.startswith(f"layer_{layer}/")
        }
        assert value["mlstm_share"] + value["slstm_share"] == pytest.approx(1.0)
        assert 0.25 <= value["busiest_expert_share"] <= 0.5
        assert 0.0 < value["router_entropy"] <= 1.0
        assert 0.0 < value["difficulty"] < 1.0
        assert value["idle_experts"] in range(3)


def test_odds_of_the_groups_grow_with_difficulty() -> None:
    """MoxE eqs. (23)-(43) on a whole layer of a model."""
    gamma = 0.7
    model = _create(_set(difficulty_bias_scale=gamma)).eval()
    layer = model.decoder.layers[0]

    _, routing = layer(torch.randn(2, 5, 32, dtype=torch.float64), None)

    odds = routing.router_probs[:, :2].sum(-1) / routing.router_probs[:, 2:].sum(-1)
    raw = routing.router_logits.exp()
    raw_odds = raw[:, :2].sum(-1) / raw[:, 2:].sum(-1)

    assert_close(odds, torch.exp(2 * gamma * routing.difficulty) * raw_odds)


def test_projections_of_the_matrix_memory_do_not_start_at_zero() -> None:
    for name, parameter in _create().named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            assert float(parameter.detach().std()) > 0.05, name


@pytest.mark.parametrize(
    ("arch", "num_parameters"),
    [("340m", 339_811_690), ("authors_340m", 339_811_050)],
)
def test_340m_has_the_parameters_of_table_1(arch: str, num_parameters: int) -> None:
    model = create_model("moxe", arch, meta=True)

    assert sum(p.numel() for p in model.parameters()) == num_parameters


@pytest.mark.parametrize(
    ("ablation", "num_millions"),
    [
        ("mlstm", 325.05),
        ("slstm", 354.56),
        ("standard", 339.80),
        ("ffn", 314.95),
        ("gamma0", 339.81),
        ("no_group_loss", 339.81),
    ],
)
def test_ablations_have_the_parameters_of_the_authors_tree(
    ablation: str, num_millions: float
) -> None:
    model = create_model("moxe", f"authors_340m_{ablation}", meta=True)

    num_parameters = sum(p.numel() for p in model.parameters())
    assert num_parameters / 1e6 == pytest.approx(num_millions, abs=0.005)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablation_trains(ablation: str) -> None:
    model = create_model("moxe", f"tiny_{ablation}").train()
    seqs = random_ids(2, 7)

    model(seqs, BatchLayout.of(seqs), seqs).backward()

    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, r"`top_k` must be between 1 and `num_experts` \(8\), but is 9"),
        ({"num_experts": 7}, "`num_experts` must be even to be split in half"),
        ({"num_heads": 7}, r"`model_dim` \(640\) must be a multiple of `num_heads`"),
        ({"difficulty_bias_scale": -1.0}, "`difficulty_bias_scale` must be greater"),
        ({"num_mlstm_experts": 8}, "Set `router` to 'standard'"),
        ({"num_mlstm_experts": 9}, "`num_mlstm_experts` must be between 0 and"),
        (
            {"num_experts": 1, "num_mlstm_experts": 1, "top_k": 1},
            "`num_experts` must be greater than or equal to 2, but is 1",
        ),
        (
            {"qkv_block_size": 48},
            r"`qkv_block_size` must divide the mLSTM's inner dimension \(1280: `mlstm",
        ),
        ({"conv_kernel_size": 0}, "`conv_kernel_size` must be greater"),
        ({"mixer_blocks": []}, "`mixer_blocks` must name at least one block"),
        ({"group_loss_scale": -0.1}, "`group_loss_scale` must be greater"),
        ({"vocab_size": 0}, "`vocab_size` must be greater than or equal to 1"),
        (
            {"max_top_k": 9},
            r"`max_top_k` must be between 1 and `num_experts` \(8\), bu",
        ),
        ({"dynamic_threshold": 0.0}, "`dynamic_threshold` must be greater than 0 and"),
        ({"workspace_threshold": 1.5}, "`workspace_threshold` must be between 0 and 1"),
        ({"load_bias_rate": -0.1}, "`load_bias_rate` must be greater than or equal"),
        ({"dynamic_loss_scale": -0.1}, "`dynamic_loss_scale` must be greater than or"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_configuration_is_named(fields: dict[str, Any], message: str) -> None:
    config = get_arch("moxe", "340m")
    _set(**fields)(config)

    with pytest.raises(ValidationError) as error:
        StandardObjectValidator().validate(config)

    assert re.search(message, str(error.value.result))
