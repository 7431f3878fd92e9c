"""Tests of moxe_plugin/routing_page/view.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.eval.traces import LayerTrace, TextTrace, trace_tokens
from moxe_plugin.models.moxe.model import MoxELM
from moxe_plugin.routing_page.pieces import Piece
from moxe_plugin.routing_page.view import RoutingView, create_view
from tests.common import BOS_IDX, ByteTokenizer, assert_close
from tests.models.families import create_model
from tests.routing_page.conftest import Read

LAYER = LayerTrace(
    difficulty=torch.tensor([0.5, 0.25, 0.75, 0.5]),
    router_probs=torch.full((4, 4), 0.25),
    unbiased_probs=torch.full((4, 4), 0.25),
    # Two experts of a group, of both, of the other; then one expert alone.
    expert_indices=torch.tensor([[1, 0], [0, 3], [2, 3], [1, -1]]),
    expert_weights=torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5], [1.0, 0.0]]),
)


def _create_view(num_mlstm_experts: int | None) -> RoutingView:
    return RoutingView(
        title="",
        notes=[],
        source=None,
        pieces=[Piece("a", idx) for idx in range(4)],
        trace=TextTrace(
            token_ids=torch.arange(4), nll_nats=torch.ones(4), layers=[LAYER]
        ),
        num_experts=4,
        num_mlstm_experts=num_mlstm_experts,
    )


def test_marks_and_shares_tell_the_groups_of_the_chosen_experts() -> None:
    view = _create_view(2)

    assert view.marks(LAYER) == ["m", "ms", "s", "m"]

    shares = view.mlstm_shares(LAYER)
    assert shares is not None
    assert_close(shares, torch.tensor([1.0, 0.7, 0.0, 1.0]))

    assert [view.expert_name(i) for i in (1, 2)] == ["mLSTM 1", "sLSTM 2"]


def test_a_layer_is_described_by_means_over_tokens() -> None:
    summary = _create_view(2).summarize(LAYER)

    assert summary.group_shares == {"m": 0.5, "s": 0.25, "ms": 0.25}

    numbers = (
        summary.mlstm_share,
        summary.difficulty,
        summary.entropy,
        summary.experts_per_token,
    )
    assert numbers == pytest.approx((2.7 / 4, 0.5, 1.0, 7 / 4))


def test_feed_forward_experts_form_no_groups() -> None:
    view = _create_view(None)

    assert view.marks(LAYER) == [""] * 4
    assert view.mlstm_shares(LAYER) is None
    assert view.summarize(LAYER).group_shares == {}
    assert view.expert_name(3) == "FFN 3"


def test_the_view_holds_the_trace_of_the_text(
    read: Read, load_byte_model: Callable[[str], LoadedModel]
) -> None:
    view = read("a text")

    model = load_byte_model("tiny").model
    assert isinstance(model, MoxELM)
    trace = trace_tokens(model, list(b"a text"), BOS_IDX)

    assert_close(view.trace.nll_nats, trace.nll_nats)
    assert_close(view.trace.layers[1].router_probs, trace.layers[1].router_probs)
    assert view.num_mlstm_experts == 2
    assert view.title == "a/tiny, step 7"
    assert view.notes == []


def test_scales_end_at_percentiles_of_all_layers(read: Read) -> None:
    view = read("0123456789" * 3)

    colourings = {c.key: c for c in view.colourings()}
    assert list(colourings) == ["difficulty", "loss", "entropy"]

    values = sorted(v for c in colourings["difficulty"].values for v in c.tolist())
    # 60 values: the third from either end.
    assert colourings["difficulty"].low == values[3]
    assert colourings["difficulty"].high == values[56]


@pytest.mark.parametrize("arch", ["tiny_standard", "tiny_ffn"])
def test_without_difficulty_tokens_are_coloured_by_loss(read: Read, arch: str) -> None:
    view = read("a text", arch)

    assert [c.key for c in view.colourings()] == ["loss", "entropy"]
    assert view.summarize(view.trace.layers[0]).difficulty is None


def test_long_texts_are_cut_and_say_so(read: Read) -> None:
    view = read("long " * 100, max_tokens=70)

    assert len(view.pieces) == 70
    assert view.notes == [
        "Only the first 70 of the text's 500 tokens were read (`--max-tokens`).",
        "The 70 tokens were read in one pass, beyond the model's context of 64 tokens "
        "(`max_seq_len`).",
    ]


@pytest.mark.parametrize(
    ("text", "max_tokens", "message"),
    [
        ("", 9, "`text` must have at least one character"),
        ("a\udc80", 9, "must be valid Unicode, but has '.udc80' at character 1"),
        ("a", 0, "`max_tokens` must be greater than or equal to 1, but is 0"),
    ],
)
def test_wrong_input_is_refused(
    read: Read, text: str, max_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(text, max_tokens=max_tokens)


@pytest.mark.usefixtures("fairseq2_setup")
@pytest.mark.parametrize("family", ["xlstm", "qwen_moe"])
def test_models_that_are_no_moxe_are_refused(family: str) -> None:
    model = create_model(family, dtype=torch.float32)
    loaded = LoadedModel(
        model, ByteTokenizer(), "some/run", None, {"model_family": family}
    )

    with pytest.raises(
        ValueError, match=f"`some/run` must be a MoxE model, but is of {family}"
    ):
        create_view(loaded, "a", max_tokens=9)
