"""Tests of moxe_plugin/routing_page/__main__.py."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moxe_plugin.cli import moxe_main
from moxe_plugin.routing_page.__main__ import main
from tests.eval.test_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(
    fairseq2_setup: None,  # noqa: ARG001  # fixtures cannot use `usefixtures`
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Write the output directory of a training."""
    directory = tmp_path_factory.mktemp("run")
    write_checkpoint(directory, "moxe")

    return str(directory)


def test_the_command_writes_and_prints(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("learn from text, é\r\n".encode())

    options = ["--title", "Mine", "--source", "A book", "--layer", "1", "--step", "2"]
    command = ["inspect", checkpoint, "--file", str(file), *options]

    assert moxe_main([*command, "--out", str(tmp_path / "out")]) == 0

    html = (tmp_path / "out" / "routing.html").read_text(encoding="utf-8")
    assert "<title>Routing: Mine</title>" in html
    assert "A book" in html
    assert (tmp_path / "out" / "routing.png").read_bytes().startswith(b"\x89PNG")

    out = capsys.readouterr().out
    assert "Mine, layer 1 of 2" in out
    assert "learn from text, é▫⟨U+000D⟩↵" in out
    assert "Written: routing.html and routing.png in" in out


def test_the_text_may_come_from_stdin(
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(b"piped"))
    monkeypatch.setattr(sys, "stdin", stdin)

    assert main([checkpoint, "--file", "-", "--out", str(tmp_path)]) == 0
    assert "piped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", ""], "`text` must have at least one character"),
        (["--text", "a", "--layer", "2"], "`--layer` must be between 0 and 1"),
        (["--text", "a", "--step", "5"], "5"),
        (["--file", "nothing.txt"], "nothing.txt"),
        (["--file", "latin1.txt"], "must be UTF-8, but has b'\\xe9' at byte 1."),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes("né".encode("latin-1"))

    assert main([checkpoint, *options, "--out", "out"]) == 2

    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from moxe_plugin.cli import moxe_main\n"
        "try:\n"
        "    moxe_main(['inspect', '-h'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'jinja2')))\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
