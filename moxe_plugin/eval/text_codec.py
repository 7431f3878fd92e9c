"""From the harness' texts to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from fairseq2.data.tokenizers import Tokenizer


@final
class TextCodec:
    """Encodes text without special tokens, except for those asked for.

    :param tokenizer: The tokenizer of the model.
    :param prefix_token: What stands in for an empty context: ``"bos"``, ``"eos"`` or a
        token id; the beginning of sequence by default, or the end of sequence if the
        tokenizer has no beginning.
    :param add_bos_token: Whether every text starts with the beginning of sequence.
    """

    def __init__(
        self, tokenizer: Tokenizer, prefix_token: str | int | None, add_bos_token: bool
    ) -> None:
        info = tokenizer.vocab_info

        self.vocab_size = info.size
        self.bos_idx = info.bos_idx
        self.eos_idx = info.eos_idx
        self.add_bos_token = add_bos_token
        self.prefix_token_id = self._find_prefix_token(prefix_token)

        if add_bos_token and self.bos_idx is None:
            raise ValueError(
                "`add_bos_token` must be false, because the tokenizer has no beginning "
                "of sequence."
            )

        self._encoder = tokenizer.create_raw_encoder()
        self._decoder = tokenizer.create_decoder(skip_special_tokens=True)

    def _find_prefix_token(self, prefix_token: str | int | None) -> int:
        if prefix_token is None:
            idx = self.eos_idx if self.bos_idx is None else self.bos_idx
        elif isinstance(prefix_token, int):
            idx = prefix_token
        elif prefix_token in ("bos", "eos"):
            idx = self.bos_idx if prefix_token == "bos" else self.eos_idx
        else:
            raise ValueError(
                "`prefix_token` must be 'bos', 'eos' or a token id, but is "
                f"'{prefix_token}' instead."
            )

        if idx is None:
            raise ValueError(
                "`prefix_token` must be a token id, because the tokenizer has no such "
                "special token."
            )

        if not 0 <= idx < self.vocab_size:
            raise ValueError(
                f"`prefix_token` must be in [0, {self.vocab_size}), but is {idx} "
                "instead."
            )

        return idx

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Encode text.

        :param text: The text.
        :param add_bos: Whether to begin with the beginning of sequence, unless the text
            does so itself; as ``add_bos_token`` says if ``None``.

        :returns: The token ids.
        """
        ids: list[int] = self._encoder(text).tolist()

        if self.add_bos_token if add_bos is None else add_bos:
            assert self.bos_idx is not None
            if ids[:1] != [self.bos_idx]:
                ids.insert(0, self.bos_idx)

        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode token ids, leaving out special ones.

        :param tokens: The token ids.

        :returns: The text.
        """
        return self._decoder(torch.tensor(tokens, dtype=torch.int64))
