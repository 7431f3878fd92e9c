"""The dataset family ``moxe_tokens``: windows of a token stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

import numpy as np
import torch
from fairseq2.data.tokenizers import Tokenizer
from fairseq2.datasets import SequenceBatch
from fairseq2.gang import Gangs
from fairseq2.recipe.error import RecipeError, SplitNotKnownError
from fairseq2.utils.validation import Validatable, ValidationResult
from numpy.typing import NDArray

from moxe_plugin.data.reader import RowReader, RowSource
from moxe_plugin.data.shards import TokenShards, TokenStream, open_shards
from moxe_plugin.data.tokenizer import HgTextTokenizer

MOXE_TOKENS_FAMILY: Final = "moxe_tokens"


@dataclass(kw_only=True)
class TokensConfig(Validatable):
    """Where the token shards are."""

    path: Path | None = None
    """A directory made by ``moxe data build``."""

    embedded: Literal["quickstart", "full"] | None = None
    """The embedded corpus of this size instead; it is built on first use."""

    verify: bool = False
    """Whether to compare the digest of every file with the manifest when opening."""

    def validate(self) -> ValidationResult:
        """Check that exactly one source is given.

        :returns: The errors found.
        """
        result = ValidationResult()

        if (self.path is None) == (self.embedded is None):
            result.add_error("Exactly one of `path` and `embedded` must be specified.")

        return result


@final
class TokensDataset:
    """A directory of token shards, read as windows for language modelling.

    :param name: What error messages call the dataset.
    :param shards: The open directory.
    """

    def __init__(self, name: str, shards: TokenShards) -> None:
        self._name = name
        self._shards = shards

    def create_reader(
        self,
        split: str,
        gangs: Gangs,
        *,
        batch_size: int,
        seq_len: int,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_remainder: bool | None = None,
        num_accumulate: int = 1,
        max_num_batches: int | None = None,
    ) -> RowReader:
        """Read a split as windows of ``seq_len + 1`` tokens with stride ``seq_len``.

        After ``SequenceBatch.as_auto_regressive()`` a batch is ``(N,S)`` seqs and
        ``(N,S)`` targets. There is no padding.

        For training (``shuffle=True``) rows are whole windows, in an order of their
        own in each epoch; what does not fill a window or a global batch is left out.
        For validation (``shuffle=False``) every token of the split but its first is a
        target exactly once, whatever the number of ranks; the last windows overlap
        their neighbours and carry a ``target_mask`` that counts no target twice, and
        every batch of every rank has targets.

        :param split: The name of the split.
        :param gangs: Their ``dp`` gang gives the rank.
        :param batch_size: The number of windows in a batch of one rank.
        :param seq_len: The number of targets in a window.
        :param tokenizer: Checked to be the one the shards were made with, if given.
        :param seed: The seed of the order.
        :param shuffle: Whether each epoch has an order of its own.
        :param drop_remainder: Whether only full windows and full global batches are
            read; ``None`` means as ``shuffle``.
        :param num_accumulate: The number of batches in a step.
        :param max_num_batches: The number of batches after which an epoch ends early.

        :returns: The reader.

        :raises SplitNotKnownError: There is no such split.
        :raises RecipeError: The split is too small, or the tokenizer is another one.
        """
        self.check_split(split)

        if tokenizer is not None:
            self._check_tokenizer(tokenizer)

        if drop_remainder is None:
            drop_remainder = shuffle

        stream = self._shards.stream(split)

        rows: RowSource
        if drop_remainder:
            rows = TrainWindows(stream, seq_len)
        else:
            rows = EvalWindows(stream, seq_len, gangs.dp.size)

        return RowReader(
            rows,
            gangs,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_remainder=drop_remainder,
            num_accumulate=num_accumulate,
            max_num_batches=max_num_batches,
        )

    def check_split(self, split: str) -> None:
        """Check that a split exists.

        :param split: The name of the split.

        :raises SplitNotKnownError: There is no such split.
        """
        if split not in self.splits:
            raise SplitNotKnownError(self._name, split, self.splits)

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        manifest = self._shards.manifest

        if isinstance(tokenizer, HgTextTokenizer):
            same = tokenizer.sha256 == manifest.tokenizer_sha256
        else:
            same = tokenizer.vocab_info.size == manifest.vocab_size

        if not same:
            raise RecipeError(
                f"The {self._name} dataset was made with another tokenizer "
                f"({manifest.tokenizer_name}, {manifest.vocab_size} entries) than the "
                f"one of this run ({tokenizer.vocab_info.size} entries). Set "
                "`tokenizer` to the former or build the shards again."
            )

    @property
    def splits(self) -> Sequence[str]:
        """The names of the splits."""
        return list(self._shards.manifest.splits)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary the tokens come from."""
        return self._shards.manifest.vocab_size

    @property
    def shards(self) -> TokenShards:
        """The open directory; its manifest has token and byte counts."""
        return self._shards


