"""What every family promises to fairseq2's recipes and generators."""

from __future__ import annotations

import math

import pytest
import torch
from fairseq2.datasets import SequenceBatch
from fairseq2.nn import BatchLayout, Embedding, IncrementalStateBag
from fairseq2.nn.utils.module import reset_parameters, to_empty
from torch import Tensor
from torch.nn.functional import log_softmax

from moxe_plugin.models.clm import AuxLossCausalLM, LossTerms
from tests.common import assert_close
from tests.models.families import (
    FAMILIES,
    RECURRENT_FAMILIES,
    create_model,
    create_unregistered,
    get_family,
    random_ids,
)

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

all_families = pytest.mark.parametrize("family", FAMILIES)

TOLERANCE = {
    "moxe": 1e-9,
    "xlstm": 1e-9,
    # transformers computes rotary positions and softmax in float32.
    "gemma2": 1e-6,
    "qwen_moe": 1e-6,
}


def _logits(model: AuxLossCausalLM, seqs: Tensor, seq_lens: list[int]) -> Tensor:
    logits = model(seqs, BatchLayout.of(seqs, seq_lens))
    assert isinstance(logits, Tensor)

    return logits


def _layout(seqs: Tensor) -> BatchLayout:
    return BatchLayout.of(seqs)


@all_families
def test_loss_is_the_cross_entropy_of_targets_that_are_shifted_once(
    family: str,
) -> None:
    model = create_model(family).eval()
    seqs, targets = random_ids(3, 7), random_ids(3, 7)

    log_probs = log_softmax(model(seqs, _layout(seqs)), dim=-1)
    expected = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    # Computed in float32 by fairseq2's cross-entropy, which some families use.
    actual = model(seqs, _layout(seqs), targets).float()
    assert_close(actual, expected.sum().float(), rtol=1e-5, atol=0.0)

    actual = model(seqs, _layout(seqs), targets, reduction="mean").float()
    assert_close(actual, expected.mean().float(), rtol=1e-5, atol=0.0)

    mask = torch.rand(3, 7) < 0.5
    actual, logits = model(
        seqs, _layout(seqs), targets, target_mask=mask, return_logits=True
    )
    assert_close(actual, (expected * mask).sum().float(), rtol=1e-5, atol=0.0)
    assert_close(log_softmax(logits, dim=-1), log_probs)

    actual = model(seqs, _layout(seqs), targets, target_mask=mask, reduction="mean")
    assert_close(actual.float(), expected[mask].mean().float(), rtol=1e-5, atol=0.0)

    rest = -log_probs.sum(-1) - expected
    share = 0.1 / (log_probs.size(-1) - 1)
    smoothed = 0.9 * expected + share * rest

    actual = model(seqs, _layout(seqs), targets, label_smoothing=0.1)
    assert_close(actual, smoothed.sum().float(), rtol=1e-5, atol=0.0)

    # Neither masked targets nor padding count.
    seq_lens = [7, 2, 5]
    counted = mask & (torch.arange(7) < torch.tensor(seq_lens).unsqueeze(1))
    layout = BatchLayout.of(seqs, seq_lens)
    actual = model(seqs, layout, targets, label_smoothing=0.1, target_mask=mask)
    assert_close(actual, smoothed[counted].sum().float(), rtol=1e-5, atol=0.0)

    actual = model(
        seqs,
        layout,
        targets,
        label_smoothing=0.1,
        target_mask=mask,
        reduction="mean",
    )
    assert_close(actual, smoothed[counted].mean().float(), rtol=1e-5, atol=0.0)


@all_families
def test_unknown_reduction_is_refused(family: str) -> None:
    model = create_model(family)
    seqs = random_ids(1, 4)

    with pytest.raises(ValueError, match="`reduction` must be 'sum' or 'mean'"):
        model(seqs, _layout(seqs), seqs, reduction="none")  # type: ignore[arg-type]  # the mistake under test


