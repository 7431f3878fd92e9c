"""Model family `xlstm`."""

from moxe_plugin.models.xlstm.config import XLSTM_FAMILY as XLSTM_FAMILY
from moxe_plugin.models.xlstm.config import XLSTMConfig as XLSTMConfig
from moxe_plugin.models.xlstm.factory import XLSTMFactory as XLSTMFactory
from moxe_plugin.models.xlstm.factory import create_xlstm_model as create_xlstm_model
from moxe_plugin.models.xlstm.hub import get_xlstm_model_hub as get_xlstm_model_hub
from moxe_plugin.models.xlstm.model import XLSTMLM as XLSTMLM
from moxe_plugin.models.xlstm.registration import register_xlstm as register_xlstm
