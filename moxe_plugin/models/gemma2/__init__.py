"""Model family `gemma2`: a dense transformer, one of MoxE's baselines."""

from moxe_plugin.models.gemma2.config import GEMMA2_FAMILY as GEMMA2_FAMILY
from moxe_plugin.models.gemma2.config import Gemma2Config as Gemma2Config
from moxe_plugin.models.gemma2.factory import Gemma2Factory as Gemma2Factory
from moxe_plugin.models.gemma2.factory import create_gemma2_model as create_gemma2_model
from moxe_plugin.models.gemma2.hub import get_gemma2_model_hub as get_gemma2_model_hub
from moxe_plugin.models.gemma2.model import Gemma2LM as Gemma2LM
from moxe_plugin.models.gemma2.registration import register_gemma2 as register_gemma2
