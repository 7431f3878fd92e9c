"""The dataset family ``moxe_instructions``: prompts and the responses to learn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

import numpy as np
import torch
from fairseq2.data.tokenizers import Tokenizer
from fairseq2.datasets import SequenceBatch
from fairseq2.gang import Gangs
from fairseq2.logging import log
from fairseq2.recipe.error import RecipeError, SplitNotKnownError
from fairseq2.utils.validation import Validatable, ValidationResult
from numpy.typing import NDArray

from moxe_plugin.data.instruction_encoding import (
    EncodedInstruction,
    InstructionEncoder,
    read_instructions,
)
from moxe_plugin.data.reader import RowReader

MOXE_INSTRUCTIONS_FAMILY: Final = "moxe_instructions"


@dataclass(kw_only=True)
class InstructionsConfig(Validatable):
    """Where the instructions are."""

    path: Path | None = None
    """A directory with one ``<split>.jsonl`` per split. A line has ``src`` and ``tgt``,
    ``question`` and ``answer`` (GSM8K's), or ``messages``: a list of
    ``{"role": ..., "content": ...}``."""

    embedded: Literal["quickstart", "full"] | None = None
    """Questions about the embedded corpus of this size instead; built on first use."""

    def validate(self) -> ValidationResult:
        """Check that exactly one source is given.

        :returns: The errors found.
        """
        result = ValidationResult()

        if (self.path is None) == (self.embedded is None):
            result.add_error("Exactly one of `path` and `embedded` must be specified.")

        return result


@final
class InstructionsDataset:
    """A directory of instructions.

    :param path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def create_reader(
        self,
        split: str,
        tokenizer: Tokenizer,
        gangs: Gangs,
        *,
        batch_size: int,
        max_seq_len: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_remainder: bool | None = None,
        num_accumulate: int = 1,
        max_num_batches: int | None = None,
    ) -> RowReader:
        """Read a split as padded batches whose ``target_mask`` covers responses.

        A sequence has at most ``max_seq_len + 1`` tokens, so that the model sees at
        most ``max_seq_len`` after ``SequenceBatch.as_auto_regressive()``. A longer one
        is cut at its end, EOS included; an example whose whole response would be cut
        is dropped, and the numbers are logged.

        For validation (``shuffle=False``) every response token is a target exactly
        once. Rows come in order of their number of targets; if they do not divide among
        the ranks, the ranks share the targets of the longest ones.

        :param split: The name of the split.
        :param tokenizer: Encodes the text.
        :param gangs: Their ``dp`` gang gives the rank.
        :param batch_size: The number of examples in a batch of one rank.
        :param max_seq_len: The largest number of tokens the model sees.
        :param seed: The seed of the order.
        :param shuffle: Whether each epoch has an order of its own.
        :param drop_remainder: Whether only full global batches are read; ``None``
            means as ``shuffle``.
        :param num_accumulate: The number of batches in a step.
        :param max_num_batches: The number of batches after which an epoch ends early.

        :returns: The reader.

        :raises SplitNotKnownError: There is no such split.
        :raises RecipeError: There are too few examples.
        """
        examples = self._encode(split, tokenizer, max_seq_len)

        if drop_remainder is None:
            drop_remainder = shuffle

        pad_idx = tokenizer.vocab_info.pad_idx

        rows = InstructionRows(
            examples,
            pad_idx if pad_idx is not None else 0,
            1 if drop_remainder else gangs.dp.size,
        )

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

    def _encode(
        self, split: str, tokenizer: Tokenizer, max_seq_len: int
    ) -> list[EncodedInstruction]:
        if split not in self.splits:
            raise SplitNotKnownError(str(self._path), split, self.splits)

        encoder = InstructionEncoder(tokenizer)

        examples = []
        num_cut = num_dropped = 0

        for instruction in read_instructions(self._path / f"{split}.jsonl"):
            example = encoder.encode(instruction)

            if len(example.tokens) > max_seq_len + 1:
                example = example.cut(max_seq_len + 1)

                if not example.has_targets:
                    num_dropped += 1

                    continue

                num_cut += 1

            examples.append(example)

        if num_cut or num_dropped:
            log.info("Instructions of the {} split: {} whole, {} cut to {} tokens, {} dropped because nothing of the response was left.", split, len(examples) - num_cut, num_cut, max_seq_len + 1, num_dropped)  # fmt: skip  # noqa: E501  # one log call, as in fairseq2

        if not examples:
            raise RecipeError(
                f"The {split} split of {self._path} has no example whose response "
                f"begins within {max_seq_len + 1} tokens."
            )

        return examples

    @property
    def splits(self) -> Sequence[str]:
        """The names of the splits."""
        return sorted(f.stem for f in self._path.glob("*.jsonl"))


def open_instructions(config: InstructionsConfig) -> InstructionsDataset:
    """Open the dataset a configuration describes.

    :param config: The configuration.

    :returns: The dataset.

    :raises RecipeError: Not exactly one source is given, or ``path`` does not exist.
    """
    if config.embedded is not None and config.path is None:
        from moxe_plugin.data.corpus import prepare_embedded

        path = prepare_embedded(config.embedded).instructions_dir
    elif config.path is not None and config.embedded is None:
        path = config.path
    else:
        raise RecipeError(
            "Exactly one of `path` and `embedded` of the "
            f"{MOXE_INSTRUCTIONS_FAMILY} dataset must be specified."
        )

    if not any(path.glob("*.jsonl")):
        raise RecipeError(
            f"{path} is not a directory of instructions: it has no <split>.jsonl."
        )

    return InstructionsDataset(path)


class InstructionRows:
    """Examples as rows, their number made a multiple of ``num_ranks``.

    :param examples: The examples.
    :param pad_idx: Fills a batch; the sequence lengths say where.
    :param num_ranks: The number of ranks that share the rows.
    """

    def __init__(
        self, examples: list[EncodedInstruction], pad_idx: int, num_ranks: int
    ) -> None:
        examples = sorted(examples, key=lambda e: e.num_targets)

        num_left = len(examples) % num_ranks

        if num_left > 0:
            left = examples[-num_left:]

            shares = [num_ranks // num_left] * num_left
            for idx in range(num_ranks % num_left):
                shares[idx] += 1

            examples = examples[:-num_left]

            for example, num_shares in zip(left, shares, strict=True):
                examples.extend(example.share(num_shares))

        self._examples = examples
        self._pad_idx = pad_idx

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._examples)

    def compute_sha256(self) -> str:
        """Compute a digest of the encoded examples.

        :returns: The digest, in hexadecimal.
        """
        digest = hashlib.sha256()

        for example in self._examples:
            digest.update(example.tokens.tobytes())
            digest.update(example.target_mask.tobytes())

        return digest.hexdigest()

    def collate(self, indices: NDArray[np.int64]) -> SequenceBatch:
        """Make a batch of examples, padded on the right.

        :param indices: Row numbers.

        :returns: The batch. *Shape of seqs:* ``(N,S+1)``.
        """
        examples = [self._examples[i] for i in indices]

        seq_lens = [len(e.tokens) for e in examples]

        shape = (len(examples), max(seq_lens))

        seqs = torch.full(shape, self._pad_idx, dtype=torch.int64)
        target_mask = torch.zeros(shape, dtype=torch.bool)

        for row, example in enumerate(examples):
            seqs[row, : seq_lens[row]] = torch.from_numpy(example.tokens)
            target_mask[row, : seq_lens[row]] = torch.from_numpy(example.target_mask)

        return SequenceBatch(seqs, seq_lens, target_mask=target_mask)
