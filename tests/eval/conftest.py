"""Fixtures of the evaluation tests: random models over bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moxe_plugin.eval.checkpoints import LoadedModel
from tests.common import ByteTokenizer
from tests.models.families import create_model

Load = Callable[[str], LoadedModel]


@pytest.fixture(scope="session")
def load(
    fairseq2_setup: None,  # noqa: ARG001  # fixtures cannot use `usefixtures`
    device: torch.device,
) -> Load:
    """Return a function that makes a tiny random model of a family, once."""
    models: dict[str, LoadedModel] = {}

    def load(family: str) -> LoadedModel:
        if family not in models:
            models[family] = _create(family, device)

        return models[family]

    return load


@pytest.fixture
def loaded(load: Load) -> LoadedModel:
    """Return a tiny random xLSTM."""
    return load("xlstm")


def _create(family: str, device: torch.device) -> LoadedModel:
    torch.manual_seed(2)
    model = create_model(family, dtype=torch.float32).to(device)

    # Sharper predictions than a fresh model's, so that an error shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)

    model.eval()

    return LoadedModel(model, ByteTokenizer(), family, None, {})
