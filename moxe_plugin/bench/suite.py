"""What a suite runs, read from its YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moxe_plugin.bench.structure import SuiteError as SuiteError
from moxe_plugin.bench.structure import structure, structure_optional
from moxe_plugin.resources import resource_dir

TaskStage = Literal["pretrained", "finetuned"]


@dataclass(frozen=True, kw_only=True)
class System:
    """One model with its training, a row of the table."""

    name: str
    """Begins the names of run directories."""

    label: str
    """How tables call the system."""

    pretrain: str
    """A preset of ``fairseq2 lm pretrain``."""

    finetune: str | None = None
    """A preset of ``fairseq2 lm instruction_finetune``; ``None`` means none."""

    pretrain_config: Mapping[str, Any] = field(default_factory=dict)
    """Options that go before the preset's, by dotted name."""

    finetune_config: Mapping[str, Any] = field(default_factory=dict)
    """The same for finetuning."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of lm-evaluation-harness; in YAML its name alone will do."""

    task: str
    """Its name: the harness', or one of ``eval_tasks``."""

    stage: TaskStage = "pretrained"
    """Which model of a run to evaluate."""

    file: str | None = None
    """The documents, for a task that can read a file."""

    limit: int | None = None
    """The most documents, from the first on; all if ``None``."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the task's dataset, by name."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text that becomes a tokenizer and token shards in the work directory."""

    train_files: Sequence[str] = ()
    """``.txt``, ``.jsonl`` and ``.parquet`` files to train on."""

    valid_files: Sequence[str] = ()
    """Files that are held out."""

    valid_fraction: float = 0.0
    """The share of training documents to hold out, where there are no files for it."""

    text_column: str = "text"
    """The key or column of the text."""

    hub: str | None = None
    """A dataset of the Hugging Face hub instead of ``train_files``; it is streamed."""

    hub_config: str | None = None
    """Its configuration."""

    max_tokens: int | None = None
    """How many tokens to read, held-out ones included; all if ``None``."""

    tokenizer: str | None = None
    """A directory with a Hugging Face tokenizer; ``None`` trains one."""

    vocab_size: int | None = None
    """The entries of the tokenizer that is trained."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Instructions that are split in the work directory."""

    files: Sequence[str]
    """``.jsonl`` files, with lines as
    :func:`~moxe_plugin.data.instruction_encoding.read_instructions` reads them."""

    valid_fraction: float = 0.05
    """The share of instructions to hold out."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Systems that are trained on the same data and compared."""

    name: str
    """Names the tables."""

    systems: Sequence[System]
    seeds: Sequence[int]
    tasks: Sequence[Task]
    """What to evaluate."""

    data: str
    """What run directories call the data."""

    corpus: Corpus | None = None
    """The text, if token shards are to be built."""

    instructions: Instructions | None = None
    """The instructions, if they are to be split."""

    batch_size: int | str = 16
    """Sequences per batch in evaluation, or ``auto``."""

    pretrain_config: Mapping[str, Any] = field(default_factory=dict)
    """Options for all systems; those of a system go before them."""

    finetune_config: Mapping[str, Any] = field(default_factory=dict)
    """The same for finetuning."""


def load_suite(name_or_file: str) -> Suite:
    """Load a suite.

    :param name_or_file: The name of a file in ``recipes/suites`` without its suffix, or
        the path of a YAML file.

    :returns: The suite.

    :raises SuiteError: There is no such suite, or it is not valid.
    """
    file = Path(name_or_file)

    if file.suffix not in (".yaml", ".yml"):
        suites_dir = resource_dir("recipes") / "suites"

        file = suites_dir / f"{name_or_file}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in suites_dir.glob("*.yaml")))
            raise SuiteError(
                f"`{name_or_file}` is not a known suite. Known suites: {known}. "
                "A file of your own must end in .yaml."
            )

    try:
        text = file.read_text(encoding="utf-8")
    except OSError as ex:
        raise SuiteError(f"'{file}' cannot be read: {ex.strerror}.") from None
    except UnicodeDecodeError as ex:
        raise SuiteError(
            f"'{file}' must be UTF-8, but has a byte at {ex.start} that is not."
        ) from None

    return parse_suite(text, str(file))


