"""The command ``moxe systems`` and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from moxe_plugin.models.flops import forward_flops_per_token
from moxe_plugin.systems import catalogue
from moxe_plugin.systems.__main__ import main
from moxe_plugin.systems.catalogue import SIZES, System, list_systems
from moxe_plugin.systems.measuring import SystemCost, measure_system
from moxe_plugin.systems.table import write_systems_table
from tests.models.families import create_model, get_arch

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


@pytest.mark.parametrize("size", SIZES)
def test_every_system_is_a_registered_architecture(size: str) -> None:
    for system in list_systems(size):
        config = get_arch(system.family, system.arch)

        if system.family == "moxe" and config.experts == "xlstm":
            assert config.expert_state == system.expert_state
        else:
            assert system.expert_state is None


def test_systems_are_the_nine_of_the_paper_and_gamma_0() -> None:
    systems = list_systems("340m")

    assert len({s.label for s in systems}) == 10
    assert {s.paper_parameters for s in systems} == {
        None,
        *("340M", "338M", "356M", "350M"),
    }
    assert len({(s.family, s.arch) for s in systems}) == len(systems)


def test_a_system_is_measured() -> None:
    cost = measure_system(System("MoxE", "moxe", "tiny_token", "token"), 64)

    model = create_model("moxe", "tiny_token")
    num_parameters = sum(p.numel() for p in model.parameters())

    assert cost.num_parameters == num_parameters
    assert cost.num_active_parameters == num_parameters - model.num_idle_parameters()
    # 2 layers: see test_effective.py.
    assert cost.num_effective_parameters == num_parameters - 15_560
    assert cost.flops_per_token == forward_flops_per_token(
        get_arch("moxe", "tiny_token"), 64
    )


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="'moxe' has no 'huge'"):
        measure_system(System("MoxE", "moxe", "huge"), 64)


def test_table_shows_every_number_and_a_dash_for_none(tmp_path: Path) -> None:
    costs = [
        SystemCost(
            System("MoxE", "moxe", "340m_token", "token", "340M"),
            *(1_000_000, 500_000, 925_000, 294_060_000),
        ),
        SystemCost(System("Gemma 2", "gemma2", "quickstart"), 4_000, 4_000, 4_000, 9),
    ]

    files = write_systems_table(
        costs, size="340m", context_len=128, tables_dir=tmp_path
    )

    assert [f.name for f in files] == ["systems_340m.md", "systems_340m.csv"]

    lines = files[0].read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| MoxE") or line.startswith("| Gemma")
    ]
    numbers = ["1,000,000", "500,000", "925,000", "75,000 (7.50%)", "294.1"]
    others = [*["4,000"] * 3, "0 (0.00%)", "0.0"]
    assert rows == [
        ["MoxE", "`moxe` `340m_token`", "token", *numbers, "340M"],
        ["Gemma 2", "`gemma2` `quickstart`", "—", *others, "—"],
    ]
    assert "context of\n  128 tokens" in "\n".join(lines)

    frame = pd.read_csv(files[1])
    assert list(frame["flops_per_token"]) == [294_060_000, 9]
    assert list(frame["num_effective_parameters"]) == [925_000, 4_000]
    assert list(frame["context_len"]) == [128, 128]


def test_command_writes_every_system_listed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # All of them would take a while.
    systems = [s for s in list_systems("tiny") if s.arch in ("tiny_mlstm", "tiny")]
    monkeypatch.setattr(catalogue, "list_systems", lambda _: systems)

    out = tmp_path / "tables"
    argv = ["--size", "tiny", "--context-len", "32", "--out", str(out)]

    assert main(argv) == 0

    frame = pd.read_csv(out / "systems_tiny.csv")

    assert list(frame["label"]) == [s.label for s in systems]
    # One bias does not train, and the transformers have none such.
    assert list(frame["num_parameters"] - frame["num_effective_parameters"]) == [
        *(192, 0, 32, 0, 0)
    ]
    assert "Written: systems_tiny.md, systems_tiny.csv" in capsys.readouterr().out

    # The same seeds give the same page.
    page = (out / "systems_tiny.md").read_bytes()
    assert main([*argv, "--json"]) == 0
    assert (out / "systems_tiny.md").read_bytes() == page

    document = json.loads(capsys.readouterr().out)

    assert [s["label"] for s in document["systems"]] == list(frame["label"])
    assert [s["num_parameters"] for s in document["systems"]] == list(
        frame["num_parameters"]
    )
    assert document["files"] == [str(out / f"systems_tiny.{s}") for s in ("md", "csv")]


def test_unknown_size_is_a_mistake_of_the_user(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--size", "7b"]) == 2
    assert "340m, small, quickstart, tiny" in capsys.readouterr().err


def test_context_without_a_token_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--context-len", "0"])

    assert "must be an integer of at least 1, but is '0'" in capsys.readouterr().err
