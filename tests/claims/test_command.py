"""From trained runs to the page, with tiny models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from moxe_plugin.claims.__main__ import main
from moxe_plugin.claims.held_out import read_passages
from moxe_plugin.claims.measurements import read_measurements
from moxe_plugin.claims.run_search import find_runs
from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import load_checkpoint
from tests.claims.conftest import TinyRuns


@pytest.fixture(scope="module")
def out(tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")

    assert _measure(tiny_runs, out) == 0

    return out


def _measure(runs: TinyRuns, out: Path, *options: str) -> int:
    texts = ["--text", str(runs.text), "--lambada", str(runs.lambada)]

    return main([str(runs.work_dir), *texts, "--out", str(out), *options])


def _read_files(out: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in out.rglob("*")
        if file.is_file()
    }


def test_every_run_is_measured_and_every_claim_judged(out: Path) -> None:
    runs = read_measurements(out / "claims" / "runs")

    assert [(run.system, run.seed) for run in runs] == [
        ("moxe", 1),
        ("moxe", 2),
        ("xlstm", 1),
    ]
    # Two steps of four windows of 16 tokens.
    assert runs[0].setting["training_tokens"] == 2 * 4 * 16
    assert [len(run.layers) for run in runs] == [2, 2, 0]

    verdicts = pd.read_csv(out / "claims" / "verdicts.csv")
    assert verdicts["claim"].unique().tolist() == [
        *("a", "b", "c", "d", "e", "f", "odds", "loss", "memory", "dense")
    ]

    numbers = verdicts.set_index("number")["value"]
    assert math.isfinite(
        numbers["layer 0: Spearman correlation of difficulty and rarity"]
    )
    # One seed of xLSTM is too few.
    missing = verdicts.set_index("number")["missing"]
    assert "two seeds" in missing["held-out loss: MoxE minus xLSTM[5:1]"]

    page = (out / "claims.md").read_text()
    assert "two seeds are needed, there are 1" in page


def test_word_losses_are_those_of_the_harness_adapter(
    tiny_runs: TinyRuns, out: Path
) -> None:
    from lm_eval.api.instance import Instance

    (run, *_) = read_measurements(out / "claims" / "runs")
    assert run.passages is not None

    loaded = load_checkpoint(tiny_runs.work_dir / "moxe_s1" / "pretrain")
    lm = LoadedModelLM(loaded, max_length=16)

    encode = loaded.tokenizer.create_raw_encoder()
    decode = loaded.tokenizer.create_decoder()
    passages = read_passages(tiny_runs.lambada, lambda t: encode(t).tolist(), 1000)

    requests = [
        Instance(
            "loglikelihood",
            {},
            tuple(decode(encode("").new_tensor(ids)) for ids in pair),
            0,
        )
        for pair in passages.pairs
    ]
    expected = [
        -logprob for logprob, _ in lm.loglikelihood(requests, disable_tqdm=True)
    ]

    assert run.passages["nll"] == pytest.approx(expected, rel=1e-4)


def test_pages_are_written_again_without_runs_byte_for_byte(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out / "claims" / "runs", copy / "claims" / "runs")

    assert main(["--out", str(copy), "--json"]) == 0

    assert _read_files(copy) == _read_files(out)

    document = json.loads(capsys.readouterr().out)
    page = (out / "claims.md").read_text(encoding="utf-8")

    assert len(document["claims"]) > 3
    assert all(claim["title"] in page for claim in document["claims"])
    assert all(claim["answers"] for claim in document["claims"])
    assert "claims.md" in document["files"]


def test_a_run_is_measured_once(
    tiny_runs: TinyRuns, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _read_files(out)

    assert _measure(tiny_runs, out) == 0

    assert capsys.readouterr().err.count("measured before") == 3
    assert _read_files(out) == before


def test_other_options_measure_again(
    tiny_runs: TinyRuns,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(out, tmp_path / "out")

    assert _measure(tiny_runs, tmp_path / "out", "--max-passages", "3") == 0

    assert "measured before" not in capsys.readouterr().err
    (run, *_) = read_measurements(tmp_path / "out" / "claims" / "runs")
    assert run.passages is not None
    assert len(run.passages["nll"]) == 3


def test_unfinished_runs_are_left_out(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    shutil.copytree(tiny_runs.work_dir, tmp_path / "work")

    config = tmp_path / "work" / "moxe_s2" / "pretrain" / "config.yaml"
    text = config.read_text()
    assert "num_steps: 2" in text
    config.write_text(text.replace("num_steps: 2", "num_steps: 3"))

    found = find_runs([tmp_path / "work"])

    assert [output.dir.parent.name for output in found.finished] == [
        "moxe_s1",
        "xlstm_s1",
    ]
    (unfinished,) = found.unfinished
    assert unfinished.endswith("moxe_s2/pretrain: step 2 of 3")


def test_two_runs_of_one_system_and_seed_are_an_error(
    tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    shutil.copytree(tiny_runs.work_dir / "moxe_s1", tmp_path / "again")

    with pytest.raises(ValueError, match="both of system moxe with seed 1"):
        find_runs([tiny_runs.work_dir, tmp_path])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUNS"], "`--text` must name the held-out text"),
        (["--time"], "`--time` must come with the training outputs"),
        ([], "holds no measured run"),
        (["EMPTY", "--text", "TEXT"], "is no training output and holds none"),
        (["RUNS", "--text", "absent.txt"], "absent.txt does not exist"),
    ],
    ids=["text", "time", "nothing", "no runs", "absent"],
)
def test_mistakes_are_explained(
    argv: list[str],
    message: str,
    tiny_runs: TinyRuns,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    names = {
        "RUNS": str(tiny_runs.work_dir),
        "TEXT": str(tiny_runs.text),
        "EMPTY": str(tmp_path / "empty"),
    }

    argv = [names.get(word, word) for word in argv]

    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