def parse_suite(text: str, source: str) -> Suite:
    """Read a suite from YAML.

    :param text: The YAML.
    :param source: What error messages call it.

    :returns: The suite.

    :raises SuiteError: The suite is not valid.
    """
    try:
        # As fairseq2 reads YAML: PyYAML would take `1e-3` for a text.
        content = YAML(typ="safe", pure=True).load(text)
    except YAMLError as ex:
        raise SuiteError(f"{source}: not valid YAML: {ex}") from None

    suite: Suite = structure(Suite, content, source)

    systems = [
        structure(System, system, f"{source}, system {number}")
        for number, system in enumerate(suite.systems, start=1)
    ]

    tasks = [
        structure(
            Task, {"task": task} if isinstance(task, str) else task, f"{source}, tasks"
        )
        for task in suite.tasks
    ]

    for name in (suite.name, suite.data, *(system.name for system in systems)):
        # Directories are called so.
        if Path(name).name != name or name.startswith("."):
            raise SuiteError(
                f"{source}: `name` and `data` must do as part of a file name, but one "
                f"is '{name}'."
            )

    _check_seeds(suite.seeds, source)

    for name, values in (
        ("systems", [system.name for system in systems]),
        ("seeds", suite.seeds),
        ("tasks", [task.task for task in tasks]),
    ):
        if not values and name != "tasks":
            raise SuiteError(f"{source}: `{name}` must not be empty.")

        if len(set(values)) < len(values):
            raise SuiteError(f"{source}: `{name}` must not repeat: {values}.")

    return replace(
        suite,
        systems=systems,
        tasks=tasks,
        corpus=structure_optional(Corpus, suite.corpus, f"{source}, corpus"),
        instructions=structure_optional(
            Instructions, suite.instructions, f"{source}, instructions"
        ),
    )


def _check_seeds(seeds: Sequence[int], source: str) -> None:
    if negative := [seed for seed in seeds if seed < 0]:
        raise SuiteError(
            f"{source}: `seeds` must be greater than or equal to 0, but one is "
            f"{negative[0]}."
        )


def select(
    suite: Suite, systems: Sequence[str] | None, seeds: Sequence[int] | None
) -> Suite:
    """Narrow a suite down.

    :param suite: The suite.
    :param systems: Names of the systems to keep; ``None`` for all.
    :param seeds: Seeds to run instead of the suite's; ``None`` for the suite's.

    :returns: The narrower suite.

    :raises SuiteError: A name is not that of a system.
    """
    if systems is not None:
        known = [system.name for system in suite.systems]

        for name in systems:
            if name not in known:
                raise SuiteError(
                    f"`{name}` is not a system of `{suite.name}`. Known systems: "
                    f"{', '.join(known)}."
                )

        kept = [system for system in suite.systems if system.name in systems]
        suite = replace(suite, systems=kept)

    _check_seeds(seeds or (), "--seeds")

    return suite if seeds is None else replace(suite, seeds=list(dict.fromkeys(seeds)))


_VALID_FRACTION: Final = 0.02
"""The share of a user's text that is held out if the user says nothing."""


def replace_text(
    suite: Suite, text: Sequence[str] | None, valid_text: Sequence[str] | None
) -> Suite:
    """Train on other text than a suite's.

    :param suite: The suite.
    :param text: The files to train on; ``None`` for the suite's.
    :param valid_text: The files to hold out; 2 % of the documents if ``None``.

    :returns: The suite with the text, and its data named after the first file.

    :raises SuiteError: The suite has no ``corpus``, or there is held-out text only.
    """
    if text is None:
        if valid_text is not None:
            raise SuiteError("--valid-text needs --text.")

        return suite

    if suite.corpus is None:
        raise SuiteError(
            f"`{suite.name}` has no `corpus`, so --text cannot replace its text."
        )

    corpus = replace(
        suite.corpus,
        hub=None,
        hub_config=None,
        train_files=list(text),
        valid_files=list(valid_text or ()),
        valid_fraction=_VALID_FRACTION,
    )
    name = re.sub(r"[^a-z0-9]+", "-", Path(text[0]).stem.lower()).strip("-")

    return replace(suite, corpus=corpus, data=name or "text")


def add_options(
    suite: Suite,
    pretrain_config: Mapping[str, Any],
    finetune_config: Mapping[str, Any],
) -> Suite:
    """Add options of all systems, behind those that the suite has.

    :param suite: The suite.
    :param pretrain_config: Options of pretraining, by dotted name.
    :param finetune_config: The same of finetuning.

    :returns: The suite.
    """
    return replace(
        suite,
        pretrain_config={**pretrain_config, **suite.pretrain_config},
        finetune_config={**finetune_config, **suite.finetune_config},
    )