def open_tokens(config: TokensConfig) -> TokensDataset:
    """Open the dataset a configuration describes.

    :param config: The configuration.

    :returns: The dataset.

    :raises RecipeError: Not exactly one source is given, or ``path`` does not exist.
    """
    if config.embedded is not None and config.path is None:
        from moxe_plugin.data.corpus import prepare_embedded

        path = prepare_embedded(config.embedded).tokens_dir
    elif config.path is not None and config.embedded is None:
        path = config.path
    else:
        raise RecipeError(
            f"Exactly one of `path` and `embedded` of the {MOXE_TOKENS_FAMILY} dataset "
            "must be specified."
        )

    if not path.is_dir():
        raise RecipeError(
            f"{path} is not a directory of token shards. Build one with "
            "`moxe data build`."
        )

    return TokensDataset(str(path), open_shards(path, verify=config.verify))


class TrainWindows:
    """The full windows of a stream: row ``i`` is tokens ``[i*S, i*S + S]``.

    :param stream: The tokens.
    :param seq_len: ``S``, the number of targets in a window.
    """

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self._stream = stream
        self._seq_len = seq_len

    def __len__(self) -> int:
        """Count the rows."""
        return max(0, len(self._stream) - 1) // self._seq_len

    def collate(self, indices: NDArray[np.int64]) -> SequenceBatch:
        """Make a batch of windows.

        :param indices: Row numbers.

        :returns: The batch. *Shape of seqs:* ``(N,S+1)``.
        """
        starts = indices * self._seq_len

        return SequenceBatch(_read_rows(self._stream, starts, self._seq_len + 1), None)


class EvalWindows:
    """Windows that make every token but the first a target exactly once.

    The number of rows is a multiple of ``num_ranks``: as many full windows as give
    every rank the same number, then what is left in equal parts of at least one target,
    each in a window with a mask.

    :param stream: The tokens.
    :param seq_len: ``S``, the largest number of targets in a window.
    :param num_ranks: The number of ranks that share the rows.

    :raises RecipeError: The stream has fewer targets than there are ranks.
    """

    def __init__(self, stream: TokenStream, seq_len: int, num_ranks: int) -> None:
        num_targets = len(stream) - 1

        if num_targets < num_ranks:
            raise RecipeError(
                f"The dataset split has {num_targets} targets, fewer than ranks "
                f"({num_ranks})."
            )

        round_size = num_ranks * seq_len

        num_rounds, num_left = divmod(num_targets, round_size)

        # Too few to give every rank a target: take the last full round too.
        if 0 < num_left < num_ranks:
            num_rounds -= 1
            num_left += round_size

        num_full = num_rounds * num_ranks
        num_parts = -(-num_left // round_size) * num_ranks

        first_left = num_full * seq_len + 1

        # The first target of each row, and the end of the last.
        self._bounds = np.concatenate(
            [
                np.arange(num_full, dtype=np.int64) * seq_len + 1,
                first_left + np.arange(num_parts) * num_left // max(num_parts, 1),
                [num_targets + 1],
            ]
        )

        self._stream = stream
        self._width = min(seq_len + 1, len(stream))

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._bounds) - 1

    def collate(self, indices: NDArray[np.int64]) -> SequenceBatch:
        """Make a batch of windows.

        :param indices: Row numbers.

        :returns: The batch. *Shape of seqs:* ``(N,S+1)``.
        """
        firsts, ends = self._bounds[indices], self._bounds[indices + 1]

        starts = np.maximum(ends - self._width, 0)

        seqs = _read_rows(self._stream, starts, self._width)

        if (starts == firsts - 1).all() and (ends == starts + self._width).all():
            return SequenceBatch(seqs, None)

        positions = starts[:, None] + np.arange(self._width)

        mask = (positions >= firsts[:, None]) & (positions < ends[:, None])

        return SequenceBatch(seqs, None, target_mask=torch.from_numpy(mask))


def _read_rows(
    stream: TokenStream, starts: NDArray[np.int64], width: int
) -> torch.Tensor:
    rows = np.stack([stream.read(int(s), int(s) + width) for s in starts])

    return torch.from_numpy(rows)
