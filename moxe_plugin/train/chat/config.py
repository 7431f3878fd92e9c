"""The configuration of ``lm chat``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fairseq2.recipe.config import (
    CommonSection,
    GangSection,
    ReferenceModelSection,
    SamplingConfig,
    SequenceGeneratorSection,
    SupportsStructure,
    TokenizerSection,
)
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.utils.validation import Validatable, ValidationResult
from typing_extensions import override

from moxe_plugin.data.turns import TurnFormat
from moxe_plugin.train.pretrained import PretrainedSection, apply_pretrained


@dataclass(kw_only=True)
class LMChatConfig(SupportsStructure, Validatable):
    """The configuration of the recipe ``lm chat``."""

    pretrained: PretrainedSection = field(default_factory=PretrainedSection)
    """The model that answers."""

    model: ReferenceModelSection = field(default_factory=ReferenceModelSection)

    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)

    turn_format: Literal["auto"] | TurnFormat = "auto"
    """How a text is written before the model reads it: ``instruction`` (as it is),
    ``question`` (as GSM8K's) or ``messages`` (by the chat template of the tokenizer, or
    with the names of the roles). ``auto`` looks at the data that the model was
    finetuned on."""

    json_output: bool = False
    """Whether standard output gets one JSON object per answer; ``--json`` sets it."""

    seq_generator: SequenceGeneratorSection = field(
        default_factory=lambda: SequenceGeneratorSection(
            config=SamplingConfig(max_gen_len=256)
        )
    )
    """How to choose tokens; ``max_seq_len`` limits the context."""

    gang: GangSection = field(default_factory=GangSection)

    common: CommonSection = field(
        default_factory=lambda: CommonSection(no_sweep_dir=True)
    )

    @override
    def structure(self, resolver: DependencyResolver) -> None:
        apply_pretrained(self.pretrained, self.model, self.tokenizer, self.common)

    @override
    def validate(self) -> ValidationResult:
        result = ValidationResult()

        if self.model.name is None and self.model.path is None:
            result.add_error(
                "`pretrained.source` must be the output directory of a training run or "
                "the name of a model asset (on the command line: `--from`)."
            )

        if not isinstance(self.seq_generator.config, SamplingConfig):
            result.add_error(
                "`seq_generator.name` must be 'sampling' to chat, but is "
                f"'{self.seq_generator.name}' instead."
            )

        return result