@all_families
def test_packed_batch_has_no_state_to_continue(family: str) -> None:
    model = create_model(family).eval()
    seqs = random_ids(6)
    layout = BatchLayout.of(seqs, [2, 4], packed=True)

    with pytest.raises(ValueError, match="`seqs` must not be packed when `state_bag`"):
        model(seqs, layout, state_bag=IncrementalStateBag(max_num_steps=64))


@all_families
def test_auxiliary_losses_are_scaled_as_the_trainer_counts_targets(
    family: str,
) -> None:
    model = create_model(family).train()
    seqs = random_ids(3, 8)
    batch = SequenceBatch(seqs, [8, 3, 5])
    packed = SequenceBatch(seqs.flatten()[:20], [7, 9, 1], packed=True)

    for inputs, targets in (batch.as_auto_regressive(), packed.as_auto_regressive()):
        terms = model(*inputs.as_input(), targets.seqs, return_terms=True)
        assert isinstance(terms, LossTerms)

        aux = sum(
            scale * float(terms.aux_losses[name].detach())
            for name, scale in model.aux_loss_scales.items()
        )
        assert float((terms.aggregate - terms.nll).detach()) == pytest.approx(
            targets.num_target_elements * aux, rel=1e-4, abs=1e-9
        )


@all_families
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_auxiliary_losses_count_in_training_only_and_scale_with_the_reduction(
    family: str, reduction: str
) -> None:
    model = create_model(family).train()
    seqs, targets = random_ids(3, 7), random_ids(3, 7)
    mask = torch.rand(3, 7) < 0.6

    def terms() -> LossTerms:
        result = model(
            seqs,
            _layout(seqs),
            targets,
            target_mask=mask,
            reduction=reduction,  # type: ignore[arg-type]  # parametrized
            return_terms=True,
        )
        assert isinstance(result, LossTerms)

        return result

    trained = terms()
    assert set(trained.aux_losses) == set(model.aux_loss_scales)
    assert set(trained.stats) == set(model.stat_names)

    weight = float(mask.sum()) if reduction == "sum" else 1.0
    aux = sum(
        scale * float(trained.aux_losses[name].detach())
        for name, scale in model.aux_loss_scales.items()
    )
    assert float(trained.aggregate.detach()) == pytest.approx(
        float(trained.nll.detach()) + weight * aux, rel=1e-6
    )

    model.eval()
    evaluated = terms()
    assert torch.equal(evaluated.aggregate, evaluated.nll)
    assert_close(evaluated.nll, trained.nll)


@all_families
def test_padding_changes_nothing(family: str) -> None:
    model = create_model(family).train()
    seq_lens = [9, 4, 1]
    seqs = random_ids(3, 9)
    targets = random_ids(3, 9)

    logits = _logits(model, seqs, seq_lens)

    for row, seq_len in enumerate(seq_lens):
        alone = seqs[row : row + 1, :seq_len]
        assert_close(
            logits[row : row + 1, :seq_len],
            _logits(model, alone, [seq_len]),
            atol=TOLERANCE[family],
            rtol=0.0,
        )

    wider = torch.cat([seqs, random_ids(3, 5)], dim=1)
    wider_targets = torch.cat([targets, random_ids(3, 5)], dim=1)

    def terms(seqs: Tensor, targets: Tensor) -> LossTerms:
        layout = BatchLayout.of(seqs, seq_lens)
        result = model(seqs, layout, targets, return_terms=True)
        assert isinstance(result, LossTerms)

        return result

    expected, actual = terms(seqs, targets), terms(wider, wider_targets)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@all_families
def test_other_sequences_of_a_batch_change_nothing(family: str) -> None:
    model = create_model(family).eval()
    seqs = random_ids(4, 8)

    logits = model(seqs, _layout(seqs))

    for row in range(4):
        alone = seqs[row : row + 1]
        assert_close(
            logits[row : row + 1],
            model(alone, _layout(alone)),
            atol=TOLERANCE[family],
            rtol=0.0,
        )


