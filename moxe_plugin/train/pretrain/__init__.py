"""Recipe ``lm pretrain``: next-token prediction on token shards."""

from moxe_plugin.train.pretrain.config import LMPretrainConfig as LMPretrainConfig
from moxe_plugin.train.pretrain.recipe import LMPretrainRecipe as LMPretrainRecipe
