"""Run records: what one training run leaves behind in ``results/``.

A run is one directory (CONTRIBUTING, section 8)::

    results/<system>_<data>_<hardware>_<yyyymmdd>_s<seed>/
      config.yaml        every stage's configuration, as resolved
      environment.json   who, where, with what; times, memory, token counts
      model.json         family, architecture, parameters
      train.jsonl        training metrics; fairseq2's keys and "Stage"
      valid.jsonl        validation metrics; fairseq2's keys, "Stage" and "Split"
      eval_*.json        lm-eval's result dictionaries and our own losses
      items_*.csv        each task's values by document: :mod:`moxe_plugin.report.items`

A *guess* (uniform, unigram, bigram) is a run without training: it has
``environment.json``, ``eval_*.json`` and ``items_*.csv`` only. A directory that breaks
the schema is never repaired or skipped silently: see
:mod:`moxe_plugin.report.run_dirs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from moxe_plugin.report.items import TaskItems

SCHEMA_VERSION: Final = 1
"""The version of the record format; readers refuse any other."""

RunKind = Literal["trained", "guess"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machine that a run ran on."""

    name: str
    """Short name used in the run's directory name, for example ``cpu2``."""

    device: str
    """``cpu`` or ``cuda``."""

    model: str
    """The processor's or the accelerator's own name."""

    num_threads: int
    """Threads of one operation."""

    num_jobs: int
    """How many runs shared the machine, this one included."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """The code that made a run."""

    version: str
    """The version of the installed package."""

    commit: str | None
    """The git commit, if the package is a git checkout."""

    dirty: bool | None
    """Whether that checkout had uncommitted changes."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data that a run saw; runs are compared only if these are equal."""

    name: str
    tokenizer_sha256: str
    vocab_size: int
    train_sha256: str
    """Hash of the training tokens."""

    valid_sha256: str
    """Hash of the held-out tokens of the validation loss."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The content of ``environment.json``."""

    schema_version: int = SCHEMA_VERSION
    kind: RunKind = "trained"
    suite: str
    system: str
    """The name of the system in its suite."""

    label: str
    """How tables call the system."""

    seed: int | None
    config_sha256: str
    """Hash of the data and of the configuration of every stage."""

    recipe_sha256: str
    """The same without the seed: runs that share it differ in the seed only."""

    hardware: Hardware
    code: Code
    versions: Mapping[str, str]
    """Versions of Python and of the packages that produce the numbers."""

    data: Data
    training_tokens: int | None
    finetuning_tokens: int | None
    throughput_tokens_per_s: float | None
    """Training tokens over the time of training steps: data and compute, without
    validation, checkpoints and start-up."""

    peak_memory_gib: float | None
    """Peak memory of training: resident memory of the process, libraries included, on
    ``cpu``; memory held by tensors on ``cuda``."""

    wall_s: Mapping[str, float]
    """Seconds by stage, start-up included."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The content of ``model.json``."""

    schema_version: int = SCHEMA_VERSION
    family: str
    arch: str
    num_parameters: int
    num_active_parameters: int
    """Parameters that one token uses: all of them without the input embedding (unless
    it is also the output projection) and without the experts that are not chosen."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, as read from its directory."""

    name: str
    """The directory's name."""

    environment: Environment
    model: ModelInfo | None
    """``None`` for a guess."""

    train: Sequence[Mapping[str, Any]] = field(default=())
    valid: Sequence[Mapping[str, Any]] = field(default=())
    evals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Content of each ``eval_<key>.json`` by key."""

    items: Mapping[str, TaskItems] = field(default_factory=dict)
    """Content of each ``items_<task>.csv`` by task; runs of earlier versions have
    none."""


@dataclass(frozen=True, kw_only=True)
class DamagedRun:
    """A directory that could not be read, and why."""

    name: str
    reason: str
