"""Losses and routing of a document, read in windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fairseq2.nn import BatchLayout

from moxe_plugin.claims.tracing import bias_scale, count_mlstm_experts, trace_windows
from moxe_plugin.models.moxe.model import MoxELM
from tests.models.families import create_model

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

_PREFIX = 7
_IDS = np.arange(20, 43)


@pytest.mark.parametrize("family", ["moxe", "gemma2"])
@pytest.mark.parametrize("window_len", [5, 23, 64])
def test_losses_are_those_of_each_window_alone(family: str, window_len: int) -> None:
    model = create_model(family, dtype=torch.float32).eval()

    nll, _ = trace_windows(model, _IDS, _PREFIX, window_len)

    expected = []
    inputs = torch.from_numpy(np.concatenate(([_PREFIX], _IDS[:-1])))

    for begin in range(0, len(_IDS), window_len):
        window = inputs[begin : begin + window_len].unsqueeze(0)
        with torch.inference_mode():
            logprobs = model(window, BatchLayout.of(window))[0].log_softmax(dim=-1)
        targets = _IDS[begin : begin + window_len]
        expected += [-float(row[t]) for row, t in zip(logprobs, targets, strict=True)]

    np.testing.assert_allclose(nll, expected, rtol=1e-4)


def test_routing_is_that_of_the_tokens_read() -> None:
    model = create_model("moxe", dtype=torch.float32).eval()
    assert isinstance(model, MoxELM)

    _, layers = trace_windows(model, _IDS, _PREFIX, len(_IDS))

    seqs = torch.from_numpy(np.concatenate(([_PREFIX], _IDS[:-1]))).unsqueeze(0)
    with torch.inference_mode():
        _, routings = model.trace(seqs, BatchLayout.of(seqs))

    for layer, routing in zip(layers, routings, strict=True):
        # Four experts, of which the first two are mLSTM experts; without the prefix.
        probs = routing.router_probs[1:]
        odds = probs[:, :2].sum(dim=1) / probs[:, 2:].sum(dim=1)
        np.testing.assert_allclose(layer.log_odds, odds.log(), rtol=1e-3, atol=1e-5)

        share = (routing.expert_indices[1:] < 2).double().mean(dim=1)
        np.testing.assert_allclose(layer.mlstm_share, share)

        assert routing.difficulty is not None
        assert layer.difficulty is not None
        np.testing.assert_allclose(layer.difficulty, routing.difficulty[1:], rtol=1e-5)

        # Eq. (6): the bias moves the odds by exactly 2 gamma d.
        np.testing.assert_allclose(
            layer.log_odds - layer.raw_log_odds,
            2 * bias_scale(model) * layer.difficulty,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("arch", "num_mlstm"),
    [("tiny", 2), ("tiny_standard", 2), ("tiny_ffn", None), ("tiny_mlstm", None)],
)
def test_only_models_with_two_groups_have_routing(
    arch: str, num_mlstm: int | None
) -> None:
    model = create_model("moxe", arch, dtype=torch.float32).eval()

    _, layers = trace_windows(model, _IDS, _PREFIX, 8)

    assert count_mlstm_experts(model) == num_mlstm
    assert len(layers) == (0 if num_mlstm is None else 2)
