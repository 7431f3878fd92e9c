"""Tests of reading datasets laid out as on the hub, also over a bad connection."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from fairseq2.datasets import DatasetError

from moxe_plugin.data.__main__ import main
from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.data.hub import HubTexts
from moxe_plugin.data.manifest import SplitInfo
from moxe_plugin.data.retrying import RetryPolicy, StreamError
from moxe_plugin.data.shards import open_shards
from tests.data.hub_repository import (
    Fault,
    FlakyServer,
    serve,
    write_card,
    write_repository,
)

TEXTS = [f"Text {chr(97 + i % 26)}{chr(97 + i // 26)}, of {i}." for i in range(301)]


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def repository(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "texts"

    return write_repository(path, TEXTS, request.param)


@pytest.fixture(autouse=True)
def _datasets_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    # Of `datasets`' own attempts, 20 in as many times 5 s, the last only.
    for name in ("STREAMING_READ", "STREAMING_OPEN"):
        monkeypatch.setattr(datasets.config, f"{name}_MAX_RETRIES", 1)
        monkeypatch.setattr(datasets.config, f"{name}_RETRY_INTERVAL", 0.0)


def _open(path: Path, config: str = "sample", **options: Any) -> HubTexts:
    return HubTexts(str(path), config, options.pop("split", "train"), "text", **options)


def _fail(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "downloaded"])
def test_reading_goes_on_from_any_state(repository: Path, streaming: bool) -> None:
    whole = _open(repository, streaming=streaming, notify=_fail)
    texts = iter(whole)

    for num_read in (0, 1, 37, 99, 100, 101, 250, 300):
        while whole.state_dict()["num_read"] < num_read:
            next(texts)

        state = json.loads(json.dumps(whole.state_dict()))

        rest = _open(repository, streaming=streaming, notify=_fail)
        rest.load_state_dict(state)

        assert list(islice(rest, 120)) == TEXTS[num_read:300][:120]
        assert rest.describe() == whole.describe()

    assert next(texts, None) is None


def test_description_tells_of_a_change_of_the_files(
    repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(repository, path)
    before = _open(path, notify=_fail).describe()

    assert _open(path, notify=_fail).describe() == before
    assert _open(path, "small", notify=_fail).describe() != before
    assert _open(path, split="held", notify=_fail).describe() != before

    file = next(path.glob("data/train-00001.*"))
    os.utime(file, (0, 0))

    assert _open(path, notify=_fail).describe() != before


def test_build_of_a_repository_is_that_of_its_files(
    repository: Path, tmp_path: Path
) -> None:
    train_bpe(TEXTS, 300, tmp_path / "tokenizer")
    files = [str(f) for f in sorted(repository.glob("data/train-*"))]

    args = ["--tokenizer", str(tmp_path / "tokenizer"), "--max-tokens", "2_000"]
    args += ["--valid-fraction", "0.1", "--test-fraction", "0"]

    def build(*source: str) -> dict[str, SplitInfo]:
        output = tmp_path / f"shards_{len(list(tmp_path.iterdir()))}"

        assert main(["build", str(output), *args, *source]) == 0

        return open_shards(output, verify=True).manifest.splits

    from_hub = build("--hf", str(repository), "--hf-config", "sample")

    assert from_hub == build("--files", *files)
    assert from_hub.keys() == {"train", "valid"}
    assert sum(s.num_tokens - 1 for s in from_hub.values()) >= 2_000

    small = build("--hf", str(repository), "--hf-config", "small")

    assert small == build("--files", files[-1])
    assert small != from_hub


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hf-config", "smaple"], r"'smaple' not found.*sample.*small"),
        ([], r"Config name is missing.*sample.*small"),
        (["--hf-config", "sample", "--hf-split", "tets"], r"tets.*train.*held"),
        (["--hf-config", "sample", "--text-column", "body"], r"row 1 has no `body`"),
    ],
    ids=["config", "no_config", "split", "column"],
)
def test_wrong_names_list_the_known_ones(
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    train_bpe(TEXTS, 300, tmp_path / "tokenizer")
    args = ["build", str(tmp_path / "shards"), "--hf", str(repository), *options]

    assert main([*args, "--tokenizer", str(tmp_path / "tokenizer")]) == 1

    error = capsys.readouterr().err

    assert re.search(message, error, re.DOTALL), error
    assert "Traceback" not in error
    assert {p.name for p in tmp_path.iterdir()} <= {"tokenizer", "cache"}


@pytest.fixture
def server(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    # The tests are offline otherwise; this server is on the loopback address.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    with serve(repository / "data") as server:
        yield server


@pytest.fixture
def remote(server: FlakyServer, tmp_path: Path) -> Path:
    path = tmp_path / "remote"
    path.mkdir()

    files = [f"{server.url}/{f.name}" for f in sorted(server.path.glob("train-*"))]
    write_card(path, {"sample": {"train": files}})

    return path


class _Waits(list[float]):
    def __call__(self, delay_s: float) -> None:
        self.append(delay_s)


@pytest.mark.parametrize("fault", ["reset", "cut", 503, 429])
def test_broken_stream_is_taken_up_where_it_broke(
    server: FlakyServer, remote: Path, fault: Fault
) -> None:
    waits, messages = _Waits(), list[str]()
    texts = _open(remote, policy=RetryPolicy(sleep=waits), notify=messages.append)
    iterator = iter(texts)

    assert next(iterator) == TEXTS[0]

    # aiohttp itself tries once more after a reset of a connection that it kept.
    server.faults = [fault, fault, None, fault, fault]

    assert list(iterator) == TEXTS[1:300]

    assert server.num_faults == 4
    assert len(waits) == len(messages) >= 2
    assert waits[0] == 1.0
    assert "broke off after 100 documents" in messages[0]
    assert "Attempt 2 of 6 in 1 s." in messages[0]


def test_lasting_trouble_ends_in_a_clear_error(
    server: FlakyServer, remote: Path
) -> None:
    waits = _Waits()
    policy = RetryPolicy(max_attempts=4, max_delay_s=3.0, sleep=waits)
    texts = _open(remote, policy=policy, notify=lambda _: None)
    iterator = iter(texts)

    next(iterator)
    server.faults = ["reset"] * 100

    message = r"failed 4 times in a row after 100 documents: .*the same command again"

    with pytest.raises(StreamError, match=message):
        list(iterator)

    assert waits == [1.0, 2.0, 3.0]


def test_file_that_is_gone_ends_a_build_that_can_be_continued(
    repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(repository, path)
    iterator = iter(_open(path, notify=_fail))

    next(iterator)
    next(path.glob("data/train-00001.*")).unlink()

    message = r"cannot be read: .*after 100 documents.*same command continues"

    with pytest.raises(StreamError, match=message):
        list(iterator)


def test_progress_starts_the_count_of_attempts_again(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_rows = HubTexts._open_rows

    def break_off(self: HubTexts) -> Iterator[dict[str, Any]]:
        yield from islice(open_rows(self), 7)
        raise ConnectionResetError("by the test")

    monkeypatch.setattr(HubTexts, "_open_rows", break_off)

    waits = _Waits()
    policy = RetryPolicy(max_attempts=2, sleep=waits)
    texts = _open(repository, policy=policy, notify=lambda _: None)

    # Breaks every seven documents, at the end with nothing left.
    with pytest.raises(StreamError, match="2 times in a row after 300 documents"):
        _compare(texts)

    assert waits == [1.0] * 43


def _compare(texts: HubTexts) -> None:
    for text, expected in zip(texts, TEXTS, strict=False):
        assert text == expected


def test_hub_that_is_offline_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        from huggingface_hub.errors import OfflineModeIsEnabled

        raise ConnectionError("hub") from OfflineModeIsEnabled("offline")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)

    with pytest.raises(DatasetError, match="cannot be read: ConnectionError: hub"):
        list(_open(tmp_path, notify=_fail))
