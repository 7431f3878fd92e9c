"""Reads and writes the directories of run records, and checks what it reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, get_args

from moxe_plugin.report.files import (
    DamagedRecordError,
    read_json,
    read_jsonl,
    write_json,
)
from moxe_plugin.report.items import read_items, write_items
from moxe_plugin.report.records import (
    SCHEMA_VERSION,
    Code,
    DamagedRun,
    Data,
    Environment,
    Hardware,
    ModelInfo,
    RunKind,
    RunRecord,
)

ENVIRONMENT_FILE: Final = "environment.json"

_NO_RUNS: Final = ("claims", "routing", "speed", "tables", "work")
"""Directories of results that hold no run."""


def read_run(run_dir: Path) -> RunRecord:
    """Read and check one run directory.

    :param run_dir: The directory of the run.

    :returns: The record.

    :raises DamagedRecordError: A file is missing, truncated, of another schema version,
        or holds a value that is no finite number.
    """
    environment = _read_environment(run_dir / ENVIRONMENT_FILE)
    evals = {
        path.stem.removeprefix("eval_"): read_json(path)
        for path in sorted(run_dir.glob("eval_*.json"))
    }

    items = {
        path.stem.removeprefix("items_"): read_items(path)
        for path in sorted(run_dir.glob("items_*.csv"))
    }

    if environment.kind == "guess":
        return RunRecord(
            name=run_dir.name,
            environment=environment,
            model=None,
            evals=evals,
            items=items,
        )

    model_file = run_dir / "model.json"

    return RunRecord(
        name=run_dir.name,
        environment=environment,
        model=_structure(ModelInfo, _read_versioned(model_file), model_file),
        train=read_jsonl(run_dir / "train.jsonl"),
        valid=read_jsonl(run_dir / "valid.jsonl"),
        evals=evals,
        items=items,
    )


def read_runs(run_dirs: Sequence[Path]) -> tuple[list[RunRecord], list[DamagedRun]]:
    """Read several run directories, keeping the damaged ones apart.

    :param run_dirs: The directories.

    :returns: The records and the damaged runs, both sorted by name.
    """
    records, damaged = [], []

    for run_dir in sorted(run_dirs, key=lambda path: path.name):
        try:
            records.append(read_run(run_dir))
        except DamagedRecordError as ex:
            damaged.append(DamagedRun(name=run_dir.name, reason=str(ex)))

    return records, damaged


def find_run_dirs(results_dir: Path) -> list[Path]:
    """List the run directories of a results directory.

    Every directory counts, except for hidden ones and those that other commands write,
    so that a run without a readable ``environment.json`` is reported and not
    overlooked.

    :param results_dir: The directory that holds the runs.

    :returns: The directories, sorted by name.
    """
    return sorted(
        path
        for path in results_dir.iterdir()
        if path.is_dir() and path.name not in _NO_RUNS and not path.name.startswith(".")
    )


def write_run(results_dir: Path, record: RunRecord, config_yaml: str | None) -> Path:
    """Write a run directory, at once: a kill leaves the whole of it or nothing.

    A directory of this name that is there already is replaced.

    :param results_dir: The directory that holds the runs.
    :param record: The run.
    :param config_yaml: The content of ``config.yaml``; ``None`` for a guess.

    :returns: The run's directory.
    """
    # Hidden, so that nobody takes for a run what a kill leaves.
    part_dir = results_dir / f".{record.name}.part"
    shutil.rmtree(part_dir, ignore_errors=True)
    part_dir.mkdir(parents=True)

    _write_files(part_dir, record, config_yaml)

    run_dir = results_dir / record.name
    old_dir = results_dir / f".{record.name}.old"
    shutil.rmtree(old_dir, ignore_errors=True)

    # A directory that is removed where it stands would lack some files for a while, and
    # a kill would make that last.
    if run_dir.exists():
        run_dir.rename(old_dir)
    part_dir.rename(run_dir)
    shutil.rmtree(old_dir, ignore_errors=True)

    return run_dir


def _write_files(run_dir: Path, record: RunRecord, config_yaml: str | None) -> None:
    if config_yaml is not None:
        (run_dir / "config.yaml").write_text(config_yaml, encoding="utf-8")

    if record.model is not None:
        write_json(run_dir / "model.json", asdict(record.model))

        for name, lines in (("train", record.train), ("valid", record.valid)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (run_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")

    for key, content in record.evals.items():
        write_json(run_dir / f"eval_{key}.json", content)

    for task, items in record.items.items():
        write_items(run_dir / f"items_{task}.csv", items)

    write_json(run_dir / ENVIRONMENT_FILE, asdict(record.environment))


def _read_environment(file: Path) -> Environment:
    content = _read_versioned(file)

    for key, kls in (("hardware", Hardware), ("code", Code), ("data", Data)):
        if not isinstance(content.get(key), dict):
            raise DamagedRecordError(f"{file.name}: `{key}` is missing.")

        content[key] = _structure(kls, content[key], file)

    environment: Environment = _structure(Environment, content, file)

    return environment


def _read_versioned(file: Path) -> dict[str, Any]:
    content = read_json(file)

    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DamagedRecordError(
            f"{file.name}: `schema_version` must be {SCHEMA_VERSION}, but is "
            f"{version} instead."
        )

    return content


def _structure(kls: type[Any], content: Mapping[str, Any], file: Path) -> Any:
    known = {f.name: str(f.type) for f in fields(kls)}

    missing = [name for name in known if name not in content]
    if missing:
        raise DamagedRecordError(f"{file.name}: `{missing[0]}` is missing.")

    unknown = sorted(content.keys() - known.keys())
    if unknown:
        raise DamagedRecordError(f"{file.name}: `{unknown[0]}` is not known.")

    for name, value in content.items():
        if not _TYPE_CHECKS[known[name]](value):
            raise DamagedRecordError(
                f"{file.name}: `{name}` must be of type `{known[name]}`, but is "
                f"{value!r} instead."
            )

    return kls(**content)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_mapping_of(check: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, dict) and all(check(v) for v in value.values())


# Keys are annotations of the record classes, which are text at run time.
_TYPE_CHECKS: Final[Mapping[str, Callable[[object], bool]]] = {
    "str": _is_text,
    "int": _is_int,
    "str | None": lambda v: v is None or _is_text(v),
    "int | None": lambda v: v is None or _is_int(v),
    "float | None": lambda v: v is None or _is_float(v),
    "bool | None": lambda v: v is None or isinstance(v, bool),
    "RunKind": lambda v: v in get_args(RunKind),
    "Mapping[str, str]": lambda v: _is_mapping_of(_is_text, v),
    "Mapping[str, float]": lambda v: _is_mapping_of(_is_float, v),
    "Hardware": lambda v: isinstance(v, Hardware),
    "Code": lambda v: isinstance(v, Code),
    "Data": lambda v: isinstance(v, Data),
}
