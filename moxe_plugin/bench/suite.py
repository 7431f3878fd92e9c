"""What a suite runs, read from its YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moxe_plugin.resources import resource_dir


class SuiteError(ValueError):
    """Raised when a suite cannot be run as asked; the message is for the user."""


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

    pretrain_config: Mapping[str, Any]
    """Options that go before the preset's, by dotted name."""

    finetune_config: Mapping[str, Any]
    """The same for finetuning."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Systems that are trained on the same data and compared."""

    name: str
    """Names the tables."""

    systems: Sequence[System]
    seeds: Sequence[int]
    tasks: Sequence[str]
    """Tasks of lm-evaluation-harness for the pretrained models."""

    data: str
    """What run directories call the data."""

    batch_size: int = 16
    """Sequences per batch in evaluation."""

    pretrain_config: Mapping[str, Any]
    """Options for all systems; those of a system go before them."""

    finetune_config: Mapping[str, Any]
    """The same for finetuning."""


_DEFAULTS: Final[Mapping[str, Any]] = {"pretrain_config": {}, "finetune_config": {}}


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

    suite: Suite = _structure(Suite, content, source)

    systems = [
        _structure(System, system, f"{source}, system {number}")
        for number, system in enumerate(suite.systems, start=1)
    ]

    for name, values in (
        ("systems", [system.name for system in systems]),
        ("seeds", suite.seeds),
    ):
        if not values:
            raise SuiteError(f"{source}: `{name}` must not be empty.")

        if len(set(values)) < len(values):
            raise SuiteError(f"{source}: `{name}` must not repeat: {values}.")

    return replace(suite, systems=systems)


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

    return suite if seeds is None else replace(suite, seeds=list(dict.fromkeys(seeds)))


def _structure(kls: type[Any], content: object, source: str) -> Any:
    if not isinstance(content, dict):
        raise SuiteError(f"{source}: must be a mapping, but is {content!r} instead.")

    content = {**_DEFAULTS, **content}

    known = {field.name: str(field.type) for field in fields(kls)}

    for name, value in content.items():
        if name not in known:
            raise SuiteError(
                f"{source}: `{name}` is not a known key. Known keys: "
                f"{', '.join(known)}."
            )

        if not _fits(value, known[name]):
            raise SuiteError(
                f"{source}: `{name}` must be of type `{known[name]}`, but is "
                f"{value!r} instead."
            )

    try:
        return kls(**content)
    except TypeError as ex:
        raise SuiteError(f"{source}: {_describe_missing(kls, content)}.") from ex


def _fits(value: object, annotation: str) -> bool:
    match annotation:
        case "str":
            return isinstance(value, str)
        case "str | None":
            return value is None or isinstance(value, str)
        case "int":
            return isinstance(value, int)
        case "Sequence[int]":
            return isinstance(value, list) and all(isinstance(v, int) for v in value)
        case "Sequence[str]":
            return isinstance(value, list) and all(isinstance(v, str) for v in value)
        case "Mapping[str, Any]":
            return isinstance(value, dict)
        case _:
            return isinstance(value, list)


def _describe_missing(kls: type[Any], content: Mapping[str, Any]) -> str:
    missing = [f"`{f.name}`" for f in fields(kls) if f.name not in content]

    return f"missing keys among {', '.join(missing)}"
