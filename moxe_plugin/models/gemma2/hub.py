"""Access to Gemma 2 models by asset name."""

from __future__ import annotations

from fairseq2.models import ModelHubAccessor

from moxe_plugin.models.gemma2.config import GEMMA2_FAMILY, Gemma2Config
from moxe_plugin.models.gemma2.model import Gemma2LM

get_gemma2_model_hub = ModelHubAccessor(
    GEMMA2_FAMILY, kls=Gemma2LM, config_kls=Gemma2Config
)
