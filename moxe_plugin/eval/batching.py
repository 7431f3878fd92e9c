"""Which sequences are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_TOKENS: Final = 2**14
MAX_TOKENS_ON_CPU: Final = 2**10
"""What a cache holds: a processor scores larger batches at about half the speed."""
_MAX_LOGITS: Final = 2**28
"""1 GiB in float32."""
_MAX_STATE_BYTES: Final = 2**30


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Groups sequences of similar length.

    ``"auto"`` puts as many sequences into a batch as have, padded, at most
    ``max_tokens`` and 2**28 logits, and at least one. Nothing is measured: the same
    sequences give the same batches on every machine with a device of the same kind.
    """

    batch_size: int | str
    """The number of sequences in a batch, or ``"auto"``. The harness' ``"auto:N"`` is
    the same: ``N`` is how often to measure, which is never done here."""

    vocab_size: int
    """The number of logits per token."""

    max_batch_size: int | None = None
    """The most sequences that ``"auto"`` may put together."""

    max_tokens: int = MAX_TOKENS
    """The most tokens, with padding, that ``"auto"`` may put together."""

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
            size = min(size, _MAX_STATE_BYTES // state_bytes)

        size = max(1, size)

        return size if self.max_batch_size is None else min(size, self.max_batch_size)
