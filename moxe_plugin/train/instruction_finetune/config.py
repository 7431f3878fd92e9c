"""The configuration of ``lm instruction_finetune``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fairseq2.recipe.config import SupportsStructure
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.utils.validation import ValidationResult
from typing_extensions import override

from moxe_plugin.data.instructions import MOXE_INSTRUCTIONS_FAMILY
from moxe_plugin.train.config import TrainConfig
from moxe_plugin.train.dataset_section import LMDatasetSection
from moxe_plugin.train.pretrained import PretrainedSection, apply_pretrained


@dataclass(kw_only=True)
class InstructionsDatasetSection(LMDatasetSection):
    """Which instructions to train and validate on."""

    path_family: ClassVar[str] = MOXE_INSTRUCTIONS_FAMILY

    name: str | None = "moxe_embedded_instructions"


@dataclass(kw_only=True)
class LMInstructionFinetuneConfig(TrainConfig, SupportsStructure):
    """The configuration of the recipe ``lm instruction_finetune``."""

    pretrained: PretrainedSection = field(default_factory=PretrainedSection)
    """The model to start from."""

    dataset: InstructionsDatasetSection = field(
        default_factory=InstructionsDatasetSection
    )
    """The data: a ``path`` with one ``<split>.jsonl`` per split, or the ``name`` of an
    asset."""

    @override
    def structure(self, resolver: DependencyResolver) -> None:
        apply_pretrained(self.pretrained, self.model, self.tokenizer, self.common)

    @override
    def validate(self) -> ValidationResult:
        result = super().validate()

        if self.model.name is None and self.model.path is None:
            result.add_error(
                "`pretrained.source` must be the output directory of a training run or "
                "the name of a model asset (on the command line: `--from`)."
            )

        return result
