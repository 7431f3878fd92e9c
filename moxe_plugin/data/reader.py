"""Reads rows of a dataset as batches: shuffled, sharded by rank, and resumable.

Everything is a function of ``(seed, epoch, position)``: there is no collective, the
state is a few integers, and all ranks reach the end of an epoch in the same step.
"""

from __future__ import annotations

from typing import Protocol, final

import numpy as np
from fairseq2.datasets import DataReader, SequenceBatch
from fairseq2.error import StateDictError
from fairseq2.gang import Gangs
from fairseq2.recipe.error import RecipeError
from numpy.typing import NDArray
from typing_extensions import Self, override


class RowSource(Protocol):
    """Rows of a dataset by index."""

    def __len__(self) -> int:
        """Count the rows."""

    def collate(self, indices: NDArray[np.int64]) -> SequenceBatch:
        """Make a batch of the rows at ``indices``.

        :param indices: Row numbers.

        :returns: The batch.
        """

    def compute_sha256(self) -> str:
        """Compute a digest that tells these rows from those of other data.

        :returns: The digest, in hexadecimal.
        """


@final
class RowReader(DataReader[SequenceBatch]):
    """Reads the rows of a :class:`RowSource`.

    A global batch is ``batch_size * gangs.dp.size`` consecutive rows of the epoch's
    order, of which rank ``r`` takes every ``dp.size``-th starting at ``r``.

    The state counts rows over all ranks, so a run may resume with another number of
    ranks: at most one global batch is then read again. It also holds what the order
    depends on; a run does not resume with other rows or another seed.

    :param rows: The rows. Unless ``drop_remainder``, their number must be a multiple
        of the number of ranks.
    :param gangs: Their ``dp`` gang gives the rank.
    :param batch_size: The number of rows in a batch of one rank.
    :param seed: The seed of the order.
    :param shuffle: Whether each epoch has an order of its own; otherwise rows come in
        theirs.
    :param drop_remainder: Whether rows that do not fill a global batch are left out.
    :param num_accumulate: The number of batches in a step; the last step of an epoch
        may have fewer, on all ranks alike.
    :param max_num_batches: The number of batches of one rank after which an epoch
        ends early.

    :raises RecipeError: There are too few rows for one batch.
    """

    def __init__(
        self,
        rows: RowSource,
        gangs: Gangs,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_remainder: bool,
        num_accumulate: int = 1,
        max_num_batches: int | None = None,
    ) -> None:
        self._rows = rows
        self._rank = gangs.dp.rank
        self._num_ranks = gangs.dp.size
        self._global_batch_size = batch_size * self._num_ranks
        self._seed = seed
        self._shuffle = shuffle
        self._num_accumulate = num_accumulate

        num_rows = len(rows)

        if drop_remainder:
            self._num_batches = num_rows // self._global_batch_size
        else:
            assert num_rows % self._num_ranks == 0

            self._num_batches = -(-num_rows // self._global_batch_size)

        if max_num_batches is not None:
            self._num_batches = min(self._num_batches, max_num_batches)

        if self._num_batches == 0:
            raise RecipeError(
                f"The dataset split has {num_rows} rows, fewer than one batch of "
                f"{batch_size} rows on {self._num_ranks} rank(s). Use a smaller batch "
                "size or sequence length, or more data."
            )

        self._epoch = 0
        self._batch_nr = 0
        self._order: NDArray[np.int64] | None = None

    @override
    def __iter__(self) -> Self:
        return self

    @override
    def __next__(self) -> list[SequenceBatch]:
        if self._batch_nr >= self._num_batches:
            raise StopIteration()

        stop = min(self._batch_nr + self._num_accumulate, self._num_batches)

        batches = [self._read_batch(nr) for nr in range(self._batch_nr, stop)]

        self._batch_nr = stop

        return batches

    def _read_batch(self, batch_nr: int) -> SequenceBatch:
        if self._order is None:
            self._order = self._make_order()

        start = batch_nr * self._global_batch_size
        stop = start + self._global_batch_size

        indices = self._order[start:stop][self._rank :: self._num_ranks]

        return self._rows.collate(indices)

    def _make_order(self) -> NDArray[np.int64]:
        num_rows = len(self._rows)

        if self._shuffle:
            rng = np.random.default_rng([self._seed, self._epoch])

            return rng.permutation(num_rows)

        return np.arange(num_rows)

    @override
    def reset(self) -> None:
        self._epoch += 1
        self._batch_nr = 0
        self._order = None

    @override
    def state_dict(self) -> dict[str, object]:
        return {
            "epoch": self._epoch,
            "position": self._batch_nr * self._global_batch_size,
            "num_rows": len(self._rows),
            "rows_sha256": self._rows.compute_sha256(),
            "seed": self._seed,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        state = dict(state_dict)

        epoch, position, num_rows, seed = (
            _pop_int(state, key) for key in ("epoch", "position", "num_rows", "seed")
        )

        rows_sha256 = state.pop("rows_sha256", None)

        StateDictError.raise_if_not_empty(state)

        if num_rows != len(self._rows):
            raise RecipeError(
                f"The dataset split had {num_rows} rows when the checkpoint was saved, "
                f"but has {len(self._rows)} now. Bring back the old data and sequence "
                "length, or choose another output directory."
            )

        if rows_sha256 != self._rows.compute_sha256():
            raise RecipeError(
                "The dataset split has other content than when the checkpoint was "
                "saved. Bring back the old data, or choose another output directory."
            )

        if seed != self._seed:
            raise RecipeError(
                f"The order of the data had the seed {seed} when the checkpoint was "
                f"saved, but has {self._seed} now. Bring back the old seed, or choose "
                "another output directory."
            )

        self._epoch = epoch
        self._batch_nr = position // self._global_batch_size
        self._order = None

    @property
    @override
    def num_accumulate(self) -> int:
        return self._num_accumulate

    @property
    def num_batches(self) -> int:
        """The number of batches of one rank in an epoch."""
        return self._num_batches

    @property
    def num_steps(self) -> int:
        """The number of steps in an epoch."""
        return -(-self._num_batches // self._num_accumulate)


def _pop_int(state: dict[str, object], key: str) -> int:
    value = state.pop(key, None)

    if not isinstance(value, int):
        raise StateDictError(f"`state_dict['{key}']` must be an integer.")

    return value
