"""Access to MoxE models by asset name."""

from __future__ import annotations

from fairseq2.models import ModelHubAccessor

from moxe_plugin.models.moxe.config import MOXE_FAMILY, MoxEConfig
from moxe_plugin.models.moxe.model import MoxELM

get_moxe_model_hub = ModelHubAccessor(MOXE_FAMILY, kls=MoxELM, config_kls=MoxEConfig)
