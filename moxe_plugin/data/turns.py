"""Turns of a conversation as tokens, in the formats of instructions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from fairseq2.data.tokenizers import Tokenizer

from moxe_plugin.data.instruction_encoding import (
    RESPONSE_ROLE,
    format_question,
)
from moxe_plugin.data.tokenizer import HgTextTokenizer

TurnFormat: TypeAlias = Literal["instruction", "question", "messages"]
"""``instruction`` writes the text as it is; ``question`` as GSM8K's questions are
finetuned on; ``messages`` by the chat template of the tokenizer or as
``User: ...``, a newline, and ``Assistant:`` with a space."""

TURN_FORMATS: Final[tuple[TurnFormat, ...]] = get_args(TurnFormat)

_USER_ROLE: Final = "user"


class TurnEncoder:
    """Encodes what a model reads before each of its answers.

    With the answers in between, the tokens are those that
    :class:`~moxe_plugin.data.instruction_encoding.InstructionEncoder` makes of the
    conversation; instructions and questions follow one another.

    :param tokenizer: The tokenizer; chat templates need a ``moxe_hg`` one.
    :param turn_format: How a text is written.
    """

    def __init__(self, tokenizer: Tokenizer, turn_format: TurnFormat) -> None:
        self._format = turn_format
        self._encode_prompt = tokenizer.create_encoder(mode="prompt")
        self._encode_as_is = tokenizer.create_encoder(mode="as_is")
        self._eos_idx = tokenizer.vocab_info.eos_idx

        self._hg_tokenizer: Any = None
        if turn_format == "messages" and has_chat_template(tokenizer):
            assert isinstance(tokenizer, HgTextTokenizer)

            self._hg_tokenizer = tokenizer.hg_tokenizer

    def encode(self, history: Sequence[tuple[str, str]], text: str) -> list[int]:
        """Encode what comes between the last answer and the next.

        :param history: What was said so far, as pairs of a text and its answer.
        :param text: The text to answer.

        :returns: Token ids. The end of the last answer, which models do not read when
            they generate it, is the first of them.

        :raises ValueError: The chat template changes earlier messages.
        """
        if self._hg_tokenizer is not None:
            rendered = self._render_next(history, text)

            return self._encode_as_is(rendered).tolist()

        end = [] if self._eos_idx is None or not history else [self._eos_idx]

        match self._format:
            case "instruction":
                tokens = self._encode_prompt(text).tolist()
            case "question":
                tokens = self._encode_prompt(format_question(text)).tolist()
            case "messages":
                # As instructions: a piece's tokens do not depend on its neighbours.
                pieces = [f"{_USER_ROLE.capitalize()}: ", text + "\n"]
                pieces.append(f"{RESPONSE_ROLE.capitalize()}: ")

                tokens = [] if history else self._encode_prompt("").tolist()
                for piece in pieces:
                    tokens += self._encode_as_is(piece).tolist()

        return [*end, *tokens]

    def _render_next(self, history: Sequence[tuple[str, str]], text: str) -> str:
        if not history:
            return self._render([(text, None)])

        # What templates make of an answer, strip it for example, does not matter here.
        *earlier, (last_text, _) = history

        before = self._render([*earlier, (last_text, None)]) + _ANY_ANSWER
        after = self._render([*earlier, (last_text, _ANY_ANSWER), (text, None)])

        if not after.startswith(before):
            raise ValueError(
                "The chat template of the tokenizer changes earlier messages when one "
                "is appended, so a conversation cannot be continued."
            )

        return after[len(before) :]

    def _render(self, exchanges: Sequence[tuple[str, str | None]]) -> str:
        messages = []

        for text, answer in exchanges:
            messages.append({"role": _USER_ROLE, "content": text})
            if answer is not None:
                messages.append({"role": RESPONSE_ROLE, "content": answer})

        rendered = self._hg_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert isinstance(rendered, str)

        return rendered


_ANY_ANSWER: Final = "answer"


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Tell whether messages follow a template of the tokenizer.

    :param tokenizer: The tokenizer.

    :returns: Whether it has a chat template.
    """
    return isinstance(tokenizer, HgTextTokenizer) and bool(
        tokenizer.hg_tokenizer.chat_template
    )


def detect_turn_format(file: Path) -> TurnFormat | None:
    """Tell in which format the instructions of a file are.

    :param file: A jsonl file of instructions; it need not exist.

    :returns: The format of its first line; ``None`` if there is none, or none that is
        an instruction.
    """
    try:
        with file.open(encoding="utf-8") as fp:
            line = next((line for line in fp if line.strip()), "null")

        data = json.loads(line)
    except (OSError, ValueError):
        return None

    match data:
        case {"messages": _}:
            return "messages"
        case {"src": _}:
            return "instruction"
        case {"question": _}:
            return "question"
        case _:
            return None


def find_turn_format(
    recipe_config: Mapping[str, Any], tokenizer: Tokenizer
) -> TurnFormat:
    """Find the format that a model was finetuned on.

    :param recipe_config: The configuration of its training, empty if not known.
    :param tokenizer: Its tokenizer.

    :returns: The format of the training data, if it is still where the training had it;
        otherwise ``messages`` if the tokenizer has a chat template, or ``instruction``.
    """
    section = recipe_config.get("dataset") or {}

    if (path := section.get("path")) is not None:
        split = section.get("train_split", "train")

        turn_format = detect_turn_format(Path(path) / f"{split}.jsonl")
        if turn_format is not None:
            return turn_format

    return "messages" if has_chat_template(tokenizer) else "instruction"
