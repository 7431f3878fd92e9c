"""The dataset family ``moxe_tokens``: windows of a token stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

from fairseq2.data.tokenizers import Tokenizer
from fairseq2.gang import Gangs
from fairseq2.recipe.error import RecipeError, SplitNotKnownError
from fairseq2.utils.validation import Validatable, ValidationResult

from moxe_plugin.data.manifest import MANIFEST_FILE
from moxe_plugin.data.reader import RowReader, RowSource
from moxe_plugin.data.shards import TokenShards, open_shards
from moxe_plugin.data.tokenizer import HgTextTokenizer
from moxe_plugin.data.windows import EvalWindows, TrainWindows

MOXE_TOKENS_FAMILY: Final = "moxe_tokens"


@dataclass(kw_only=True)
class TokensConfig(Validatable):
    """Where the token shards are."""

    path: Path | None = None
    """A directory made by ``moxe data build``."""

    embedded: Literal["quickstart", "full"] | None = None
    """The embedded corpus of this size instead; it is built on first use."""

    verify: bool = True
    """Whether to compare the digest of every file with the manifest when opening, which
    takes about a second per GB. Damage is otherwise found only if a file has another
    size or a token is not in the vocabulary."""

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

    if not path.joinpath(MANIFEST_FILE).is_file():
        raise RecipeError(
            f"{path} is not a directory of token shards: it has no {MANIFEST_FILE}. "
            "Build one with `moxe data build`."
        )

    return TokensDataset(str(path), open_shards(path, verify=config.verify))
