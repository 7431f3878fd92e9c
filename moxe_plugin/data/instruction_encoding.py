"""Reads instructions from jsonl and turns them into tokens with a target mask."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from fairseq2.data.tokenizers import Tokenizer
from fairseq2.datasets import DatasetError
from numpy.typing import NDArray

from moxe_plugin.data.tokenizer import HgTextTokenizer

RESPONSE_ROLE: Final = "assistant"


@dataclass(frozen=True)
class Piece:
    """A piece of an instruction's text."""

    text: str
    """The text."""

    role: str
    """Who says it; ``assistant`` is what is learnt."""


@dataclass(frozen=True)
class Instruction:
    """A dialogue."""

    pieces: Sequence[Piece]
    """What is said, in order."""

    is_chat: bool
    """Whether it came as ``messages`` and not as one text and its response."""


@dataclass(frozen=True)
class EncodedInstruction:
    """An instruction as tokens."""

    tokens: NDArray[np.int64]
    """Token ids. *Shape:* ``(S)``."""

    target_mask: NDArray[np.bool_]
    """Which tokens are learnt; never the first. *Shape:* ``(S)``."""

    def cut(self, max_len: int) -> EncodedInstruction:
        """Keep the first tokens.

        :param max_len: The number of tokens to keep.

        :returns: The shorter instruction.
        """
        return EncodedInstruction(self.tokens[:max_len], self.target_mask[:max_len])

    def share(self, num_shares: int) -> list[EncodedInstruction]:
        """Split the targets, not the tokens, into shares.

        :param num_shares: The number of shares.

        :returns: Instructions with the same tokens and disjoint masks.
        """
        targets = np.flatnonzero(self.target_mask)

        shares = []

        for idx in range(num_shares):
            mask = np.zeros_like(self.target_mask)
            mask[targets[idx::num_shares]] = True
            shares.append(EncodedInstruction(self.tokens, mask))

        return shares

    @property
    def num_targets(self) -> int:
        """The number of tokens that are learnt."""
        return int(self.target_mask.sum())

    @property
    def has_targets(self) -> bool:
        """Whether any token is learnt."""
        return bool(self.target_mask.any())


