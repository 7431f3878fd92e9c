"""Recipe ``lm generate``: completing prompts with a trained model."""

from moxe_plugin.train.generate.config import LMGenerateConfig as LMGenerateConfig
from moxe_plugin.train.generate.recipe import LMGenerateRecipe as LMGenerateRecipe
