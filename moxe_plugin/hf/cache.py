"""What a recurrent model remembers between two calls."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, final

from torch import Tensor

if TYPE_CHECKING:
    from fairseq2.nn import IncrementalStateBag


@final
class RecurrentCache:
    """Holds the recurrent states of a batch: ``past_key_values`` of our models.

    Its size does not depend on how many tokens were read. It cannot be cut back to an
    earlier token.
    """

    def __init__(self) -> None:
        # fairseq2 takes seconds to import.
        from fairseq2.nn import IncrementalStateBag

        # A recurrent state has no capacity that could be exceeded.
        self._state_bag = IncrementalStateBag(max_num_steps=sys.maxsize)

    @property
    def state_bag(self) -> IncrementalStateBag:
        """The states by module."""
        return self._state_bag

    def get_seq_length(self) -> int:
        """Tell how many columns of token ids were read, padding included.

        :returns: The number of columns.
        """
        return self._state_bag.step_nr

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each row of the batch the state of another, as beam search asks.

        :param beam_idx: Which rows; one may occur several times. *Shape:* ``(N)``.
        """
        self._state_bag.reorder(beam_idx)

    def size_bytes(self) -> int:
        """Count the bytes of the states.

        :returns: The sum over all modules and rows.
        """
        return self._state_bag.size_bytes()
