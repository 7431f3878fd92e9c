"""Files of measured runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moxe_plugin.claims.measurements import read_measurements, write_measurement
from moxe_plugin.report.files import DamagedRecordError
from tests.claims.synthetic import make_run


def test_files_keep_seven_digits(tmp_path: Path) -> None:
    run = replace(make_run(), documents={"nll": [1 / 3, 2.0], "num_tokens": [1, 2]})

    write_measurement(tmp_path, run)
    (read,) = read_measurements(tmp_path)

    assert read.documents == {"nll": [0.3333333, 2.0], "num_tokens": [1, 2]}
    assert replace(read, documents={}, layers=[], passages=None) == replace(
        run, documents={}, layers=[], passages=None
    )


def test_runs_are_sorted_by_system_and_seed(tmp_path: Path) -> None:
    for system, seed in (("xlstm", 1), ("moxe", 10), ("moxe", 2)):
        write_measurement(tmp_path, make_run(system, seed))

    runs = [(run.system, run.seed) for run in read_measurements(tmp_path)]

    assert runs == [("moxe", 2), ("moxe", 10), ("xlstm", 1)]


def test_runs_on_other_texts_do_not_compare(tmp_path: Path) -> None:
    other = make_run(seed=2)
    setting = {**other.setting, "text_sha256": "9" * 64}

    write_measurement(tmp_path, make_run(seed=1))
    write_measurement(tmp_path, replace(other, setting=setting))

    with pytest.raises(
        ValueError, match=r"moxe_s2.json.*do not compare: `text_sha256`"
    ):
        read_measurements(tmp_path)


def test_one_name_means_one_model(tmp_path: Path) -> None:
    other = make_run(seed=2)

    write_measurement(tmp_path, make_run(seed=1))
    write_measurement(
        tmp_path, replace(other, model={**other.model, "num_parameters": 5})
    )

    with pytest.raises(ValueError, match="different models under one name"):
        read_measurements(tmp_path)


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no measured run"):
        read_measurements(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 0}, "`schema_version` must be 1, but is 0"),
        ({"new": 0}, "`new` is missing or not known"),
    ],
)
def test_a_file_of_another_schema_is_an_error(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    file = write_measurement(tmp_path, make_run())
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))

    with pytest.raises(DamagedRecordError, match=message):
        read_measurements(tmp_path)
