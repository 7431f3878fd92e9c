"""Draws texts: what was encoded, and written to shards, comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moxe_plugin.data.build import Document, ShardEncoding, build_shards
from moxe_plugin.data.shards import open_shards
from moxe_plugin.data.tokenizer import (
    HgTextTokenizer,
    HgTextTokenizerConfig,
    load_hg_text_tokenizer,
)
from tests.train.tiny_data import make_tiny_data

_settings = settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)

# Every code point but halves of surrogate pairs, which UTF-8 does not have.
_texts = st.text(max_size=40)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer of bytes and a few pairs of them.

    :param tmp_path_factory: Makes the directory.

    :returns: Where it is.
    """
    return make_tiny_data(tmp_path_factory.mktemp("texts")).tokenizer_dir


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> HgTextTokenizer:
    """Load the tokenizer.

    :param tokenizer_dir: Where it is.

    :returns: The tokenizer.
    """
    return load_hg_text_tokenizer(tokenizer_dir, HgTextTokenizerConfig())


@_settings
@given(text=_texts)
def test_decoding_undoes_encoding(tokenizer: HgTextTokenizer, text: str) -> None:
    ids = tokenizer.create_raw_encoder()(text)

    assert tokenizer.create_decoder()(ids) == text

    info = tokenizer.vocab_info

    for mode, prefix, suffix in (
        ("default", [info.bos_idx], [info.eos_idx]),
        ("prompt", [info.bos_idx], []),
        ("prompt_response", [], [info.eos_idx]),
        ("as_is", [], []),
    ):
        with_mode = tokenizer.create_encoder(mode=mode)(text).tolist()

        assert with_mode == [*prefix, *ids.tolist(), *suffix]


@_settings
@given(texts=st.lists(_texts.filter(lambda text: text != ""), min_size=1, max_size=5))
def test_shards_hold_the_documents(
    tokenizer_dir: Path,
    tokenizer: HgTextTokenizer,
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("shards") / "shards"

    build_shards(
        [Document("train", text) for text in texts],
        path,
        ShardEncoding(tokenizer_path=tokenizer_dir),
        source="texts",
    )

    stream = open_shards(path, verify=True).stream("train")
    offsets = stream.offsets()

    assert len(offsets) == len(texts) + 1
    assert stream.info.num_bytes == sum(len(text.encode()) for text in texts)

    decode = tokenizer.create_decoder()

    for text, begin, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        *ids, last = stream.read(int(begin), int(end)).tolist()

        assert last == tokenizer.vocab_info.eos_idx
        assert decode(torch.tensor(ids)) == text
