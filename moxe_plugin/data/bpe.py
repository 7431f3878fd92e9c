"""Trains a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from fairseq2.datasets import DatasetError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS_TOKEN: Final = "<|endoftext|>"
PAD_TOKEN: Final = "<|pad|>"

MIN_VOCAB_SIZE: Final = 2 + 256
"""The special tokens and all bytes."""

# One digit, a word with the space before it, or a run of other characters.
_WORDS: Final = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(texts: Iterable[str], vocab_size: int, output_dir: Path) -> int:
    """Train a tokenizer and save it as a Hugging Face tokenizer.

    ``<|endoftext|>`` (id 0) is BOS and EOS, ``<|pad|>`` (id 1) is PAD. Every text can
    be encoded, since all bytes are in the vocabulary.

    :param texts: The training text.
    :param vocab_size: The number of entries, special tokens included; fewer if the
        text has nothing more to merge.
    :param output_dir: The directory to write to.

    :returns: The number of entries.

    :raises DatasetError: There is no text.
    :raises ValueError: ``vocab_size`` does not hold the special tokens and all bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"`vocab_size` must be at least {MIN_VOCAB_SIZE}, but is {vocab_size} "
            "instead."
        )

    tokenizer = Tokenizer(models.BPE())

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    num_texts = 0

    def count_texts() -> Iterator[str]:
        nonlocal num_texts

        for text in texts:
            num_texts += bool(text.strip())
            yield text

    tokenizer.train_from_iterator(count_texts(), trainer)

    if num_texts == 0:
        raise DatasetError("There is no text to train a tokenizer on.")

    # transformers does not annotate it.
    create: Any = PreTrainedTokenizerFast

    create(
        tokenizer_object=tokenizer,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output_dir)

    return len(tokenizer.get_vocab())
