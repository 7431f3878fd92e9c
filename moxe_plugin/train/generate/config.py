"""The configuration of ``lm generate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fairseq2.recipe.config import (
    CommonSection,
    GangSection,
    GeneratorSection,
    ReferenceModelSection,
    SamplingConfig,
    SequenceGeneratorSection,
    SupportsStructure,
    TokenizerSection,
)
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.utils.validation import Validatable, ValidationResult
from typing_extensions import override

from moxe_plugin.train.pretrained import PretrainedSection, apply_pretrained


@dataclass(kw_only=True)
class LMGenerateConfig(SupportsStructure, Validatable):
    """The configuration of the recipe ``lm generate``."""

    pretrained: PretrainedSection = field(default_factory=PretrainedSection)
    """The model that generates."""

    model: ReferenceModelSection = field(default_factory=ReferenceModelSection)

    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)

    prompts: list[str] = field(default_factory=list)
    """What to complete; ``--prompt`` sets it."""

    prompt_file: Path | None = None
    """More of it: one prompt per line, or, in a ``.jsonl`` file, ``{"prompt": ...}`` or
    the ``{"src": ...}`` of an instruction."""

    batch_size: int = 8
    """The number of prompts that are completed at a time, unless text is streamed."""

    stream: bool | None = None
    """Whether to show text as it is generated, one prompt after the other; ``None``
    does so for a single prompt if standard output is a terminal."""

    seq_generator: SequenceGeneratorSection = field(
        default_factory=lambda: SequenceGeneratorSection(
            config=SamplingConfig(max_gen_len=100)
        )
    )
    """How to choose tokens; top-p sampling by default. ``generate/greedy`` and
    ``generate/beam`` are the presets for the other ways."""

    generator: GeneratorSection = field(default_factory=GeneratorSection)

    gang: GangSection = field(default_factory=GangSection)

    common: CommonSection = field(
        default_factory=lambda: CommonSection(no_sweep_dir=True)
    )

    @property
    def can_stream(self) -> bool:
        """Whether the generator never revises a token; a beam search does."""
        return isinstance(self.seq_generator.config, SamplingConfig)

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

        if not self.prompts and self.prompt_file is None:
            result.add_error(
                "`prompts` or `prompt_file` must be specified (on the command line: "
                "`--prompt`, `--prompt-file`)."
            )

        if self.stream and not self.can_stream:
            result.add_error(
                "`stream` must be false with `seq_generator.name` "
                f"'{self.seq_generator.name}', which may revise what it has shown."
            )

        if not all(self.prompts):
            result.add_error("`prompts` must not be empty texts, but one is.")

        if self.batch_size < 1:
            result.add_error(
                "`batch_size` must be greater than or equal to 1, but is "
                f"{self.batch_size} instead."
            )

        return result
