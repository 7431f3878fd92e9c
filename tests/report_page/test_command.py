"""`moxe report` reads what `moxe tables` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from moxe_plugin.cli.moxe_command import moxe_main
from tests.report.synthetic import make_trained, write


def test_report_is_written_beside_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, make_trained(), make_trained("xlstm"))

    assert moxe_main(["report", "--results", str(tmp_path)]) == 0

    html = (tmp_path / "report.html").read_bytes()
    assert b"moxe_embedded_cpu2_20261123_s2" in html
    assert "2 runs" in capsys.readouterr().out

    output = tmp_path / "a" / "page.html"
    args = ["report", "--results", str(tmp_path), "--output", str(output)]

    assert moxe_main(args) == 0
    assert output.read_bytes() == html


@pytest.mark.parametrize(
    ("file", "content"),
    [("train.jsonl", '{"NLL Loss": NaN}\n'), ("environment.json", '{"schema')],
)
def test_damaged_run_changes_no_other_row(
    tmp_path: Path, file: str, content: str
) -> None:
    for name in ("with", "without"):
        write(tmp_path / name, make_trained(), make_trained("xlstm"))

    (run_dir,) = write(tmp_path / "with", make_trained("gemma2"))
    (run_dir / file).write_text(content)

    pages = []
    for name in ("with", "without"):
        assert moxe_main(["report", "--results", str(tmp_path / name)]) == 0
        pages.append((tmp_path / name / "report.html").read_text())

    damaged, sound = (page.partition('<section id="excluded">') for page in pages)

    assert damaged[0].replace("Left out (1)", "Left out (0)") == sound[0]
    assert f"<code>{run_dir.name}</code>: {file}" in damaged[2]


def test_damaged_overlap_is_named(tmp_path: Path) -> None:
    write(tmp_path, make_trained())
    (tmp_path / "overlap.json").write_text("{")

    assert moxe_main(["report", "--results", str(tmp_path)]) == 0

    html = (tmp_path / "report.html").read_text()
    assert "<code>overlap.json</code>" in html
    assert "Overlap of training" not in html


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--results", "nothing"], "`nothing` is no directory; see --results"),
        (["--results", "."], "there is no readable run; see --results"),
        (["--output", "results"], "`--output` must be a file, but `results`"),
    ],
)
def test_mistakes_are_explained(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()

    assert moxe_main(["report", *args]) == 2
    assert message in capsys.readouterr().err
