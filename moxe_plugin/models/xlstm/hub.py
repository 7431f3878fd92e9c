"""Access to xLSTM models by asset name."""

from __future__ import annotations

from fairseq2.models import ModelHubAccessor

from moxe_plugin.models.xlstm.config import XLSTM_FAMILY, XLSTMConfig
from moxe_plugin.models.xlstm.model import XLSTMLM

get_xlstm_model_hub = ModelHubAccessor(
    XLSTM_FAMILY, kls=XLSTMLM, config_kls=XLSTMConfig
)
