"""Reads prompts, and hands them out as batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import final

from fairseq2.data.tokenizers import TokenEncoder
from fairseq2.datasets import DataReader, SequenceBatch
from fairseq2.gang import Gangs
from fairseq2.nn.utils.padding import pad_seqs
from fairseq2.recipe.error import RecipeError
from typing_extensions import Self, override


def read_prompts(file: Path) -> list[str]:
    """Read the prompts in a file.

    :param file: A text file with one prompt per line, or a ``.jsonl`` file whose lines
        have a ``prompt``, or a ``src`` as instructions do. Empty lines are skipped.

    :returns: The prompts, in order.

    :raises RecipeError: The file cannot be read, has no prompt or one without text.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as ex:
        raise RecipeError(
            f"`prompt_file` must be a text file, but '{file}' cannot be read: "
            f"{ex.strerror}."
        ) from None
    except UnicodeDecodeError as ex:
        raise RecipeError(
            f"`prompt_file` must be UTF-8, but '{file}' has a byte at {ex.start} that "
            "is not. Convert it first, for example with `iconv -t UTF-8`."
        ) from None

    lines_by_nr = [(n, s) for n, s in enumerate(lines, start=1) if s.strip()]

    if not lines_by_nr:
        raise RecipeError(f"`prompt_file` must have a prompt, but '{file}' has none.")

    if file.suffix != ".jsonl":
        return [line for _, line in lines_by_nr]

    return [_parse_prompt(line, f"{file}:{nr}") for nr, line in lines_by_nr]


def _parse_prompt(line: str, place: str) -> str:
    try:
        data = json.loads(line)
    except ValueError:
        raise RecipeError(f"{place} is not valid JSON.") from None

    if isinstance(data, dict):
        for key in ("prompt", "src"):
            if isinstance(data.get(key), str):
                return str(data[key])

    raise RecipeError(
        f"{place} must be a JSON object with the text `prompt` or `src`, but is "
        f"'{line}' instead."
    )


@final
class PromptReader(DataReader[SequenceBatch]):
    """Reads the prompts of this rank, padded on the right; the text is ``example``.

    :param prompts: The prompts of all ranks.
    :param encode: Encodes a prompt.
    :param gangs: Their ``dp`` gang gives the rank.
    :param batch_size: The number of prompts in a batch.
    :param max_seq_len: The maximum length of a prompt and its completion in tokens.

    :raises RecipeError: A prompt leaves no room for a completion.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: TokenEncoder,
        gangs: Gangs,
        *,
        batch_size: int,
        max_seq_len: int,
    ) -> None:
        prompts = prompts[gangs.dp.rank :: gangs.dp.size]

        seqs = [encode(prompt) for prompt in prompts]

        for prompt, seq in zip(prompts, seqs, strict=True):
            if not 0 < len(seq) < max_seq_len:
                raise RecipeError(
                    f"`prompts` must have between 1 and {max_seq_len - 1} tokens each, "
                    f"one less than the model's `max_seq_len`, but '{prompt[:40]}...' "
                    f"has {len(seq)}. Shorten it."
                )

        self._prompts = prompts
        self._seqs = seqs
        self._batch_size = batch_size
        self._position = 0

    @override
    def __iter__(self) -> Self:
        return self

    @override
    def __next__(self) -> list[SequenceBatch]:
        begin, end = self._position, self._position + self._batch_size

        prompts = self._prompts[begin:end]
        if not prompts:
            raise StopIteration

        self._position = end

        seqs, seqs_layout = pad_seqs(self._seqs[begin:end])

        return [SequenceBatch(seqs, list(seqs_layout.seq_lens), example=prompts)]

    @override
    def reset(self) -> None:
        self._position = 0

    @override
    def state_dict(self) -> dict[str, object]:
        return {"position": self._position}

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        position = state_dict["position"]

        assert isinstance(position, int)

        self._position = position

    @property
    @override
    def num_accumulate(self) -> int:
        return 1
