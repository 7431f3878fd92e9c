"""The command ``moxe speed`` and its files."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from moxe_plugin.cli import moxe_main
from moxe_plugin.nn.native.library import NativeLibraryError
from moxe_plugin.report.files import read_json
from moxe_plugin.speed.records import SpeedRow, pool_rows
from moxe_plugin.speed.suites import SUITES
from moxe_plugin.speed.table import write_speed_table

_RECORDS = Path(__file__).parents[2] / "results" / "speed"

_QUICK = "--matmul-size 16 --copy-mib 1"

_MACHINE: dict[str, Any] = {
    "model": "A processor",
    "num_threads": 2,
    "num_cores": 4,
    "matmul_size": 2048,
    "matmul_gflop_per_s": {"float32": 98.7},
    "versions": {"torch": "2.9.1"},
}


def _row(family: str, tokens_per_s: float | None, **kwargs: Any) -> SpeedRow:
    values: dict[str, Any] = {
        **{"suite": "table1", "arch": "340m", "overrides": {}, "phase": "train"},
        **{"batch": 4, "length": 256, "optimizer": False, "device": "cpu"},
        **{"dtype": "float32", "repeats": 2, "warm_up": 1, "seed": 1},
        **kwargs,
    }

    return SpeedRow(family=family, tokens_per_s=tokens_per_s, **values)


def _cells(page: str, family: str) -> list[str]:
    (line,) = (x for x in page.splitlines() if x.startswith(f"| `{family}`"))

    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_shows_every_number_and_a_dash_for_none(tmp_path: Path) -> None:
    measured = _row(
        "moxe",
        1500.0,
        **{"seconds": 2.0, "seconds_all": [1.5, 2.5], "useful_gflop": 1234.56},
        **{"busiest_expert_share": 0.256, "router_skew": 1.5},
        **{"least_memory_seconds": 0.0567, "new_gradient_seconds": 0.678},
        **{"peak_fraction": 0.4567, "peak_memory_gib": 3.456, "state_bytes": 3 * 2**20},
        **{"optimizer": True, "overrides": {"num_experts": 16}},
        checkpoint_layers=True,
    )
    page = tmp_path / "tables" / "cpu.md"

    machine = {**_MACHINE, "allocator": {"MALLOC_ARENA_MAX": "1"}}
    machine["freed_memory"] = "returned"
    write_speed_table(page, machine, [measured, _row("gemma2", None)])

    text = page.read_text(encoding="utf-8")

    assert _cells(text, "moxe") == [
        *(
            "`moxe` `340m` `num_experts=16` `router_skew=1.5`",
            "train + AdamW (checkpointed)",
        ),
        *("float32", "4", "256"),
        *("1,500.0", "2", "1.5 – 2.5", "1,234.6", "45.7%"),  # noqa: RUF001  # a range
        *("0.0567", "0.678", "25.6%", "3.46", "3.00", "1.00"),
    ]
    assert _cells(text, "gemma2")[5:] == ["—"] * 11
    assert "99 GFLOP/s in float32 (torch 99)" in text
    assert "from `cpu.json`" in text
    assert (
        "The environment set `MALLOC_ARENA_MAX=1`.\nFreed memory of the CPU went"
        in text
    )


def test_table_names_the_libraries_and_the_speed_of_memory(tmp_path: Path) -> None:
    machine = {
        **_MACHINE,
        "matmul_by_library": {"float32": {"onednn": 98.7, "torch": 43.2}},
        **{"copy_gb_per_s": 12.34, "new_memory_gb_per_s": 1.26},
    }
    write_speed_table(tmp_path / "a.md", machine, [_row("moxe", 1.0)])

    text = (tmp_path / "a.md").read_text(encoding="utf-8")

    assert "99 GFLOP/s in float32 (onednn 99, torch 43)" in text
    assert "Copies read and write 12.3 GB/s; new memory is filled at 1.3 GB/s." in text


@pytest.mark.parametrize(
    ("reason", "expected"),
    [(None, "by our own products, "), ("it rains", "by torch's products: it rains.")],
    ids=["ours", "torch"],
)
def test_table_tells_whose_products_our_models_use(
    reason: str | None, expected: str, tmp_path: Path
) -> None:
    machine = {**_MACHINE, "why_torch_products": reason}
    write_speed_table(tmp_path / "a.md", machine, [_row("moxe", 1.0)])

    text = (tmp_path / "a.md").read_text(encoding="utf-8")

    assert expected in text


@pytest.mark.parametrize(
    "file",
    [f for f in sorted(_RECORDS.glob("*.json")) if f.name.split("_")[0] in SUITES],
    ids=lambda file: file.stem,
)
def test_every_record_can_be_printed(file: Path, tmp_path: Path) -> None:
    record = read_json(file)
    rows = [SpeedRow(**row) for row in record["rows"]]

    write_speed_table(tmp_path / "a.md", record["machine"], rows)

    text = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert [f"{row.tokens_per_s:,.1f}" for row in rows] == [
        line.split("|")[6].strip() for line in text.splitlines() if "| `" in line
    ]


def test_command_writes_rows_of_all_suites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "speed --suite table1 decode --size tiny --length 8 --batch 1 --repeats 2"
    options = f"{_QUICK} --decode-tokens 2 --name a.b --out {tmp_path / 'out'}"

    assert moxe_main([*argv.split(), *options.split()]) == 0

    content = read_json(tmp_path / "out" / "a.b.json")
    rows = content["rows"]

    assert content.keys() == {"machine", "rows"}
    assert [r["suite"] for r in rows] == ["table1"] * 8 + ["decode"] * 2
    assert all(r.keys() == {f.name for f in fields(SpeedRow)} for r in rows)
    assert all(r["tokens_per_s"] > 0 for r in rows)

    page = (tmp_path / "out" / "a.b.md").read_text(encoding="utf-8")

    assert page.count("\n| `") == len(rows)
    assert "Written: a.b.json, a.b.md" in capsys.readouterr().out


def test_rounds_measure_all_systems_by_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "speed --suite decode --size tiny --length 8 --batch 1 --repeats 2"
    options = f"{_QUICK} --rounds 3 --decode-tokens 2 --name a --out {tmp_path}"

    assert moxe_main([*argv.split(), *options.split()]) == 0

    rows = read_json(tmp_path / "a.json")["rows"]
    assert [(r["family"], r["repeats"], len(r["seconds_all"])) for r in rows] == [
        ("moxe", 6, 6),
        ("gemma2", 6, 6),
    ]
    for row in rows:
        assert row["seconds"] == pytest.approx(median(row["seconds_all"]))
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
    shown = capsys.readouterr()
    turns = re.findall(r"\[(\d)/6\] decode: (\w+)", shown.out + shown.err)
    assert turns == [(str(i), ("gemma2", "moxe")[i % 2]) for i in range(1, 7)]


def test_rows_that_were_not_measured_are_not_pooled() -> None:
    measured = _row("moxe", 4.0, tokens=8, seconds=2.0, seconds_all=[1.0, 2.0, 4.0])
    failed = _row("moxe", None)

    assert pool_rows([measured, failed]) is failed

    slow = replace(measured, seconds=5.0, seconds_all=[3.0, 5.0], peak_memory_gib=2.0)
    pooled = pool_rows([replace(measured, peak_fraction=0.6), slow])
    assert (pooled.seconds, pooled.repeats) == (3.0, 5)
    assert pooled.tokens_per_s == pytest.approx(8 / 3)
    assert pooled.peak_fraction == pytest.approx(0.4)
    assert pooled.peak_memory_gib == 2.0


def test_systems_of_transformers_can_have_our_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where our products do not run, the swap is refused, since they are torch's.
    monkeypatch.setattr("moxe_plugin.speed.swapping.check_swap", lambda *_: None)

    argv = "speed --suite decode --size tiny --length 8 --batch 1 --repeats 1"
    options = f"{_QUICK} --decode-tokens 2 --swap-linear --name a --out {tmp_path}"

    assert moxe_main([*argv.split(), *options.split()]) == 0

    rows = read_json(tmp_path / "a.json")["rows"]
    assert [(row["family"], row["linear"]) for row in rows] == [
        *(("moxe", "own"), ("gemma2", "own"), ("gemma2", "swapped"))
    ]

    page = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert "| `gemma2` `tiny` `linear=swapped`" in page
    assert "- `gemma2` `tiny`, decode, 1 x 8: MoxE is " in page


def test_command_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "speed --suite decode --size tiny --length 8 --batch 1 --repeats 1 --json"
    options = f"{_QUICK} --decode-tokens 2 --name a --out {tmp_path}"

    assert moxe_main([*argv.split(), *options.split()]) == 0

    output = capsys.readouterr()
    document = json.loads(output.out)

    assert document["rows"] == read_json(tmp_path / "a.json")["rows"]
    assert document["machine"]["freed_memory"] == "kept"
    assert "\nThe process kept freed memory" in (tmp_path / "a.md").read_text("utf-8")
    assert document["files"] == [str(tmp_path / "a.json"), str(tmp_path / "a.md")]
    assert "[2/2] decode: " in output.err


@pytest.mark.parametrize(("which", "is_told"), [("kept", True), ("system", False)])
def test_what_keeps_memory_from_being_kept_is_told(
    which: str,
    is_told: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "9")

    argv = "speed --suite decode --size tiny --length 8 --batch 1 --repeats 1"
    options = f"{_QUICK} --decode-tokens 2 --warm-up 0 --name a --out {tmp_path}"

    assert moxe_main([*argv.split(), *options.split(), "--allocator", which]) == 0

    message = "`allocator` has no effect: the environment sets `MALLOC_MMAP_MAX_`."
    assert (message in capsys.readouterr().err) == is_told
    assert "The environment set `MALLOC_MMAP_MAX_=9`." in (tmp_path / "a.md").read_text(
        "utf-8"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--suite train", "`suite` must be one of table1"),
        ("--size 7b", "`size` must be one of 340m"),
        ("--dtype fp8", "`dtype` must be one of float32"),
        ("--device abacus", "`device` must be cpu or cuda, but is 'abacus'"),
        ("--allocator pool", "`allocator` must be kept or system, but is 'pool'"),
        ("--threads 9999", "`threads` must be at most the number of cores"),
        ("--name a/b", "`name` must be the name of a file, but is 'a/b'"),
        ("--suite length --tokens 100", "`tokens` must be a multiple of every"),
        ("--router-skew -1", "`router_skew` must be finite and greater than"),
        ("--capture-steps", "`capture_steps` needs `device` cuda"),
        ("--swap-linear --dtype bfloat16", "`swap_linear` needs `device` cpu and"),
        ("--warm-up -1", "`warm_up` must be greater than or equal to 0"),
    ],
    ids=lambda text: text.split()[0] if text.startswith("--") else "",
)
def test_mistakes_of_the_user_are_explained(
    options: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert moxe_main(["speed", *options.split(), "--out", str(tmp_path)]) == 2

    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_products_that_cannot_run_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail() -> None:
        raise NativeLibraryError("`MOXE_PRODUCTS` must be 'auto' or 'torch'.")

    monkeypatch.setattr("moxe_plugin.nn.products.why_torch", fail)

    argv = f"speed --suite decode --size tiny {_QUICK} --swap-linear --out {tmp_path}"
    assert moxe_main(argv.split()) == 2

    assert "error: `MOXE_PRODUCTS` must be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_batch_without_a_sequence_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        moxe_main(["speed", "--batch", "0"])

    assert "must be an integer of at least 1, but is '0'" in capsys.readouterr().err
