"""Gemma 2 against transformers, its sizes and its sliding window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from fairseq2.utils.validation import StandardObjectValidator, ValidationError
from torch import Tensor
from transformers import Gemma2Config as HfGemma2Config
from transformers import Gemma2ForCausalLM

from moxe_plugin.models.gemma2 import Gemma2Config, Gemma2LM, create_gemma2_model
from tests.common import assert_close


def _tiny(**changes: Any) -> Gemma2Config:
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "max_seq_len": 64,
        "model_dim": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "ffn_inner_dim": 64,
        "sliding_window": 8,
    }

    return Gemma2Config(**(settings | changes))


def _logits(
    model: Gemma2LM, seqs: Tensor, state_bag: IncrementalStateBag | None = None
) -> Tensor:
    logits: Tensor = model(seqs, BatchLayout.of(seqs), state_bag=state_bag)

    return logits


def test_table_1_size_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = create_gemma2_model(Gemma2Config())

    assert sum(p.numel() for p in model.parameters()) == 355_899_520


def test_logits_are_those_of_transformers() -> None:
    model = create_gemma2_model(_tiny()).eval()

    hf = Gemma2ForCausalLM(
        HfGemma2Config(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            attn_implementation="eager",
        )
    ).eval()
    hf.load_state_dict(
        {n.removeprefix("hf."): t for n, t in model.state_dict().items()}
    )

    seqs = torch.randint(0, 320, (2, 20))
    mask = torch.ones_like(seqs)
    mask[1, 13:] = 0

    expected = hf(input_ids=seqs, attention_mask=mask).logits
    actual = model(seqs, BatchLayout.of(seqs, [20, 13]))

    assert_close(actual[0], expected[0])
    assert_close(actual[1, :13], expected[1, :13])


def test_embedding_and_output_projection_stay_tied(tmp_path: Path) -> None:
    model = create_gemma2_model(_tiny())
    torch.save(model.state_dict(), tmp_path / "model.pt")

    loaded = create_gemma2_model(_tiny())
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)

    head = loaded.get_parameter("hf.lm_head.weight")
    assert head is loaded.get_parameter("hf.model.embed_tokens.weight")
    assert_close(head, model.get_parameter("hf.lm_head.weight"))


def test_layers_with_a_window_do_not_see_beyond_it() -> None:
    model = create_gemma2_model(_tiny(num_layers=1)).eval()
    seqs = torch.randint(0, 320, (1, 20))
    changed = seqs.clone()
    changed[0, 0] = (seqs[0, 0] + 1) % 320

    before, after = _logits(model, seqs), _logits(model, changed)

    # Token 0 is in the window of 8 of tokens 0 to 7.
    assert_close(after[:, 8:], before[:, 8:], rtol=0.0, atol=1e-6)
    assert not torch.allclose(after[:, 7], before[:, 7], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    "chunks", [[1] * 40, [13, 1, 10, 1, 15], [3, 37]], ids=["steps", "mixed", "long"]
)
def test_chunks_longer_than_the_window_continue_exactly(chunks: list[int]) -> None:
    model = create_gemma2_model(_tiny()).eval()
    seqs = torch.randint(0, 320, (2, 40))
    state_bag = IncrementalStateBag(max_num_steps=64)

    outputs = []
    for chunk in torch.split(seqs, chunks, dim=1):
        outputs.append(_logits(model, chunk, state_bag))
        state_bag.increment_step_nr(chunk.size(1))

    assert_close(torch.cat(outputs, dim=1), _logits(model, seqs), rtol=0.0, atol=1e-5)

    # Layers 0 and 2 keep the last 7 tokens only: keys and values of 2 sequences,
    # 2 heads of 8 numbers of 4 bytes.
    assert state_bag.size_bytes() == (7 + 40 + 7) * 2 * 2 * 2 * 8 * 4


def test_logits_are_capped() -> None:
    model = create_gemma2_model(_tiny()).eval()
    with torch.no_grad():
        model.get_parameter("hf.lm_head.weight").mul_(1000.0)

    logits = _logits(model, torch.randint(0, 320, (1, 9))).detach()

    assert 29.0 < float(logits.abs().max()) <= 30.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "`num_layers` must be greater than or equal to 1"),
        ({"num_key_value_heads": 3}, r"`num_heads` \(4\) must be a multiple of"),
        ({"head_dim": 7}, "`head_dim` must be even"),
        ({"sliding_window": 1}, "`sliding_window` must be greater than or equal to 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_configuration_is_explained(change: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StandardObjectValidator().validate(_tiny(**change))
