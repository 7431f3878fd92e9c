"""The xLSTM baseline: its pattern of blocks and its size."""

from __future__ import annotations

from typing import Any

import pytest
from fairseq2.utils.validation import StandardObjectValidator, ValidationError

from moxe_plugin.models.xlstm import XLSTMLM, XLSTMConfig
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slstm_period": 0}, "`slstm_period` must be greater than or equal to 1"),
        ({"num_heads": 7}, r"`model_dim` \(1024\) must be a multiple of `num_heads`"),
        (
            # 48 / 3 fits the sLSTM, 128 / 3 does not fit the mLSTM.
            {"model_dim": 48, "num_heads": 3},
            r"`num_heads` must divide the mLSTM's inner dimension \(128: ",
        ),
        ({"qkv_block_size": 0}, "`qkv_block_size` must divide the mLSTM's inner"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_configuration_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StandardObjectValidator().validate(XLSTMConfig(**fields))
