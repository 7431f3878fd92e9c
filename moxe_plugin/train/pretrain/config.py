"""The configuration of ``lm pretrain``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fairseq2.recipe.config import ModelSection

from moxe_plugin.data.tokens import MOXE_TOKENS_FAMILY
from moxe_plugin.train.config import TrainConfig
from moxe_plugin.train.dataset_section import LMDatasetSection


@dataclass(kw_only=True)
class TokensDatasetSection(LMDatasetSection):
    """Which token windows to train and validate on."""

    path_family: ClassVar[str] = MOXE_TOKENS_FAMILY

    name: str | None = "moxe_embedded"


@dataclass(kw_only=True)
class LMPretrainConfig(TrainConfig):
    """The configuration of the recipe ``lm pretrain``."""

    model: ModelSection = field(
        default_factory=lambda: ModelSection(family="moxe", arch="quickstart")
    )
    """The model: ``family`` and ``arch`` of a new one, or the ``name`` of an asset."""

    dataset: TokensDatasetSection = field(default_factory=TokensDatasetSection)
    """The data: a ``path`` made by ``moxe data build``, or the ``name`` of an asset."""
