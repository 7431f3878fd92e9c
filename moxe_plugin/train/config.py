"""The configuration that all training recipes share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fairseq2.recipe.config import (
    COSINE_ANNEALING_LR,
    AdamWConfig,
    CommonSection,
    CosineAnnealingLRConfig,
    GangSection,
    LRSchedulerSection,
    MixedPrecisionConfig,
    ModelSection,
    OptimizerSection,
    RegimeSection,
    TokenizerSection,
    TrainerSection,
)
from fairseq2.utils.validation import Validatable, ValidationResult
from typing_extensions import override


def _validate_adamw(config: AdamWConfig, result: ValidationResult) -> None:
    # Whatever is compared with NaN is false.
    for name in ("lr", "weight_decay", "eps"):
        value = getattr(config, name)

        if not 0.0 <= value < math.inf:
            result.add_error(
                f"`optimizer.config.{name}` must be greater than or equal to 0 and "
                f"finite, but is {value} instead."
            )

    if not all(0.0 <= beta < 1.0 for beta in config.betas):
        result.add_error(
            "`optimizer.config.betas` must be at least 0 and less than 1, but are "
            f"{config.betas} instead."
        )


@dataclass(kw_only=True)
class StepRegimeSection(RegimeSection):
    """A :class:`RegimeSection` that counts in steps only."""

    @override
    def validate(self) -> ValidationResult:
        result = super().validate()

        if self.num_steps is None:
            result.add_error("`num_steps` must be specified.")

        if self.num_data_epochs is not None:
            result.add_error(
                "`num_data_epochs` must be null, since fairseq2 0.8.1 then loses the "
                "last checkpoint of some runs, but is "
                f"{self.num_data_epochs} instead. Set `num_steps` to the number of "
                "steps of that many epochs."
            )

        return result


@dataclass(kw_only=True)
class TrainConfig(Validatable):
    """What a training recipe needs beside its data.

    The optimizer's default values are those of the authors' training configuration.
    """

    model: ModelSection = field(default_factory=ModelSection)
    """The model: ``family`` and ``arch`` of a new one, or the ``name`` of an asset."""

    tokenizer: TokenizerSection = field(
        default_factory=lambda: TokenizerSection(name="moxe_embedded_tokenizer")
    )
    """The tokenizer: the ``name`` of an asset, or a ``path`` with its ``family``."""

    gang: GangSection = field(default_factory=GangSection)

    trainer: TrainerSection = field(
        default_factory=lambda: TrainerSection(
            mixed_precision=MixedPrecisionConfig(mode="off"), max_grad_norm=1.0
        )
    )
    """Runs in ``model.dtype`` by default; fairseq2's own default would be bf16."""

    balance_over: Literal["local", "global"] = "local"
    """Over which tokens the group-wise and load-balancing losses take their means:
    those of a process's batch, as is usual, or of the batches of all processes, at a
    few more collectives per layer. With gradient accumulation, either way, each forward
    pass has losses of its own."""

    keep_freed_memory: bool = True
    """Whether a process that trains on a CPU keeps the memory that a step has freed for
    the next one; see :func:`~moxe_plugin.allocator.keep_freed_memory`. It changes no
    result, and means nothing on a GPU."""

    optimizer: OptimizerSection = field(
        default_factory=lambda: OptimizerSection(
            config=AdamWConfig(
                lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-3, impl="fused"
            )
        )
    )
    """One operation updates all parameters, on CPUs and GPUs, where PyTorch's default
    takes several for each on a CPU, and on a GPU much of the host's time."""

    lr_scheduler: LRSchedulerSection = field(
        default_factory=lambda: LRSchedulerSection(
            name=COSINE_ANNEALING_LR,
            config=CosineAnnealingLRConfig(num_warmup_steps=10, final_lr_scale=0.1),
        )
    )

    regime: StepRegimeSection = field(
        default_factory=lambda: StepRegimeSection(
            num_steps=100,
            validate_every_n_steps=50,
            checkpoint_every_n_steps=50,
            publish_metrics_every_n_steps=10,
            keep_last_n_checkpoints=1,
            score_metric="nll_loss",
        )
    )

    common: CommonSection = field(
        default_factory=lambda: CommonSection(no_sweep_dir=True)
    )
    """By default the output directory is the one named on the command line;
    ``--sweep-format`` or ``common.no_sweep_dir=false`` ask for fairseq2's
    sub-directory per configuration."""

    @override
    def validate(self) -> ValidationResult:
        result = ValidationResult()

        if isinstance(self.optimizer.config, AdamWConfig):
            _validate_adamw(self.optimizer.config, result)

        lr_config, num_steps = self.lr_scheduler.config, self.regime.num_steps

        if isinstance(lr_config, CosineAnnealingLRConfig) and num_steps is not None:
            num_warmup_steps = lr_config.num_warmup_steps

            if lr_config.cycle_len is None and num_warmup_steps >= num_steps:
                result.add_error(
                    "`lr_scheduler.config.num_warmup_steps` must be less than "
                    f"`regime.num_steps` ({num_steps}), but is {num_warmup_steps} "
                    "instead; the cosine would have no length."
                )

        return result