class InstructionEncoder:
    """Encodes instructions with the tokenizer's modes or chat template.

    A text and its response become ``prompt`` and ``prompt_response`` encodings, as in
    fairseq2. ``messages`` follow the tokenizer's chat template if it has one; otherwise
    they become BOS, then per message ``Role:``, a space and its content, with a newline
    after the content, or EOS after a response.

    :param tokenizer: The tokenizer; chat templates need a ``moxe_hg`` one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode_prompt = tokenizer.create_encoder(mode="prompt")
        self._encode_response = tokenizer.create_encoder(mode="prompt_response")
        self._encode_as_is = tokenizer.create_encoder(mode="as_is")
        self._eos_idx = tokenizer.vocab_info.eos_idx

        self._hg_tokenizer: Any = None
        if (
            isinstance(tokenizer, HgTextTokenizer)
            and tokenizer.hg_tokenizer.chat_template
        ):
            self._hg_tokenizer = tokenizer.hg_tokenizer

    def encode(self, instruction: Instruction) -> EncodedInstruction:
        """Encode an instruction.

        :param instruction: The instruction.

        :returns: Its tokens; the mask covers responses with their EOS.
        """
        if not instruction.is_chat:
            parts = [self._encode_prompt(p.text) for p in instruction.pieces[:-1]]
            parts.append(self._encode_response(instruction.pieces[-1].text))
            are_targets = [False] * (len(parts) - 1) + [True]
        elif self._hg_tokenizer is not None:
            pieces = self._apply_chat_template(instruction.pieces)
            parts = [self._encode_as_is(text) for text, _ in pieces]
            are_targets = [is_target for _, is_target in pieces]
        else:
            parts, are_targets = [self._encode_prompt("")], [False]

            for piece in instruction.pieces:
                parts.append(self._encode_as_is(f"{piece.role.capitalize()}: "))
                are_targets.append(False)

                is_target = piece.role == RESPONSE_ROLE
                if is_target:
                    parts.append(self._encode_response(piece.text))
                else:
                    parts.append(self._encode_as_is(piece.text + "\n"))
                are_targets.append(is_target)

        tokens = np.concatenate([p.numpy() for p in parts])

        mask = np.repeat(are_targets, [len(p) for p in parts])
        mask[:1] = False

        if instruction.is_chat and self._hg_tokenizer is not None:
            tokens, mask = self._ensure_eos(tokens, mask)

        return EncodedInstruction(tokens, mask)

    def _apply_chat_template(self, pieces: Sequence[Piece]) -> list[tuple[str, bool]]:
        messages = [{"role": p.role, "content": p.text} for p in pieces]

        output: list[tuple[str, bool]] = []
        rendered = ""

        def append(num_messages: int, is_prompt: bool, is_target: bool) -> None:
            nonlocal rendered

            text = self._hg_tokenizer.apply_chat_template(
                messages[:num_messages],
                tokenize=False,
                add_generation_prompt=is_prompt,
            )

            if not text.startswith(rendered):
                raise DatasetError(
                    "The chat template of the tokenizer changes earlier messages when "
                    "one is appended, so responses cannot be told from prompts."
                )

            if len(text) > len(rendered):
                output.append((text[len(rendered) :], is_target))

            rendered = text

        for idx, message in enumerate(messages):
            if message["role"] == RESPONSE_ROLE:
                if idx > 0:
                    append(idx, is_prompt=True, is_target=False)

                append(idx + 1, is_prompt=False, is_target=True)

        return output

    def _ensure_eos(
        self, tokens: NDArray[np.int64], mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        # Templates may write a newline after the end of a turn.
        if self._eos_idx is None or self._eos_idx in tokens[-2:]:
            return tokens, mask

        return np.append(tokens, self._eos_idx), np.append(mask, True)


def read_instructions(file: Path) -> Iterator[Instruction]:
    """Read the instructions of a split.

    A line has ``src`` and ``tgt``, ``question`` and ``answer``, or ``messages``. A
    question and its answer, as GSM8K has them, become what lm-evaluation-harness' task
    ``gsm8k`` asks and expects: ``Question: ...``, a newline, ``Answer:``, and the
    answer after a space.

    :param file: A jsonl file.

    :yields: The instructions, in order.

    :raises DatasetError: A line is not an instruction.
    """
    # Bytes: a line that is not UTF-8 must be told by its number too.
    with file.open("rb") as fp:
        for line_nr, line in enumerate(fp, start=1):
            if not line.strip():
                continue

            try:
                yield _parse(json.loads(line))
            except UnicodeDecodeError:
                raise DatasetError(
                    f"{file}:{line_nr} is not UTF-8. Convert the file first, for "
                    "example with `iconv -t UTF-8`."
                ) from None
            except json.JSONDecodeError as ex:
                raise DatasetError(f"{file}:{line_nr} is not JSON: {ex}") from None
            except ValueError as ex:
                raise DatasetError(f"{file}:{line_nr}: {ex}") from ex


def format_question(question: str) -> str:
    """Write a question as lm-evaluation-harness' task ``gsm8k`` does.

    :param question: The question.

    :returns: What comes before the answer.
    """
    return f"Question: {question}\nAnswer:"


def _parse(data: Any) -> Instruction:
    if not isinstance(data, dict):
        raise ValueError("a line must be a JSON object.")

    if "messages" in data:
        return Instruction(_parse_messages(data["messages"]), is_chat=True)

    match data:
        case {"src": str(src), "tgt": str(tgt)}:
            pass
        case {"question": str(question), "answer": str(answer)}:
            src, tgt = format_question(question), f" {answer}"
        case _:
            raise ValueError(
                "a line must have the texts `src` and `tgt`, or `question` and "
                "`answer`, or `messages`, but has "
                f"{', '.join(data) or 'nothing'} instead."
            )

    pieces = [Piece(src, "user"), Piece(tgt, RESPONSE_ROLE)]

    return Instruction(pieces, is_chat=False)


def _parse_messages(messages: Any) -> list[Piece]:
    if not isinstance(messages, list):
        raise ValueError("`messages` must be a list.")

    pieces = []

    for message in messages:
        match message:
            case {"role": str(role), "content": str(content)}:
                pieces.append(Piece(content, role))
            case _:
                raise ValueError("a message must have the texts `role` and `content`.")

    if all(p.role != RESPONSE_ROLE for p in pieces):
        raise ValueError(f"`messages` must have one of the role {RESPONSE_ROLE}.")

    return pieces
