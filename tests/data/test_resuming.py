"""Tests of builds that were interrupted and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from moxe_plugin.data import build
from moxe_plugin.data.__main__ import main
from moxe_plugin.data.append_file import AppendFile
from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.data.shard_writer import ShardWriter
from tests.data.hub_repository import write_repository

TEXTS = [
    f"Text {chr(97 + i % 26)}{chr(97 + i // 26)} of many." * (1 + i % 5)
    for i in range(500)
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs")

    train_bpe(TEXTS[:100], 300, path / "tokenizer")
    write_repository(path / "texts", TEXTS, "parquet")
    path.joinpath("texts.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    )
    path.joinpath("valid.txt").write_text("\n\n".join(TEXTS[:40]))

    return path


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many batches, each noted, and several shards of a split.
    monkeypatch.setattr(build, "ENCODE_BATCH_SIZE", 48)
    monkeypatch.setattr(build, "SYNC_INTERVAL_S", 0.0)

    create = ShardWriter.__init__

    def create_small(self: ShardWriter, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs, max_shard_tokens=1500)

    monkeypatch.setattr(ShardWriter, "__init__", create_small)


def _args(inputs: Path, source: str) -> list[str]:
    args = ["--tokenizer", str(inputs / "tokenizer")]
    args += ["--valid-files", str(inputs / "valid.txt"), "--test-fraction", "0.1"]

    if source == "hub":
        return [*args, "--hf", str(inputs / "texts"), "--hf-config", "sample"]

    return [*args, "--files", str(inputs / "texts.jsonl"), "--max-tokens", "9000"]


def _read_all(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(path.iterdir())}


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _run_child(run: Callable[[], int], kill_after_s: float | None = None) -> int:
    """Run a function in a forked process, and kill it if it takes too long."""
    pid = os.fork()

    if pid == 0:
        # Not the parent's standard streams, which pytest reads.
        with open(os.devnull, "w") as null:
            sys.stdout = sys.stderr = null
            os._exit(run())

    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)

    _, status = os.waitpid(pid, 0)

    return os.waitstatus_to_exitcode(status)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, bytes]]:
    return {}


def _build_undisturbed(
    inputs: Path, source: str, cache: dict[str, dict[str, bytes]]
) -> dict[str, bytes]:
    if source not in cache:
        output = inputs / f"undisturbed_{source}"

        assert main(["build", str(output), *_args(inputs, source)]) == 0
        assert not list(inputs.glob(".*"))

        cache[source] = _read_all(output)

    return cache[source]


@pytest.mark.parametrize("source", ["hub", "files"])
def test_build_killed_at_any_time_ends_as_an_undisturbed_one(
    tmp_path: Path,
    inputs: Path,
    undisturbed: dict[str, dict[str, bytes]],
    source: str,
) -> None:
    expected = _build_undisturbed(inputs, source, undisturbed)
    assert {"train_00001.bin", "test_offsets.npy", "valid_00000.bin"} <= set(expected)

    rng = random.Random(source)
    output = tmp_path / "shards"
    args = ["build", str(output), *_args(inputs, source)]
    num_killed = 0

    # A later kill each time, so that the build ends whatever the machine's speed.
    for limit_s in (0.02 * 1.15**nr for nr in range(60)):
        code = _run_child(lambda: main(args), rng.uniform(0.0, limit_s))

        if output.exists():
            break

        assert code == -signal.SIGKILL
        num_killed += 1
    else:
        pytest.fail("The build never ended.")

    assert num_killed >= 3
    assert _read_all(output) == expected


# Of the process, in the order that they happen in.
_EVENTS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"}


def _run_with_death(args: list[str], path: Path, die_at: int, count_file: Path) -> int:
    """Run ``moxe data``, and die before a certain change of a file below ``path``."""
    count = 0

    def on_event(name: str, event_args: tuple[object, ...]) -> None:
        nonlocal count

        if name in _EVENTS and str(path) in str(event_args[0]):
            count += 1

            if count == die_at:
                _die()

    sys.addaudithook(on_event)

    code = main(args)
    count_file.write_text(str(count))

    return code


def test_build_killed_before_a_change_of_files_ends_as_an_undisturbed_one(
    tmp_path: Path,
    inputs: Path,
    undisturbed: dict[str, dict[str, bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = _build_undisturbed(inputs, "files", undisturbed)
    count_file = tmp_path / "count"
    num_continued = num_restarted = 0

    def build(name: str, die_at: int) -> tuple[int, Path]:
        parent = tmp_path / name
        parent.mkdir()
        output = parent / "shards"
        args = ["build", str(output), *_args(inputs, "files")]

        return (
            _run_child(lambda: _run_with_death(args, parent, die_at, count_file)),
            output,
        )

    assert build("counted", 0)[0] == 0
    num_events = int(count_file.read_text())

    # All at the beginning and the end, where the directory is moved; some between.
    middle = range(7, num_events - 14, (num_events - 21) // 9)

    for die_at in (*range(1, 7), *middle, *range(num_events - 14, num_events + 1)):
        code, output = build(str(die_at), die_at)

        assert code == -signal.SIGKILL

        if not output.exists():
            capsys.readouterr()
            assert main(["build", str(output), *_args(inputs, "files")]) == 0

            if "Continuing the interrupted build" in capsys.readouterr().err:
                num_continued += 1
            else:
                num_restarted += 1

            assert [f.name for f in output.parent.iterdir()] == ["shards"]

        assert _read_all(output) == expected

    assert num_restarted >= 3
    assert num_continued >= 9


def _interrupt(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int
) -> None:
    """Make the writing of the document after so many fail, once."""
    add_document = ShardWriter.add_document
    count = 0

    def fail(self: ShardWriter, *args: Any) -> None:
        nonlocal count
        count += 1

        if count == after:
            raise error

        add_document(self, *args)

    monkeypatch.setattr(ShardWriter, "add_document", fail)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=["disk_full", "interrupted"],
)
def test_trouble_outside_the_documents_leaves_a_build_to_continue(
    tmp_path: Path,
    inputs: Path,
    undisturbed: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    expected = _build_undisturbed(inputs, "files", undisturbed)
    output = tmp_path / "shards"
    args = ["build", str(output), *_args(inputs, "files")]

    _interrupt(monkeypatch, error, 100)

    assert main(args) == code
    assert not output.exists()
    assert main(args) == 0
    assert "Continuing the interrupted build" in capsys.readouterr().err
    assert _read_all(output) == expected


def test_trouble_with_the_documents_leaves_nothing(
    tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(inputs.joinpath("texts.jsonl").read_text() + "{")

    args = ["build", str(tmp_path / "shards"), "--files", str(file)]

    assert main([*args, "--tokenizer", str(inputs / "tokenizer")]) == 1
    assert "texts.jsonl:501 is not JSON" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.fixture
def interrupted(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    args = ["build", str(tmp_path / "shards"), *_args(inputs, "files")]

    with monkeypatch.context() as context:
        _interrupt(context, KeyboardInterrupt(), 100)

        assert main(args) == 130

    return args


def test_other_arguments_do_not_continue_a_build(
    tmp_path: Path,
    inputs: Path,
    undisturbed: dict[str, dict[str, bytes]],
    interrupted: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = _build_undisturbed(inputs, "files", undisturbed)

    for options, change in [
        (["--max-tokens", "9001"], "`max_tokens` was 9000, but is 9001"),
        (["--test-fraction", "0.2"], "`source 2.split.test` was 0.1, but is 0.2"),
        (["--files", str(inputs / "valid.txt")], "`source 2.files` was"),
    ]:
        assert main([*interrupted, *options]) == 2

        error = capsys.readouterr().err
        assert change in error
        assert "give `--restart` to begin anew" in error

    assert main([*interrupted, "--restart"]) == 0
    assert "Continuing" not in capsys.readouterr().err
    assert _read_all(tmp_path / "shards") == expected


def test_changed_file_does_not_continue_a_build(
    inputs: Path, interrupted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = inputs / "texts.jsonl"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))

    try:
        assert main(interrupted) == 2
    finally:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert "`source 2.files` was" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["shards/train_00000.bin", "train.offsets"])
@pytest.mark.parametrize("kind", ["flipped", "cut", "missing"])
def test_damage_to_an_interrupted_build_is_found(
    tmp_path: Path,
    interrupted: list[str],
    capsys: pytest.CaptureFixture[str],
    name: str,
    kind: str,
) -> None:
    file = tmp_path / ".shards.partial" / name
    content = bytearray(file.read_bytes())

    if kind == "missing":
        file.unlink()
    else:
        content[5] ^= 1
        file.write_bytes(content if kind == "flipped" else content[:8])

    assert main(interrupted) == 1

    error = capsys.readouterr().err
    assert f"{name} of an interrupted build is" in error
    assert "Begin anew with `--restart`" in error
    assert main([*interrupted, "--restart"]) == 0


def test_damaged_journal_is_explained(
    tmp_path: Path, interrupted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ".shards.partial" / "journal.json"
    file.write_text(file.read_text()[:-3])

    assert main(interrupted) == 2
    assert "journal.json of an interrupted build is damaged" in capsys.readouterr().err


def test_second_process_does_not_build_the_same(
    tmp_path: Path, interrupted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".shards.partial" / "lock"):
        assert main(interrupted) == 1

    assert "Another process is building" in capsys.readouterr().err
    assert main(interrupted) == 0


def test_append_file_cuts_off_what_came_after_the_last_sync(tmp_path: Path) -> None:
    file = tmp_path / "a"
    first = AppendFile(file)
    first.append(b"kept")
    state = first.sync()
    first.append(b" lost")
    first.close()

    second = AppendFile(file, state)
    second.append(b" and more")
    second.close()

    assert file.read_bytes() == b"kept and more"
    assert second.num_bytes == 13
