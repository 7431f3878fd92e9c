"""Tests of the BPE and of the tokenizer family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fairseq2.data.tokenizers import TokenizerModelError
from fairseq2.error import NotSupportedError
from transformers import AutoTokenizer

from moxe_plugin.data.bpe import EOS_TOKEN, train_bpe
from moxe_plugin.data.manifest import compute_sha256
from moxe_plugin.data.tokenizer import (
    HgTextTokenizer,
    HgTextTokenizerConfig,
    load_hg_text_tokenizer,
)

TEXT = "Return the path of the file, or the path of the directory."


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe([TEXT] * 10, 300, path)

    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> HgTextTokenizer:
    return load_hg_text_tokenizer(tokenizer_dir, HgTextTokenizerConfig())


def test_special_tokens_have_the_agreed_ids(
    tokenizer: HgTextTokenizer, tokenizer_dir: Path
) -> None:
    info = tokenizer.vocab_info

    assert (info.bos_idx, info.eos_idx, info.pad_idx) == (0, 0, 1)
    assert info.size <= 300
    assert tokenizer.sha256 == compute_sha256(tokenizer_dir / "tokenizer.json")


@pytest.mark.parametrize(
    ("mode", "prefix", "suffix"),
    [
        (None, [0], [0]),
        ("default", [0], [0]),
        ("prompt", [0], []),
        ("prompt_response", [], [0]),
        ("as_is", [], []),
    ],
)
def test_modes_add_bos_and_eos(
    tokenizer: HgTextTokenizer, mode: str | None, prefix: list[int], suffix: list[int]
) -> None:
    raw = tokenizer.create_raw_encoder()(TEXT).tolist()
    encoder = tokenizer.create_encoder(mode=mode)

    assert encoder(TEXT).tolist() == prefix + raw + suffix
    assert encoder("").tolist() == prefix + suffix


def test_unknown_mode_is_refused(tokenizer: HgTextTokenizer) -> None:
    with pytest.raises(NotSupportedError, match="prompt_response"):
        tokenizer.create_encoder(mode="prompt_respones")


@pytest.mark.parametrize("text", [TEXT, "Grüße 😀\n\n  x\t1234", " a  b ", "\x00\x7f"])
def test_every_text_survives(tokenizer: HgTextTokenizer, text: str) -> None:
    tokens = tokenizer.create_encoder()(text)

    assert tokenizer.create_decoder(skip_special_tokens=True)(tokens) == text
    assert int(tokens.max()) < tokenizer.vocab_info.size


def test_transformers_loads_what_we_save(tokenizer_dir: Path) -> None:
    hg_tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    assert hg_tokenizer.eos_token == EOS_TOKEN
    assert hg_tokenizer.pad_token_id == 1
    assert len(hg_tokenizer(TEXT).input_ids) < len(TEXT) / 2


def test_training_is_deterministic(tokenizer_dir: Path, tmp_path: Path) -> None:
    train_bpe([TEXT] * 10, 300, tmp_path)

    left, right = (p / "tokenizer.json" for p in (tmp_path, tokenizer_dir))

    assert left.read_text() == right.read_text()


def test_too_small_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`vocab_size` must be at least 258"):
        train_bpe([TEXT], 100, tmp_path)


def test_file_alone_is_enough(tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())

    config = HgTextTokenizerConfig(bos_token=EOS_TOKEN, eos_token=EOS_TOKEN)
    info = load_hg_text_tokenizer(file, config).vocab_info
    assert (info.bos_idx, info.eos_idx, info.pad_idx) == (0, 0, None)

    bare = load_hg_text_tokenizer(tmp_path, HgTextTokenizerConfig())
    assert bare.vocab_info.bos_idx is None
    torch.testing.assert_close(
        bare.create_encoder()(TEXT), bare.create_raw_encoder()(TEXT)
    )


def test_size_counts_added_tokens_and_padding_may_be_eos(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    data = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    added = {**data["added_tokens"][0], "id": 400, "content": "<|end|>"}
    data["added_tokens"].append(added)

    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(data))

    config = HgTextTokenizerConfig(eos_token="<|end|>", pad_token="<|end|>")
    tokenizer = load_hg_text_tokenizer(file, config)
    info = tokenizer.vocab_info

    assert info.eos_idx is not None
    assert info.size == info.eos_idx + 1 > len(data["model"]["vocab"])
    assert info.pad_idx is None


def test_mistakes_are_explained(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_hg_text_tokenizer(tmp_path, HgTextTokenizerConfig())

    with pytest.raises(TokenizerModelError, match="`eos_token` must be in"):
        load_hg_text_tokenizer(tokenizer_dir, HgTextTokenizerConfig(eos_token="</s>"))

    file = tmp_path / "tokenizer.json"
    file.write_text("{}")

    with pytest.raises(TokenizerModelError, match="not a valid"):
        load_hg_text_tokenizer(file, HgTextTokenizerConfig())
