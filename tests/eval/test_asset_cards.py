"""Evaluates a checkpoint of the authors' code by the name of its asset card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.authors import CARD_NAME, write_card_of_the_authors

TASK = """
task: two_questions
custom_dataset: !function two_questions.load
output_type: loglikelihood
test_split: test
doc_to_text: context
doc_to_target: word
metric_list:
  - metric: acc
"""

DATA = """
from datasets import Dataset

def load(**_):
    docs = [{"context": "some text to", "word": " learn"}] * 2
    return {"test": Dataset.from_list(docs)}
"""


@pytest.mark.usefixtures("fairseq2_setup")
def test_lm_eval_loads_the_authors_checkpoint_by_its_card(tmp_path: Path) -> None:
    model = write_card_of_the_authors(tmp_path / "cards")

    tmp_path.joinpath("two_questions.yaml").write_text(TASK)
    tmp_path.joinpath("two_questions.py").write_text(DATA)

    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "moxe"),
        *("--model_args", f"checkpoint={CARD_NAME}", "--batch_size", "2"),
        *("--include_path", str(tmp_path), "--tasks", "two_questions"),
        *("--output_path", str(tmp_path / "out")),
    ]
    result = subprocess.run(
        command,
        env={**os.environ, "FAIRSEQ2_USER_ASSET_DIR": str(tmp_path / "cards")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr

    (file,) = tmp_path.glob("out/**/results_*.json")
    report = json.loads(file.read_text())

    assert report["n-samples"]["two_questions"]["effective"] == 2
    assert "acc,none" in report["results"]["two_questions"]

    num_parameters = sum(p.numel() for p in model.parameters())
    assert report["config"]["model_num_parameters"] == num_parameters
