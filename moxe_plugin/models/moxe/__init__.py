"""Model family `moxe`."""

from moxe_plugin.models.moxe.config import MOXE_FAMILY as MOXE_FAMILY
from moxe_plugin.models.moxe.config import MoxEConfig as MoxEConfig
from moxe_plugin.models.moxe.factory import MoxEFactory as MoxEFactory
from moxe_plugin.models.moxe.factory import create_moxe_model as create_moxe_model
from moxe_plugin.models.moxe.hub import get_moxe_model_hub as get_moxe_model_hub
from moxe_plugin.models.moxe.model import MoxELM as MoxELM
from moxe_plugin.models.moxe.registration import register_moxe as register_moxe
