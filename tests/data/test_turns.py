"""A conversation must be written as the instructions that a model is finetuned on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fairseq2.data.tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moxe_plugin.data.instruction_encoding import (
    Instruction,
    InstructionEncoder,
    Piece,
    read_instructions,
)
from moxe_plugin.data.tokenizer import HgTextTokenizerConfig, load_hg_text_tokenizer
from moxe_plugin.data.turns import (
    TurnEncoder,
    TurnFormat,
    detect_turn_format,
    find_turn_format,
)
from tests.common import EOS_IDX, ByteTokenizer
from tests.train.tiny_data import train_tokenizer

_TEMPLATE = (
    "{% for m in messages %}<|im|>{{ m.role }}\n{{ m.content | trim }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)

_EXCHANGES = [("Who?", "Me. "), ("And then?", " You."), ("Why so?", "No idea.")]


def _load_template_tokenizer(path: Path, template: str) -> Tokenizer:
    train_tokenizer(path)

    hg_tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    hg_tokenizer.chat_template = template
    hg_tokenizer.save_pretrained(path)

    return load_hg_text_tokenizer(path, HgTextTokenizerConfig())


def _write_conversation(tokenizer: Tokenizer, turn_format: TurnFormat) -> list[int]:
    """Write turns and answers one after the other, as a chat does."""
    encoder = TurnEncoder(tokenizer, turn_format)
    encode_as_is = tokenizer.create_encoder(mode="as_is")

    tokens: list[int] = []

    for number, (text, answer) in enumerate(_EXCHANGES):
        tokens += encoder.encode(_EXCHANGES[:number], text)
        tokens += encode_as_is(answer).tolist()

    return tokens


def _encode(tokenizer: Tokenizer, pieces: list[Piece], *, is_chat: bool) -> list[int]:
    encoder = InstructionEncoder(tokenizer)

    tokens: list[int] = encoder.encode(Instruction(pieces, is_chat)).tokens.tolist()

    return tokens


def test_instructions_follow_one_another() -> None:
    tokenizer = ByteTokenizer()

    expected = []
    for text, answer in _EXCHANGES:
        pieces = [Piece(text, "user"), Piece(answer, "assistant")]
        expected += _encode(tokenizer, pieces, is_chat=False)

    tokens = _write_conversation(tokenizer, "instruction")

    # The end of the last answer is read with the next turn.
    assert [*tokens, EOS_IDX] == expected


def test_questions_are_those_of_the_finetuning_data(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()

    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"question": "Two and two?", "answer": "4"}) + "\n")

    (instruction,) = read_instructions(file)
    question, answer = instruction.pieces

    tokens = TurnEncoder(tokenizer, "question").encode([], "Two and two?")

    assert tokens == tokenizer.create_encoder(mode="prompt")(question.text).tolist()
    assert answer.text == " 4"


def test_messages_name_the_roles() -> None:
    tokenizer = ByteTokenizer()

    pieces = []
    for text, answer in _EXCHANGES:
        pieces += [Piece(text, "user"), Piece(answer, "assistant")]

    tokens = _write_conversation(tokenizer, "messages")

    assert [*tokens, EOS_IDX] == _encode(tokenizer, pieces, is_chat=True)


def test_messages_follow_the_chat_template(tmp_path: Path) -> None:
    tokenizer = _load_template_tokenizer(tmp_path, _TEMPLATE)
    decode = tokenizer.create_decoder()

    encoder = TurnEncoder(tokenizer, "messages")

    first = encoder.encode([], "Who?")
    second = encoder.encode([("Who?", " Me. ")], "Then?")

    def to_text(tokens: list[int]) -> str:
        import torch

        return decode(torch.tensor(tokens))

    assert to_text(first) == "<|im|>user\nWho?<|endoftext|>\n<|im|>assistant\n"

    # Whatever the template does to the answer: the model has said it as it has.
    assert to_text(second) == (
        "<|endoftext|>\n<|im|>user\nThen?<|endoftext|>\n<|im|>assistant\n"
    )

    assert second[0] == tokenizer.vocab_info.eos_idx


def test_template_that_rewrites_messages_is_refused(tmp_path: Path) -> None:
    template = "{{ messages | length }}" + _TEMPLATE

    tokenizer = _load_template_tokenizer(tmp_path, template)

    with pytest.raises(ValueError, match="changes earlier messages"):
        TurnEncoder(tokenizer, "messages").encode([("Who?", "Me.")], "Then?")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"src": "a", "tgt": "b"}', "instruction"),
        ('{"question": "a", "answer": "b"}', "question"),
        ('{"messages": []}', "messages"),
        ('{"text": "a"}', None),
        ("{", None),
        ("", None),
    ],
    ids=["instruction", "question", "messages", "other", "no_json", "empty"],
)
def test_format_is_that_of_the_finetuning_data(
    tmp_path: Path, line: str, expected: str | None
) -> None:
    file = tmp_path / "learn.jsonl"
    file.write_text(f"\n{line}\n")

    assert detect_turn_format(file) == expected

    config = {"dataset": {"path": str(tmp_path), "train_split": "learn"}}

    found = find_turn_format(config, ByteTokenizer())

    assert found == (expected or "instruction")


def test_format_without_data_depends_on_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = _load_template_tokenizer(tmp_path / "tokenizer", _TEMPLATE)

    assert detect_turn_format(tmp_path / "train.jsonl") is None
    assert find_turn_format({}, tokenizer) == "messages"
    assert find_turn_format({"dataset": {"path": str(tmp_path)}}, tokenizer) == (
        "messages"
    )
    assert find_turn_format({}, ByteTokenizer()) == "instruction"
