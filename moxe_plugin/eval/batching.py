"""Which sequences are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch

_MAX_TOKENS: Final = 2**14
_MAX_SCORED_TOKENS_ON_CPU: Final = 2**10
"""What a cache holds: a processor scores larger batches at about half the speed."""
_MAX_LOGITS: Final = 2**28
"""1 GiB in float32."""
_MAX_STATE_BYTES: Final = 2**30
_MAX_GENERATING_STATE_BYTES: Final = 2**32
"""On a GPU, which has no other states than those of one batch meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Groups sequences of similar length.

    ``"auto"`` puts as many sequences into a batch as have, padded, at most
    ``max_tokens``, 2**28 logits and ``max_state_bytes``, and at least one. Nothing is
    measured: the same sequences give the same batches on every machine with a device of
    the same kind.
    """

    batch_size: int | str
    """The number of sequences in a batch, or ``"auto"``. The harness' ``"auto:N"`` is
    the same: ``N`` is how often to measure, which is never done here."""

    vocab_size: int
    """The number of logits per token."""

    max_batch_size: int | None = None
    """The most sequences that ``"auto"`` may put together."""

    max_tokens: int = _MAX_TOKENS
    """The most tokens, with padding, that ``"auto"`` may put together."""

    max_state_bytes: int = _MAX_STATE_BYTES
    """The most bytes of recurrent states that ``"auto"`` may put together."""

    def __post_init__(self) -> None:
        """Check the sizes.

        :raises ValueError: ``batch_size`` is neither positive nor ``"auto"``.
        """
        text = str(self.batch_size)

        if not self._is_auto and not (text.isdecimal() and int(text) >= 1):
            raise ValueError(
                "`batch_size` must be a positive number or 'auto', but is "
                f"'{self.batch_size}' instead."
            )

    @property
    def _is_auto(self) -> bool:
        text = str(self.batch_size)

        return text == "auto" or text.startswith("auto:")

    def make_batches(
        self, lengths: Sequence[int], state_bytes: int = 0
    ) -> list[list[int]]:
        """Group sequences, the longest first.

        :param lengths: The length of each sequence in tokens.
        :param state_bytes: The size of the recurrent state that is kept of a sequence.

        :returns: Indices into ``lengths``; each occurs in exactly one batch.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

        batches: list[list[int]] = []
        begin = 0

        while begin < len(order):
            size = self._size_for(lengths[order[begin]], state_bytes)
            batches.append(order[begin : begin + size])
            begin += size

        return batches

    def _size_for(self, length: int, state_bytes: int) -> int:
        if not self._is_auto:
            return int(self.batch_size)

        num_tokens = min(self.max_tokens, _MAX_LOGITS // self.vocab_size)
        size = num_tokens // max(1, length)

        if state_bytes > 0:
            size = min(size, self.max_state_bytes // state_bytes)

        size = max(1, size)

        return size if self.max_batch_size is None else min(size, self.max_batch_size)


class Batchings(NamedTuple):
    """What is computed together for each kind of request."""

    scoring: Batching
    """For log-likelihoods."""

    generating: Batching
    """For continuations."""


def make_batchings(
    batch_size: int | str,
    max_batch_size: int | None,
    *,
    vocab_size: int,
    device: torch.device,
) -> Batchings:
    """Set the limits of batches on a device.

    :param batch_size: As in :class:`Batching`.
    :param max_batch_size: As in :class:`Batching`.
    :param vocab_size: As in :class:`Batching`.
    :param device: Where the model is.

    :returns: The batchings.

    :raises ValueError: ``batch_size`` is neither positive nor ``"auto"``.
    """
    batching = Batching(
        batch_size=batch_size, vocab_size=vocab_size, max_batch_size=max_batch_size
    )

    if device.type == "cpu":
        return Batchings(
            replace(batching, max_tokens=_MAX_SCORED_TOKENS_ON_CPU), batching
        )

    return Batchings(
        batching, replace(batching, max_state_bytes=_MAX_GENERATING_STATE_BYTES)
    )
