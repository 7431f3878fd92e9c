"""Tests of token windows and of the reader."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fairseq2.error import StateDictError
from fairseq2.recipe.error import RecipeError, SplitNotKnownError
from hypothesis import given, settings
from hypothesis import strategies as st

from moxe_plugin.data.reader import RowReader
from moxe_plugin.data.shards import open_shards
from moxe_plugin.data.tokens import (
    TokensConfig,
    TokensDataset,
    open_tokens,
)
from moxe_plugin.data.windows import EvalWindows
from tests.common import ByteTokenizer
from tests.data.streams import collect_targets, make_gangs, write_positions

NUM_TOKENS = 403


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokensDataset:
    path = tmp_path_factory.mktemp("tokens") / "shards"

    return open_tokens(TokensConfig(path=write_positions(path, NUM_TOKENS)))


def _all_pairs(dataset: TokensDataset) -> list[tuple[int, int]]:
    stream = dataset.shards.stream("train")
    tokens = stream.read(0, len(stream)).tolist()

    return list(pairwise(tokens))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seq_len", [2, 16, 57, 1000])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_validation_counts_every_target_once(
    dataset: TokensDataset, num_ranks: int, seq_len: int, batch_size: int
) -> None:
    pairs = []
    num_steps = set()

    for rank in range(num_ranks):
        reader = dataset.create_reader(
            "train",
            make_gangs(rank, num_ranks),
            batch_size=batch_size,
            seq_len=seq_len,
            shuffle=False,
            num_accumulate=2,
        )
        steps = list(reader)
        num_steps.add(tuple(len(s) for s in steps))
        pairs += collect_targets(steps)

    assert sorted(pairs) == sorted(_all_pairs(dataset))
    assert len(num_steps) == 1


@given(
    num_tokens=st.integers(3, 300),
    seq_len=st.integers(2, 40),
    num_ranks=st.integers(1, 9),
)
@settings(max_examples=50, deadline=None)
def test_validation_windows_partition_targets(
    tmp_path_factory: pytest.TempPathFactory,
    num_tokens: int,
    seq_len: int,
    num_ranks: int,
) -> None:
    path = tmp_path_factory.mktemp("p") / "s"
    stream = open_shards(write_positions(path, num_tokens)).stream("train")

    if len(stream) - 1 < num_ranks:
        with pytest.raises(RecipeError, match="fewer than ranks"):
            EvalWindows(stream, seq_len, num_ranks)

        return

    rows = EvalWindows(stream, seq_len, num_ranks)

    assert len(rows) % num_ranks == 0

    batches = [rows.collate(torch.tensor([i]).numpy()) for i in range(len(rows))]

    assert all(b.seqs.size(1) <= seq_len + 1 for b in batches)
    assert len(collect_targets([batches])) == len(stream) - 1


def test_training_windows_are_full_and_disjoint(dataset: TokensDataset) -> None:
    reader = dataset.create_reader("train", make_gangs(), batch_size=3, seq_len=16)
    steps = list(reader)

    # 402 targets make 25 windows, 8 batches of 3.
    assert reader.num_batches == len(steps) == 8
    assert all(b.seqs.shape == (3, 17) and b.target_mask is None for (b,) in steps)

    pairs = collect_targets(steps)

    assert len(pairs) == 8 * 3 * 16
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) <= set(_all_pairs(dataset))


def _read_epoch(reader: RowReader) -> list[list[list[int]]]:
    return [b.seqs.tolist() for step in reader for b in step]


def test_order_depends_on_seed_and_epoch_only(dataset: TokensDataset) -> None:
    def create(seed: int) -> RowReader:
        return dataset.create_reader(
            "train", make_gangs(), batch_size=3, seq_len=16, seed=seed
        )

    reader = create(seed=1)
    first = _read_epoch(reader)

    with pytest.raises(StopIteration):
        next(reader)

    reader.reset()
    second = _read_epoch(reader)

    assert first == _read_epoch(create(seed=1))
    assert first != second
    assert first != _read_epoch(create(seed=2))


def test_ranks_share_the_global_batch(dataset: TokensDataset) -> None:
    def create(rank: int, size: int, batch_size: int) -> RowReader:
        return dataset.create_reader(
            "train", make_gangs(rank, size), batch_size=batch_size, seq_len=16
        )

    whole = _read_epoch(create(0, 1, 4))
    ranks = [_read_epoch(create(r, 2, 2)) for r in range(2)]

    assert [len(r) for r in ranks] == [len(whole)] * 2

    for batch, left, right in zip(whole, *ranks, strict=True):
        assert batch[0::2] == left
        assert batch[1::2] == right


@pytest.mark.parametrize("num_read", [0, 1, 3, 4], ids=str)
def test_resume_is_exact(dataset: TokensDataset, num_read: int) -> None:
    def create() -> RowReader:
        return dataset.create_reader(
            "train", make_gangs(), batch_size=3, seq_len=16, num_accumulate=2
        )

    reader = create()
    list(reader)
    reader.reset()

    for _ in range(num_read):
        next(reader)

    state = reader.state_dict()
    rest = _read_epoch(reader)
    reader.reset()
    following = _read_epoch(reader)

    resumed = create()
    resumed.load_state_dict(state)

    assert _read_epoch(resumed) == rest
    resumed.reset()
    assert _read_epoch(resumed) == following


def test_resume_on_fewer_ranks_goes_on_where_it_was(dataset: TokensDataset) -> None:
    reader = dataset.create_reader("train", make_gangs(1, 2), batch_size=2, seq_len=16)
    next(reader)
    next(reader)

    alone = dataset.create_reader("train", make_gangs(), batch_size=4, seq_len=16)
    whole = _read_epoch(alone)
    alone.reset()
    alone.load_state_dict(reader.state_dict())

    assert _read_epoch(alone) == whole[2:]


def test_state_of_other_data_is_refused(dataset: TokensDataset) -> None:
    reader = dataset.create_reader("train", make_gangs(), batch_size=3, seq_len=16)
    state = reader.state_dict()

    with pytest.raises(RecipeError, match=r"had 24 rows .* has 25"):
        reader.load_state_dict({**state, "num_rows": 24})

    with pytest.raises(RecipeError, match="has other content"):
        reader.load_state_dict({**state, "rows_sha256": "0" * 64})

    with pytest.raises(RecipeError, match=r"had the seed 5 .* has 0 now"):
        reader.load_state_dict({**state, "seed": 5})

    with pytest.raises(StateDictError, match="unexpected key"):
        reader.load_state_dict({**state, "more": 1})

    with pytest.raises(StateDictError, match="epoch"):
        reader.load_state_dict({})


def test_epoch_ends_early_on_request(dataset: TokensDataset) -> None:
    reader = dataset.create_reader(
        "train",
        make_gangs(),
        batch_size=3,
        seq_len=16,
        max_num_batches=5,
        num_accumulate=2,
    )

    assert [len(step) for step in reader] == [2, 2, 1]
    assert (reader.num_batches, reader.num_steps) == (5, 3)


def test_mistakes_are_explained(dataset: TokensDataset, tmp_path: Path) -> None:
    gangs = make_gangs()

    with pytest.raises(SplitNotKnownError, match="dev is not a known split") as info:
        dataset.create_reader("dev", gangs, batch_size=1, seq_len=16)
    assert info.value.available_splits == ["train"]

    with pytest.raises(RecipeError, match="has 25 rows, fewer than one batch of 26"):
        dataset.create_reader("train", gangs, batch_size=26, seq_len=16)

    with pytest.raises(RecipeError, match="another tokenizer"):
        dataset.create_reader(
            "train", gangs, batch_size=1, seq_len=16, tokenizer=ByteTokenizer()
        )

    with pytest.raises(RecipeError, match=r"not a directory .*moxe data build"):
        open_tokens(TokensConfig(path=tmp_path / "nothing"))

    with pytest.raises(RecipeError, match="Exactly one"):
        open_tokens(TokensConfig())

    assert TokensConfig().validate().has_error()
