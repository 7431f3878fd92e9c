"""Our models for transformers, whose Auto classes know them once this is imported.

It imports transformers, and fairseq2 not before a model is created.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from moxe_plugin.hf.cache import RecurrentCache as RecurrentCache
from moxe_plugin.hf.config import MoxEConfig as MoxEConfig
from moxe_plugin.hf.config import XLSTMConfig as XLSTMConfig
from moxe_plugin.hf.model import MoxEForCausalLM as MoxEForCausalLM
from moxe_plugin.hf.model import XLSTMForCausalLM as XLSTMForCausalLM

AutoConfig.register(MoxEConfig.model_type, MoxEConfig)
AutoConfig.register(XLSTMConfig.model_type, XLSTMConfig)

AutoModelForCausalLM.register(MoxEConfig, MoxEForCausalLM)
AutoModelForCausalLM.register(XLSTMConfig, XLSTMForCausalLM)