@all_families
@pytest.mark.parametrize("tail", [0, 3], ids=["full", "padded"])
def test_packed_documents_are_as_separate_ones(family: str, tail: int) -> None:
    model = create_model(family).train()
    seq_lens = [5, 1, 7]
    width = sum(seq_lens) + tail
    seqs, targets = random_ids(width), random_ids(width)

    layout = BatchLayout.of(seqs, seq_lens, packed=True)
    packed = model(seqs, layout)

    begin = 0
    for seq_len in seq_lens:
        document = seqs[begin : begin + seq_len].unsqueeze(0)
        assert_close(
            packed[begin : begin + seq_len],
            model(document, _layout(document))[0],
            atol=TOLERANCE[family],
            rtol=0.0,
        )
        begin += seq_len

    rows = torch.zeros(3, 7, dtype=torch.int64)
    row_targets = torch.zeros(3, 7, dtype=torch.int64)
    begin = 0
    for row, seq_len in enumerate(seq_lens):
        rows[row, :seq_len] = seqs[begin : begin + seq_len]
        row_targets[row, :seq_len] = targets[begin : begin + seq_len]
        begin += seq_len

    actual = model(seqs, layout, targets, return_terms=True)
    expected = model(
        rows, BatchLayout.of(rows, seq_lens), row_targets, return_terms=True
    )
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@all_families
def test_a_token_never_sees_later_tokens(family: str) -> None:
    model = create_model(family).eval()
    seqs = random_ids(2, 10)
    changed = seqs.clone()
    changed[:, 6:] = random_ids(2, 4)

    before, after = model(seqs, _layout(seqs)), model(changed, _layout(changed))

    assert_close(after[:, :6], before[:, :6], atol=TOLERANCE[family], rtol=0.0)
    assert not torch.allclose(after[:, 6:], before[:, 6:])


@all_families
@pytest.mark.parametrize(
    "chunks", [[1] * 11, [11], [4, 3, 3, 1]], ids=["steps", "whole", "chunks"]
)
def test_generation_with_state_is_the_full_forward(
    family: str, chunks: list[int]
) -> None:
    model = create_model(family).eval()
    seqs = random_ids(3, 11)

    expected = model(seqs, _layout(seqs))

    state_bag = IncrementalStateBag(max_num_steps=64)
    outputs = []
    with torch.no_grad():
        for chunk in seqs.split(chunks, dim=1):
            outputs.append(model(chunk, _layout(chunk), state_bag=state_bag))
            state_bag.increment_step_nr(chunk.size(1))

    assert_close(torch.cat(outputs, dim=1), expected, atol=TOLERANCE[family], rtol=0.0)


@all_families
def test_state_follows_a_reordered_and_grown_batch(family: str) -> None:
    model = create_model(family).eval()
    seqs = random_ids(2, 6)
    new_order = torch.tensor([1, 0, 1])
    rest = random_ids(3, 3)

    full = torch.cat([seqs[new_order], rest], dim=1)
    expected = model(full, _layout(full))[:, 6:]

    state_bag = IncrementalStateBag(max_num_steps=64)
    with torch.no_grad():
        model(seqs, _layout(seqs), state_bag=state_bag)
        state_bag.increment_step_nr(6)
        state_bag.reorder(new_order)
        actual = model(rest, _layout(rest), state_bag=state_bag)

    assert_close(actual, expected, atol=TOLERANCE[family], rtol=0.0)


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_size_of_recurrent_state_does_not_depend_on_length(family: str) -> None:
    model = create_model(family).eval()

    def size(length: int) -> int:
        state_bag = IncrementalStateBag(max_num_steps=64)
        seqs = random_ids(2, length)
        with torch.no_grad():
            model(seqs, _layout(seqs), state_bag=state_bag)

        return sum(
            state.size_bytes()
            for module in model.modules()
            if (state := _state_of(state_bag, module)) is not None
        )

    assert size(3) == size(30) > 0


