"""Tests of the instruction dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fairseq2.datasets import DatasetError, SequenceBatch
from fairseq2.recipe.error import RecipeError, SplitNotKnownError

from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.data.instruction_encoding import (
    EncodedInstruction,
    InstructionEncoder,
    read_instructions,
)
from moxe_plugin.data.instructions import (
    InstructionsConfig,
    InstructionsDataset,
    open_instructions,
)
from moxe_plugin.data.tokenizer import HgTextTokenizerConfig, load_hg_text_tokenizer
from tests.common import BOS_IDX, EOS_IDX, PAD_IDX, ByteTokenizer
from tests.data.streams import make_gangs

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho!"},
]


def _write(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    return file


def _open(tmp_path: Path, rows: Sequence[Any]) -> InstructionsDataset:
    _write(tmp_path / "train.jsonl", rows)

    return open_instructions(InstructionsConfig(path=tmp_path))


def _encode(row: Any, tmp_path: Path) -> EncodedInstruction:
    file = _write(tmp_path / "one.jsonl", [row])

    return InstructionEncoder(ByteTokenizer()).encode(next(read_instructions(file)))


def _targets(example: EncodedInstruction) -> list[int]:
    tokens: list[int] = example.tokens[example.target_mask].tolist()

    return tokens


def test_only_response_and_eos_are_targets(tmp_path: Path) -> None:
    example = _encode({"src": "Hi", "tgt": "Ho"}, tmp_path)

    assert example.tokens.tolist() == [BOS_IDX, *b"HiHo", EOS_IDX]
    assert _targets(example) == [*b"Ho", EOS_IDX]


def test_question_is_asked_as_by_the_harness_and_its_answer_learnt(
    tmp_path: Path,
) -> None:
    row = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
    example = _encode(row, tmp_path)

    response = [*b" 1 + 1 = <<1+1=2>>2\n#### 2", EOS_IDX]

    assert example.tokens.tolist() == [
        *(BOS_IDX, *b"Question: 1 + 1?\nAnswer:"),
        *response,
    ]
    assert _targets(example) == response


def test_all_responses_of_a_chat_are_targets(tmp_path: Path) -> None:
    example = _encode({"messages": CHAT}, tmp_path)

    before = [BOS_IDX, *b"System: Be brief.\nUser: Hi\nAssistant: "]

    assert example.tokens[: len(before)].tolist() == before
    assert _targets(example) == [*b"Ho", EOS_IDX, *b"Ho!", EOS_IDX]


def test_chat_template_is_followed(tmp_path: Path) -> None:
    train_bpe(["Hi Ho"], 260, tmp_path / "tokenizer")
    tokenizer = load_hg_text_tokenizer(tmp_path / "tokenizer", HgTextTokenizerConfig())
    tokenizer.hg_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    file = _write(tmp_path / "one.jsonl", [{"messages": CHAT}])
    example = InstructionEncoder(tokenizer).encode(next(read_instructions(file)))

    decode = tokenizer.hg_tokenizer.decode

    assert decode(example.tokens).startswith("[system]Be brief.[user]Hi[assistant]Ho")
    assert decode(_targets(example)) == "Ho<|endoftext|>Ho!<|endoftext|>"


def _batches(
    dataset: InstructionsDataset, rank: int = 0, size: int = 1, **kwargs: Any
) -> list[SequenceBatch]:
    options = {"batch_size": 2, "max_seq_len": 64, "shuffle": False, **kwargs}
    gangs = make_gangs(rank, size)

    reader = dataset.create_reader("train", ByteTokenizer(), gangs, **options)

    return [b for step in reader for b in step]


def test_batches_are_padded_on_the_right(tmp_path: Path) -> None:
    rows = [{"src": "a", "tgt": "bc"}, {"src": "abcdef", "tgt": "ghij"}]
    (batch,) = _batches(_open(tmp_path, rows))

    assert batch.seqs.tolist() == [
        [BOS_IDX, *b"abc", EOS_IDX, *[PAD_IDX] * 7],
        [BOS_IDX, *b"abcdefghij", EOS_IDX],
    ]
    assert batch.seq_lens == [5, 12]

    _, target = batch.as_auto_regressive()

    assert target.num_target_elements == 3 + 5


def test_long_examples_are_cut_and_those_without_response_dropped(
    tmp_path: Path,
) -> None:
    rows = [
        {"src": "a", "tgt": "b"},
        {"src": "abc", "tgt": "defghi"},
        {"src": "abcdefghij", "tgt": "k"},
    ]
    (batch,) = _batches(_open(tmp_path, rows), max_seq_len=6)

    assert sorted(batch.seq_lens) == [4, 7]

    source, _ = batch.as_auto_regressive()

    assert source.seqs.size(1) == 6

    with pytest.raises(RecipeError, match="no example whose response begins"):
        _batches(_open(tmp_path, rows[2:]), max_seq_len=6)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [5, 7, 12])
def test_validation_counts_every_target_once(
    tmp_path: Path, num_ranks: int, num_rows: int
) -> None:
    rows = [{"src": "q" * (i % 3 + 1), "tgt": "r" * (i + 8)} for i in range(num_rows)]
    dataset = _open(tmp_path, rows)

    ranks = [_batches(dataset, r, num_ranks) for r in range(num_ranks)]
    counts = [
        [b.as_auto_regressive()[1].num_target_elements for b in batches]
        for batches in ranks
    ]

    assert sum(map(sum, counts)) == sum(len(r["tgt"]) + 1 for r in rows)
    assert len({len(c) for c in counts}) == 1
    assert all(n > 0 for c in counts for n in c)


def test_training_epochs_are_shuffled_and_resume(tmp_path: Path) -> None:
    rows = [{"src": f"{i}", "tgt": "x" * (i + 1)} for i in range(11)]
    dataset = _open(tmp_path, rows)

    def create() -> Any:
        return dataset.create_reader(
            "train", ByteTokenizer(), make_gangs(), batch_size=2, max_seq_len=64, seed=3
        )

    def read(reader: Any) -> list[Any]:
        return [b.seqs.tolist() for (b,) in reader]

    reader = create()
    first = read(reader)
    reader.reset()
    next(reader)
    state = reader.state_dict()
    rest = read(reader)

    assert len(first) == 5
    assert first[1:] != rest

    resumed = create()
    resumed.load_state_dict(state)

    assert read(resumed) == rest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"train\.jsonl:2"),
        ("[]", "must be a JSON object"),
        ('{"src": "a", "target": "b"}', "but has src, target instead"),
        ('{"question": "a", "answer": 1}', "but has question, answer instead"),
        ('{"messages": 1}', "must be a list"),
        ('{"messages": [{"role": "user"}]}', "`role` and `content`"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "assistant"),
    ],
)
def test_bad_lines_are_explained(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"src": "a", "tgt": "b"}\n' + line + "\n")

    with pytest.raises(DatasetError, match=message):
        list(read_instructions(file))


def test_mistakes_are_explained(tmp_path: Path) -> None:
    dataset = _open(tmp_path, [{"src": "a", "tgt": "b"}])

    with pytest.raises(SplitNotKnownError, match="dev"):
        dataset.create_reader(
            "dev", ByteTokenizer(), make_gangs(), batch_size=1, max_seq_len=8
        )

    with pytest.raises(RecipeError, match="is not a directory of instructions"):
        open_instructions(InstructionsConfig(path=tmp_path / "nothing"))

    tmp_path.joinpath("other").mkdir()

    with pytest.raises(RecipeError, match=r"it has no <split>\.jsonl"):
        open_instructions(InstructionsConfig(path=tmp_path / "other"))

    with pytest.raises(RecipeError, match="Exactly one"):
        open_instructions(InstructionsConfig())
