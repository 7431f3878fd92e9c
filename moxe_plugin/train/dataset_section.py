"""The configuration of the data that a training recipe reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fairseq2.recipe.config import DatasetSection, SupportsStructure
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.utils.validation import ValidationResult
from typing_extensions import override


@dataclass(kw_only=True)
class LMDatasetSection(DatasetSection, SupportsStructure):
    """Which sequences to train and validate on."""

    path_family: ClassVar[str]
    """The dataset family that opens :attr:`path`."""

    path: Path | None = None
    """A directory that the family opens; goes before ``name``."""

    train_split: str = "train"
    """The split to train on."""

    valid_split: str | None = "valid"
    """The split to validate on; ``None`` means no validation."""

    seq_len: int = 256
    """The maximum number of tokens of a sequence that the model sees."""

    batch_size: int = 32
    """The number of sequences that a process reads at a time."""

    max_num_valid_batches: int | None = None
    """The number of batches, per process, after which a validation ends; ``None``
    means the whole split."""

    @override
    def structure(self, resolver: DependencyResolver) -> None:
        if self.path is not None:
            self.name = None
            self.family = self.path_family
            self.config_overrides = {"path": str(self.path.absolute())}

    @override
    def validate(self) -> ValidationResult:
        result = super().validate()

        for name in ("seq_len", "batch_size", "max_num_valid_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                result.add_error(
                    f"`{name}` must be greater than or equal to 1, but is {value} "
                    "instead."
                )

        return result
