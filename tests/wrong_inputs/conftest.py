"""What the wrong inputs are tried on: a trained model, good data, and bad files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moxe_plugin.data.manifest import compute_sha256
from tests.train.tiny_data import make_tiny_data, pretrain

_OUTSIDE_SUITE: Final = b"""
name: outside
seeds: [1]
tasks: [moxe_embedded_rolling]
data: embedded
systems:
  - name: ../outside
    label: A
    pretrain: smoke
"""

_FILES: Final[Mapping[str, bytes]] = {
    "blank.txt": b"\n \n",
    "latin1.txt": "Un café.\n".encode("latin-1"),
    "long.txt": b"one two three " * 40,
    "broken.yaml": b"a: [1",
    "list.yaml": b"- a\n- b\n",
    "code.yaml": b"a: !!python/object/apply:os.system ['touch $out']\n",
    "numbers.jsonl": b'{"text": 5}\n',
    "documents.jsonl": b'{"text": "One."}\nno JSON\n',
    "latin1.yaml": "name: café\n".encode("latin-1"),
    "unknown_key.yaml": b"name: a\nsistems: []\n",
    "no_keys.yaml": b"name: a\nsystems: []\n",
    "outside.yaml": _OUTSIDE_SUITE,
    "foreign/notes.txt": b"Do not lose me.\n",
    "shards/manifest.json": b"{",
    "damaged_tokenizer/tokenizer.json": b"{}",
    "no_fields/train.jsonl": b'{"question": "a"}\n',
    "no_json/train.jsonl": b'{"src": "a", "tgt": "b"}\nno JSON\n',
    "no_utf8/train.jsonl": '{"src": "é", "tgt": "b"}\n'.encode("latin-1"),
    "no_lines/train.jsonl": b"\n",
}


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Make a trained model, its data, and what is wrong.

    :param tmp_path_factory: Makes the directories.

    :returns: The paths by the names that cases use.
    """
    root = tmp_path_factory.mktemp("wrong_inputs")

    data = make_tiny_data(root)

    run = root / "run"
    pretrain(data, run, {"regime.keep_last_n_checkpoints": 2})

    bad = root / "bad"

    for name, content in _FILES.items():
        file = bad / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    _train_other_tokenizer(bad / "tokenizer")
    _put_token_beyond_vocabulary(data.tokens_dir, bad / "flipped")
    _put_token_beyond_vocabulary(data.tokens_dir, bad / "beyond", hide=True)
    _make_damaged_runs(run, bad)

    return {
        "root": root,
        "tokenizer": data.tokenizer_dir,
        "tokens": data.tokens_dir,
        "instructions": data.instructions_dir,
        "run": run,
        "bad": bad,
    }


def _train_other_tokenizer(path: Path) -> None:
    letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]

    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(str(path))


def _put_token_beyond_vocabulary(
    tokens_dir: Path, path: Path, *, hide: bool = False
) -> None:
    shutil.copytree(tokens_dir, path)

    manifest = json.loads((path / "manifest.json").read_text())

    shard = manifest["splits"]["train"]["shards"][0]
    file = path / shard["file"]

    tokens = np.fromfile(file, dtype=manifest["dtype"])
    tokens[3] = 400
    tokens.tofile(file)

    if hide:
        # As if the shards had been made with another tokenizer than they say.
        shard["sha256"] = compute_sha256(file)
        (path / "manifest.json").write_text(json.dumps(manifest))


def _make_damaged_runs(run: Path, bad: Path) -> None:
    unfinished = bad / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", unfinished)
    shutil.copy(run / "checkpoints" / "model.yaml", unfinished / "checkpoints")

    # As if the configuration had been edited.
    other = bad / "other_family"
    shutil.copytree(run, other)
    card = other / "checkpoints" / "model.yaml"
    card.write_text(card.read_text().replace("moxe", "xlstm"))

    # As if the tokenizer that the run names had been replaced.
    other = bad / "other_tokenizer_run"
    shutil.copytree(run, other)
    config = (other / "config.yaml").read_text()
    tokenizer_dir = str(run.parent / "tokenizer")
    assert tokenizer_dir in config
    (other / "config.yaml").write_text(
        config.replace(tokenizer_dir, str(bad / "tokenizer"))
    )
