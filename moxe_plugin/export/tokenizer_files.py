"""Writes a tokenizer so that transformers encodes a text as our code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fairseq2.data.tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moxe_plugin.data.tokenizer import (
    TOKENIZER_FILE,
    HgTextTokenizer,
    HgTextTokenizerConfig,
    load_hg_text_tokenizer,
)


class SpecialTokens(NamedTuple):
    """The ids of special tokens, as far as there are any."""

    bos_idx: int | None
    eos_idx: int | None
    pad_idx: int | None


def write_tokenizer(
    tokenizer: Tokenizer, out_dir: Path, max_seq_len: int
) -> SpecialTokens:
    """Write a tokenizer that adds no special token by itself, and pads on the left.

    ``tokenizer.json`` is copied byte by byte, unless it would add special tokens.

    :param tokenizer: The tokenizer, of the family ``moxe_hg``.
    :param out_dir: The directory to write to.
    :param max_seq_len: The maximum length of a sequence in tokens.

    :returns: The ids of its special tokens.

    :raises ValueError: The tokenizer is of another family, or has something that its
        files cannot say.
    """
    if not isinstance(tokenizer, HgTextTokenizer):
        raise ValueError(
            "`tokenizer` must be of family 'moxe_hg' to be exported, but is of type "
            f"`{type(tokenizer)}` instead."
        )

    hg, info = tokenizer.hg_tokenizer, tokenizer.vocab_info

    pad_idx = info.pad_idx
    if pad_idx is None and hg.pad_token is not None:
        # fairseq2 leaves it out where it is the end of sequence.
        pad_idx = info.eos_idx

    content = tokenizer.file.read_bytes()

    if hg.num_special_tokens_to_add() > 0:
        values = {**json.loads(content), "post_processor": None}
        content = json.dumps(values, ensure_ascii=False, indent=2).encode()

    file = out_dir / TOKENIZER_FILE
    file.write_bytes(content)

    # transformers does not annotate it.
    create: Any = PreTrainedTokenizerFast

    create(
        tokenizer_file=str(file),
        bos_token=_name(hg, info.bos_idx),
        eos_token=_name(hg, info.eos_idx),
        unk_token=_name(hg, info.unk_idx),
        pad_token=_name(hg, pad_idx),
        chat_template=hg.chat_template,
        model_max_length=max_seq_len,
        padding_side="left",
        # Otherwise it returns `token_type_ids`, which `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=hg.clean_up_tokenization_spaces,
    ).save_pretrained(out_dir)

    # Token shards know a tokenizer by the digest of this file.
    file.write_bytes(content)

    written = load_hg_text_tokenizer(out_dir, HgTextTokenizerConfig())

    if written.vocab_info != info:
        raise ValueError(
            f"The tokenizer '{tokenizer.file}' cannot be exported: it would have the "
            f"vocabulary {written.vocab_info} instead of {info}."
        )

    return SpecialTokens(info.bos_idx, info.eos_idx, pad_idx)


def _name(hg: PreTrainedTokenizerFast, idx: int | None) -> str | None:
    return None if idx is None else str(hg.convert_ids_to_tokens(idx))
