"""Recipe ``lm instruction_finetune``: learning to respond to instructions."""

from moxe_plugin.train.instruction_finetune.config import (
    LMInstructionFinetuneConfig as LMInstructionFinetuneConfig,
)
from moxe_plugin.train.instruction_finetune.recipe import (
    LMInstructionFinetuneRecipe as LMInstructionFinetuneRecipe,
)
