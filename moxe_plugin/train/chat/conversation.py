"""A conversation with a model, whose state goes from one answer to the next."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import torch
from fairseq2.data.tokenizers import Tokenizer
from fairseq2.generation import SequenceGenerator
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from typing_extensions import override

from moxe_plugin.data.turns import TurnEncoder
from moxe_plugin.models.captured_steps import capture_steps
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.train.generate.text_stream import TextStream


class AnswerInterrupted(Exception):
    """An answer is not wanted any more; the state is between two tokens."""


@final
class CarriedModel(CausalLM):
    """Lets each generation begin with the state in which the last one ended.

    :param model: The model, in evaluation mode.
    """

    def __init__(self, model: CausalLM) -> None:
        # A conversation itself minds the length of its context.
        super().__init__(max_seq_len=sys.maxsize)

        self.model = model
        self.tokens: list[int] = []
        self.is_interrupted = False
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.tokens = []
        self._state_bag = IncrementalStateBag(sys.maxsize)
        self._is_damaged = False

    @property
    def is_damaged(self) -> bool:
        """Whether a call broke off, so that the state fits no tokens."""
        return self._is_damaged

    @override
    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        targets: Tensor | None = None,
        *,
        state_bag: IncrementalStateBag | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read tokens after all those that were read before.

        :param seqs: Token ids. *Shape:* ``(1,S)``.
        :param seqs_layout: Their layout.
        :param targets: Not used.
        :param state_bag: Not used.
        :param kwargs: Not used.

        :returns: The logits. *Shape:* ``(1,S,V)``.

        :raises AnswerInterrupted: ``is_interrupted`` is set.
        """
        if self.is_interrupted:
            raise AnswerInterrupted

        self._is_damaged = True

        logits = self.model(seqs, seqs_layout, state_bag=self._state_bag)

        self._state_bag.increment_step_nr(seqs.size(1))
        self.tokens += seqs[0].tolist()

        self._is_damaged = False

        return logits

    if TYPE_CHECKING:
        __call__ = forward


class Exchange(NamedTuple):
    """A text and the answer to it."""

    text: str
    """What was said."""

    answer: str
    """What the model said."""

    tokens: list[int]
    """The answer as tokens, without the one that ends it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered, and why no more."""

    text: str
    """The answer."""

    num_tokens: int
    """Its tokens, without the one that ends it."""

    ended_by: Literal["eos", "length", "interrupt"]
    """The model itself, the limit of ``max_gen_len`` or of the context, or the user."""


GeneratorFactory = Callable[[CausalLM, int], SequenceGenerator]
"""Creates a generator of at most so many tokens, the last of which ends the text."""


@final
class Conversation:
    """Answers one text after the other.

    :param model: The model; its state, or its cache, goes from one answer to the next.
    :param tokenizer: Its tokenizer.
    :param encoder: Writes turns.
    :param create_generator: Creates the generator of an answer.
    :param max_gen_len: The most tokens of an answer, the one that ends it included.
    :param context_len: The most tokens that the model sees; ``None`` if it may see any
        number, as a recurrent model.
    :param on_forget: Called when, for the first time, the oldest exchanges do not fit
        into the context any more and are dropped.
    """

    def __init__(
        self,
        model: AuxLossCausalLM,
        tokenizer: Tokenizer,
        encoder: TurnEncoder,
        create_generator: GeneratorFactory,
        *,
        max_gen_len: int,
        context_len: int | None,
        on_forget: Callable[[], None],
    ) -> None:
        self._carried = CarriedModel(capture_steps(model.eval()))
        self._device = next(model.parameters()).device
        self._decode = tokenizer.create_decoder(skip_special_tokens=True)
        self._eos_idx = tokenizer.vocab_info.eos_idx
        self._encoder = encoder
        self._create_generator = create_generator
        self._max_gen_len = max_gen_len
        self._context_len = context_len
        self._on_forget = on_forget

        self._history: list[Exchange] = []
        self._has_forgotten = False

    @property
    def history(self) -> tuple[Exchange, ...]:
        """What the model remembers of the conversation."""
        return tuple(self._history)

    @property
    def num_read_tokens(self) -> int:
        """The number of tokens that made the state of the model."""
        return len(self._carried.tokens)

    def reset(self) -> None:
        """Forget everything."""
        self._history = []
        self._has_forgotten = False
        self._carried.reset()

    def interrupt(self) -> None:
        """End the current answer before its next token; may be called at any time."""
        self._carried.is_interrupted = True

    def answer(self, text: str, on_piece: Callable[[str], None]) -> Answer:
        """Answer a text.

        :param text: The text.
        :param on_piece: Gets the answer while it grows.

        :returns: The answer.

        :raises ValueError: The text has no tokens, or leaves no room for an answer.
        """
        carried = self._carried
        carried.is_interrupted = False

        context = self._fit_context(text)

        # Between the answers lies what the model has read already, as a rule.
        num_read = len(carried.tokens)
        if carried.is_damaged or context[:num_read] != carried.tokens:
            carried.reset()
            num_read = 0

        max_gen_len = self._max_gen_len
        if self._context_len is not None:
            max_gen_len = min(max_gen_len, self._context_len - len(context))

        generator = self._create_generator(carried, max_gen_len)

        stream, tokens = TextStream(self._decode), list[int]()
        ended_by: Literal["eos", "length", "interrupt"] = "length"

        def on_token(seqs: Tensor, prefill: bool) -> None:
            token = int(seqs[0, -1])

            if not prefill and token != self._eos_idx:
                tokens.append(token)
                on_piece(stream.push(token))

        generator.register_step_hook(
            lambda _, seqs, __, prefill: on_token(seqs, prefill)
        )

        seqs = torch.tensor([context[num_read:]], device=self._device)

        try:
            generator(seqs, BatchLayout.of(seqs))
        except AnswerInterrupted:
            ended_by = "interrupt"
        else:
            # The generator writes the end where the limit is.
            if len(tokens) + 1 < max_gen_len:
                ended_by = "eos"

        on_piece(stream.finish())

        self._history.append(Exchange(text, stream.text, tokens))

        return Answer(text=stream.text, num_tokens=len(tokens), ended_by=ended_by)

    def _fit_context(self, text: str) -> list[int]:
        """Write down all that the model is to have read before it answers."""
        context = self._write_context(self._history, text)

        if not text or not context:
            raise ValueError("The text must not be empty.")

        if self._context_len is None:
            return context

        num_dropped = 0
        while len(context) + self._max_gen_len > self._context_len:
            if num_dropped == len(self._history):
                break

            num_dropped += 1
            context = self._write_context(self._history[num_dropped:], text)

        if len(context) >= self._context_len:
            raise ValueError(
                f"The text must have at most {self._context_len - 1} tokens, as many "
                f"as fit into the context before an answer, but has {len(context)}."
            )

        if num_dropped > 0:
            self._history = self._history[num_dropped:]

            if not self._has_forgotten:
                self._has_forgotten = True
                self._on_forget()

        return context

    def _write_context(self, history: list[Exchange], text: str) -> list[int]:
        context: list[int] = []
        said: list[tuple[str, str]] = []

        for exchange in history:
            context += self._encoder.encode(said, exchange.text)
            context += exchange.tokens
            said.append((exchange.text, exchange.answer))

        return context + self._encoder.encode(said, text)