def _state_of(state_bag: IncrementalStateBag, module: torch.nn.Module):  # type: ignore[no-untyped-def]  # fairseq2's abstract state
    from moxe_plugin.models.recurrent_state import RecurrentState

    return state_bag.maybe_get_state(module, RecurrentState)


@all_families
def test_every_parameter_gets_a_gradient_from_two_tokens(family: str) -> None:
    model = create_model(family).train()
    seqs = random_ids(1, 2)

    model(seqs, _layout(seqs), seqs).backward()

    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing


@all_families
def test_model_has_no_persistent_buffers_and_no_scalar_parameters(family: str) -> None:
    model = create_model(family)

    parameters = dict(model.named_parameters(remove_duplicate=False))

    assert set(model.state_dict()) == set(parameters)
    assert all(p.ndim > 0 for p in parameters.values())


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_meta_model_is_initialised_by_reset_parameters(family: str) -> None:
    model = create_model(family, meta=True, dtype=torch.float32)
    assert all(p.is_meta for p in model.parameters())

    to_empty(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)

    reset_parameters(model)

    for name, parameter in create_model(family, dtype=torch.float32).named_parameters():
        actual = model.get_parameter(name).detach()
        expected = parameter.detach()

        assert actual.isfinite().all(), name
        # Drawn again: large ones are alike in mean and deviation.
        if expected.numel() >= 64:
            std = float(expected.std())

            assert float((actual.mean() - expected.mean()).abs()) <= std, name
            assert float(actual.std()) == pytest.approx(std, rel=0.5), name


@all_families
def test_stock_vocabulary_check_finds_the_embedding(family: str) -> None:
    model = create_model(family)

    embed = model.decoder_frontend.embed  # type: ignore[union-attr]  # as fairseq2 does
    assert isinstance(embed, Embedding)
    assert embed.num_embeddings == 320
    assert embed.pad_idx == model.pad_idx


@all_families
def test_tiny_model_overfits_one_batch(family: str) -> None:
    model = create_model(family, dtype=torch.float32).train()
    seqs = random_ids(2, 12)
    inputs, targets = seqs[:, :-1], seqs[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    for _ in range(60):
        optimizer.zero_grad()
        model(inputs, _layout(inputs), targets, reduction="mean").backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    loss = model.eval()(inputs, _layout(inputs), targets, reduction="mean")
    assert float(loss) < 0.1


@pytest.mark.parametrize(
    ("size", "num_parameters"), [("quickstart", 1.9e6), ("small", 3.1e6)]
)
def test_models_of_a_size_have_its_parameters_within_5_percent(
    size: str, num_parameters: float
) -> None:
    sizes = {
        family: sum(p.numel() for p in create_model(family, size).parameters())
        for family in FAMILIES
    }

    assert max(sizes.values()) <= 1.05 * min(sizes.values()), sizes
    assert list(sizes.values()) == pytest.approx([num_parameters] * 4, rel=0.05)


@pytest.mark.parametrize(
    ("family", "arch", "num_millions"),
    [
        # The middle of the 139 and 145 for two mLSTM and two sLSTM experts.
        ("moxe", "340m", 142.25),
        ("qwen_moe", "350m", 210.1),
        ("xlstm", "338m", 287.8),
        ("gemma2", "356m", 355.9),
    ],
)
def test_parameters_that_a_token_touches_are_those_of_the_reference(
    family: str, arch: str, num_millions: float
) -> None:
    if get_family(family).supports_meta:
        model = create_model(family, arch, meta=True)
    else:
        with torch.device("meta"):
            model = create_unregistered(family, arch)

    total = sum(p.numel() for p in model.parameters())

    assert (total - model.num_idle_parameters()) / 1e6 == pytest.approx(
        num_millions, abs=0.05
    )
