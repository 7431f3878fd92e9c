"""Precision, clipping, checkpointing and compilation, in one process and in two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.processes import run_processes
from tests.train.tiny_data import TinyData, pretrain, read_metrics

NUM_STEPS: Final = 2

BASE: Final[Mapping[str, object]] = {
    "dataset.valid_split": None,
    "lr_scheduler.config.num_warmup_steps": 0,
    "regime.num_steps": NUM_STEPS,
    "regime.checkpoint_every_n_steps": None,
}

MODELS: Final[Mapping[str, Mapping[str, object]]] = {
    # To compile a second layer, whose experts have other numbers of tokens, takes most
    # of a minute. That of xLSTM takes no time.
    "moxe": {
        "model.family": "moxe",
        "model.config_overrides": {"pad_idx": 1, "num_layers": 1},
    },
    "xlstm": {"model.family": "xlstm"},
}

CHECKPOINTED: Final[Mapping[str, object]] = {
    "trainer.activation_checkpointing.mode": "layerwise"
}

COMPILED: Final[Mapping[str, object]] = {
    "model.compile": True,
    "model.compile_options.backend": "eager",
}

STATIC: Final[Mapping[str, object]] = {"trainer.mixed_precision.mode": "static"}

AUTO: Final[Mapping[str, object]] = {"trainer.mixed_precision.mode": "auto"}

DDP: Final[Mapping[str, object]] = {"trainer.data_parallelism": "ddp"}

FSDP: Final[Mapping[str, object]] = {"trainer.data_parallelism": "fsdp"}


@pytest.fixture(scope="module", params=list(MODELS))
def family(request: pytest.FixtureRequest) -> str:
    """Name a family.

    :param request: Has the name.

    :returns: The name.
    """
    name = request.param
    assert isinstance(name, str)

    return name


@pytest.fixture(scope="module")
def plain_loss(
    family: str, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Train in float32 without any option.

    :param family: The family of the model.
    :param tiny_data: The data.
    :param tmp_path_factory: Makes the directory.

    :returns: The loss of each step.
    """
    output_dir = tmp_path_factory.mktemp("plain")

    pretrain(tiny_data, output_dir, {**BASE, **MODELS[family]})

    return _read(output_dir, "NLL Loss")


def _read(output_dir: Path, name: str) -> list[float]:
    return [m[name] for m in read_metrics(output_dir, "train")]


@pytest.mark.parametrize(
    "options",
    [CHECKPOINTED, COMPILED, {**CHECKPOINTED, **COMPILED}],
    ids=["checkpointed", "compiled", "both"],
)
def test_losses_do_not_depend_on_how_layers_run(
    family: str,
    plain_loss: list[float],
    tiny_data: TinyData,
    tmp_path: Path,
    options: Mapping[str, object],
) -> None:
    pretrain(tiny_data, tmp_path, {**BASE, **MODELS[family], **options})

    # The gradients of a step are in the losses of the next.
    assert _read(tmp_path, "NLL Loss") == pytest.approx(plain_loss, rel=1e-6)


@pytest.mark.parametrize("options", [STATIC, AUTO], ids=["static", "auto"])
def test_mixed_precision_has_nearly_the_losses_of_float32(
    family: str,
    plain_loss: list[float],
    tiny_data: TinyData,
    tmp_path: Path,
    options: Mapping[str, object],
) -> None:
    pretrain(tiny_data, tmp_path, {**BASE, **MODELS[family], **options})

    losses = _read(tmp_path, "NLL Loss")

    # bf16 has 8 bits.
    assert losses == pytest.approx(plain_loss, rel=1e-2)
    assert losses != pytest.approx(plain_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "rel"),
    [
        ({**FSDP, **STATIC, **CHECKPOINTED}, 1e-2),
        ({**DDP, **AUTO}, 1e-2),
        ({**DDP, **COMPILED, **CHECKPOINTED}, 1e-5),
    ],
    ids=["fsdp_static_checkpointed", "ddp_auto", "ddp_compiled_checkpointed"],
)
def test_two_processes_have_the_losses_of_one_with_options(
    family: str,
    plain_loss: list[float],
    tiny_data: TinyData,
    tmp_path: Path,
    options: Mapping[str, object],
    rel: float,
) -> None:
    overrides = {**BASE, **MODELS[family], "dataset.batch_size": 2, **options}

    if family == "moxe":
        overrides["balance_over"] = "global"

    run_processes(2, pretrain, tiny_data, tmp_path, overrides)

    assert _read(tmp_path, "NLL Loss") == pytest.approx(plain_loss, rel=rel)


def test_gradients_are_clipped_by_the_norm_of_all_shards(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    options = {**BASE, "trainer.max_grad_norm": 0.1, "balance_over": "global"}

    pretrain(tiny_data, tmp_path / "one", options)

    for mode, data_parallelism in (("ddp", DDP), ("fsdp", FSDP)):
        overrides = {**options, "dataset.batch_size": 2, **data_parallelism}

        run_processes(2, pretrain, tiny_data, tmp_path / mode, overrides)

        for name in ("Gradient Norm", "NLL Loss"):
            expected = _read(tmp_path / "one", name)

            assert _read(tmp_path / mode, name) == pytest.approx(expected, rel=1e-5)

    # As measured before clipping
    assert min(_read(tmp_path / "one", "Gradient Norm")) > 0.1
