"""What the families that are built from transformers modules share."""

from moxe_plugin.models.hf.cache import HfCacheState as HfCacheState
from moxe_plugin.models.hf.model import HfCausalLM as HfCausalLM
from moxe_plugin.models.hf.parallel import apply_ac_to_hf as apply_ac_to_hf
from moxe_plugin.models.hf.parallel import apply_fsdp_to_hf as apply_fsdp_to_hf
from moxe_plugin.models.hf.parallel import compile_hf as compile_hf
