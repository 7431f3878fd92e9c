"""Checks that configurations which fairseq2 would stumble over are refused."""

from __future__ import annotations

import pytest
from fairseq2.recipe.config import CosineAnnealingLRConfig
from fairseq2.utils.validation import StandardObjectValidator, ValidationError

from moxe_plugin.train.generate import LMGenerateConfig
from moxe_plugin.train.instruction_finetune import LMInstructionFinetuneConfig
from moxe_plugin.train.pretrain import LMPretrainConfig


def _validate(config: object) -> None:
    StandardObjectValidator().validate(config)


def test_default_values_are_valid() -> None:
    _validate(LMPretrainConfig())


@pytest.mark.parametrize("num_warmup_steps", [100, 101])
def test_cosine_without_length_is_refused(num_warmup_steps: int) -> None:
    config = LMPretrainConfig()

    assert isinstance(config.lr_scheduler.config, CosineAnnealingLRConfig)
    config.lr_scheduler.config.num_warmup_steps = num_warmup_steps

    with pytest.raises(ValidationError, match=r"less than `regime.num_steps` \(100\)"):
        _validate(config)


def test_data_epochs_are_refused() -> None:
    config = LMPretrainConfig()
    config.regime.num_data_epochs = 2

    with pytest.raises(ValidationError, match="`num_data_epochs` must be null"):
        _validate(config)


def test_missing_num_steps_is_refused() -> None:
    config = LMPretrainConfig()
    config.regime.num_steps = None

    with pytest.raises(ValidationError, match="`num_steps` must be specified"):
        _validate(config)


def test_empty_batch_is_refused() -> None:
    config = LMPretrainConfig()
    config.dataset.batch_size = 0

    with pytest.raises(ValidationError, match="`dataset` is not valid: `batch_size`"):
        _validate(config)


@pytest.mark.parametrize("config_kls", [LMInstructionFinetuneConfig, LMGenerateConfig])
def test_missing_model_is_refused(config_kls: type[object]) -> None:
    with pytest.raises(ValidationError, match=r"`pretrained\.source` must be"):
        _validate(config_kls())
