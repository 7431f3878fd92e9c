"""Suites as YAML."""

from __future__ import annotations

import pytest
import yaml

from moxe_plugin.bench.suite import SuiteError, load_suite, parse_suite, select
from moxe_plugin.resources import resource_dir

_TEXT = """
name: mine
data: embedded
seeds: [2, 3]
systems:
  - {name: moxe, label: MoxE, pretrain: quickstart/moxe, finetune: instruct/quickstart}
  - {name: xlstm, label: xLSTM, pretrain: quickstart/xlstm}
tasks: [some_task]
pretrain_config: {regime.num_steps: 10}
"""


def test_suite_is_read() -> None:
    suite = parse_suite(_TEXT, "mine.yaml")

    assert [system.name for system in suite.systems] == ["moxe", "xlstm"]
    assert suite.systems[1].finetune is None
    assert suite.systems[0].pretrain_config == {}
    assert suite.pretrain_config == {"regime.num_steps": 10}


def _change(**changes: object) -> str:
    return yaml.safe_dump({**yaml.safe_load(_TEXT), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "mine.yaml: must be a mapping"),
        ("a: [", "mine.yaml: not valid YAML"),
        (_change(mood=1), "`mood` is not a known key. Known keys: name, systems"),
        (_change(seeds="2"), r"`seeds` must be of type `Sequence\[int\]`"),
        (_change(seeds=[]), "`seeds` must not be empty"),
        (_change(seeds=[2, 2]), "`seeds` must not repeat"),
        (_change(systems=[]), "`systems` must not be empty"),
        (
            _change(systems=[{"name": "moxe"}]),
            "system 1: missing keys: `label`, `pretrain`",
        ),
        (_change(systems=[{"nam": "moxe"}]), "system 1: `nam` is not a known key"),
        ("name: mine", "missing keys: `systems`, `seeds`"),
    ],
)
def test_wrong_suite_is_refused(text: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        parse_suite(text, "mine.yaml")


def test_unknown_suite_lists_known_ones() -> None:
    with pytest.raises(SuiteError, match=r"Known suites: .*quickstart.*smoke"):
        load_suite("quikstart")


def test_missing_file_is_named() -> None:
    with pytest.raises(SuiteError, match=r"'nowhere\.yaml' cannot be read"):
        load_suite("nowhere.yaml")


def test_selection_keeps_the_order_of_the_suite() -> None:
    suite = select(parse_suite(_TEXT, "mine.yaml"), ["xlstm", "moxe"], [7, 7])

    assert [system.name for system in suite.systems] == ["moxe", "xlstm"]
    assert suite.seeds == [7]


def test_unknown_system_lists_known_ones() -> None:
    with pytest.raises(SuiteError, match="Known systems: moxe, xlstm"):
        select(parse_suite(_TEXT, "mine.yaml"), ["gpt"], None)


@pytest.mark.parametrize(
    "name", sorted(f.stem for f in (resource_dir("recipes") / "suites").glob("*.yaml"))
)
def test_suite_of_the_package_is_valid(name: str) -> None:
    suite = load_suite(name)

    assert suite.name == name

    presets = [s.pretrain for s in suite.systems]
    presets += [s.finetune for s in suite.systems if s.finetune is not None]
    for preset in presets:
        assert (resource_dir("recipes") / f"{preset}.yaml").is_file()
