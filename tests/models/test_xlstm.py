"""The xLSTM baseline: its pattern of blocks and its size."""

from __future__ import annotations

import pytest

from moxe_plugin.models.xlstm import XLSTMLM
from tests.models.families import create_model

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


def test_338m_has_the_parameters_of_table_1() -> None:
    model = create_model("xlstm", "338m", meta=True)

    assert sum(p.numel() for p in model.parameters()) == 338_111_968


def test_338m_has_one_slstm_block_before_five_mlstm_blocks() -> None:
    model = create_model("xlstm", "338m", meta=True)
    assert isinstance(model, XLSTMLM)

    kinds = [type(layer.block).__name__ for layer in model.decoder.layers]

    assert kinds == ["SLSTMBlock", *["MLSTMBlock"] * 5] * 6
