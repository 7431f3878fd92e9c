"""Reads what the user says, and writes what the model answers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Final, TextIO, final

import torch
from fairseq2.logging import log
from fairseq2.recipe.error import RecipeError
from fairseq2.task import Task
from typing_extensions import override

from moxe_plugin.train.chat.conversation import Answer, Conversation

RESET: Final = "/reset"
EXIT: Final = "/exit"

_PROMPT: Final = "> "

_VISIBLE: Final = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    127: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""Pictures of control characters."""


@final
class ChatTask(Task):
    """Holds a conversation on a terminal, or with another program.

    Where both ends are a terminal, lines can be edited and Ctrl-C ends an answer.
    Elsewhere each line is a turn, and the answers are all that is written.

    :param conversation: The conversation.
    :param source: Where the user's lines come from.
    :param sink: Gets the answers.
    :param transcript: Gets a JSON object per answer.
    :param greeting: What a user at a terminal is told.
    :param trained_len: The length of sequences in the training of a model whose context
        has no limit; the user is told once when the conversation is longer.
    :param writes_json: Whether ``sink`` gets JSON objects, too.
    :param seed: Seeds the choice of tokens.
    """

    def __init__(
        self,
        conversation: Conversation,
        source: TextIO,
        sink: TextIO,
        transcript: TextIO,
        *,
        greeting: str,
        trained_len: int,
        writes_json: bool,
        seed: int,
    ) -> None:
        self._conversation = conversation
        self._source = source
        self._sink = sink
        self._transcript = transcript
        self._greeting = greeting
        self._trained_len = trained_len
        self._writes_json = writes_json
        self._seed = seed

        self._is_interactive = source.isatty() and sink.isatty()
        self._is_told_of_length = False
        self._stop_requested = False
        self._step_nr = 0

    @override
    def run(self) -> None:
        torch.manual_seed(self._seed)

        lines = self._read_lines()

        if self._is_interactive:
            self._sink.write(f"{self._greeting}\n")
            lines = self._prompt_for_lines()

        with self._transcript:
            for line in lines:
                text = line.strip()

                if text == EXIT or self._stop_requested:
                    return

                if text == RESET:
                    self._conversation.reset()
                elif text:
                    self._step_nr += 1
                    self._take_turn(text)

    def _read_lines(self) -> Iterator[str]:
        yield from self._source

    def _prompt_for_lines(self) -> Iterator[str]:
        # Importing it gives `input` editing and a history.
        import readline  # noqa: F401

        while True:
            try:
                yield input(_PROMPT)
            except EOFError:
                self._sink.write("\n")

                return
            except KeyboardInterrupt:
                # As in a shell: the line is given up.
                self._sink.write("\n")

    def _take_turn(self, text: str) -> None:
        def write(piece: str) -> None:
            if self._is_interactive:
                # What a model says must not command the terminal.
                piece = piece.translate(_VISIBLE)

            if piece and not self._writes_json:
                self._sink.write(piece)
                self._sink.flush()

        try:
            with _interrupts(self._conversation.interrupt):
                answer = self._conversation.answer(text, write)
        except ValueError as ex:
            if not self._is_interactive:
                # With a cause, fairseq2 logs a stack trace.
                raise RecipeError(f"Turn {self._step_nr}: {ex}") from None

            self._sink.write(f"{ex}\n")
        except KeyboardInterrupt:
            # The second one, in the middle of a token.
            if not self._is_interactive:
                raise

            self._sink.write("\n")
        else:
            self._record(text, answer)

            if answer.ended_by == "interrupt" and not self._is_interactive:
                raise KeyboardInterrupt

    def _record(self, text: str, answer: Answer) -> None:
        record = {"prompt": text, **asdict(answer)}
        line = json.dumps(record, ensure_ascii=False) + "\n"

        self._transcript.write(line)
        self._transcript.flush()

        self._sink.write(line if self._writes_json else "\n")
        self._sink.flush()

        num_tokens = self._conversation.num_read_tokens

        if num_tokens > self._trained_len and not self._is_told_of_length:
            self._is_told_of_length = True

            log.warning("The conversation has {} tokens by now, more than the {} of a sequence that the model is made for. {} begins a new one.", num_tokens, self._trained_len, RESET)  # fmt: skip  # noqa: E501

    @override
    def request_stop(self) -> None:
        self._stop_requested = True

        self._conversation.interrupt()

    @override
    def close(self) -> None:
        self._transcript.close()

    @property
    @override
    def step_nr(self) -> int:
        return self._step_nr


@contextmanager
def _interrupts(interrupt: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call a function, and only from the second time on do what it does."""
    original = signal.getsignal(signal.SIGINT)

    def handle(_signum: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, original)

        interrupt()

    signal.signal(signal.SIGINT, handle)

    try:
        yield
    finally:
        signal.signal(signal.SIGINT, original)
