"""Finds damage in the files of a checkpoint.

`torch.save` writes a zip archive with a checksum (CRC-32) of each tensor, which
`torch.load` does not look at: a flipped bit becomes another weight, without a word.
Reading all of it once takes less time than loading it.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

MODEL_STATE: Final = ("model",)
"""What a checkpoint holds for evaluation."""

TRAINING_STATE: Final = ("trainer", "model", "optimizer", "data_reader")
"""What a checkpoint holds for a training that continues."""

MODEL_CARD_COPY: Final = "hook/model.yaml"
"""Where a checkpoint keeps the ``model.yaml`` it was written with, if it does. fairseq2
leaves ``hook`` to others, and keeps it when it deletes all but the model."""


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is not as it was written."""


class Damage(NamedTuple):
    """What is wrong with a checkpoint."""

    path: Path
    """The file, or the directory that lacks one."""

    reason: str
    """What is wrong with it: the rest of a sentence."""


def find_damage(
    step_dir: Path, kinds: Sequence[str], *, part: int = 0, num_parts: int = 1
) -> Damage | None:
    """Examine a checkpoint.

    :param step_dir: The directory ``step_N``.
    :param kinds: Its sub-directories to examine.
    :param part: Which part of the files to read; the others are only looked for.
    :param num_parts: Among how many processes the reading is divided.

    :returns: What is wrong, or ``None`` if nothing is.
    """
    files = []

    for kind in kinds:
        files_of_kind = sorted((step_dir / kind).rglob("*.pt"))
        if not files_of_kind:
            return Damage(step_dir / kind, "is missing or empty")

        files += files_of_kind

    if "optimizer" in kinds and (lost := _find_lost_shard(step_dir)) is not None:
        return Damage(lost, "is missing")

    for file in files[part::num_parts]:
        reason = _examine(file)
        if reason is not None:
            return Damage(file, reason)

    return None


def find_whole_step(
    checkpoint_dir: Path, steps: Sequence[int], kinds: Sequence[str]
) -> int | None:
    """Find the checkpoint to fall back on.

    :param checkpoint_dir: The directory with the ``step_N`` directories.
    :param steps: The steps that will do, the best one last.
    :param kinds: As for :func:`find_damage`.

    :returns: The last one of the steps whose checkpoint is whole, if there is one.
    """
    for step in reversed(steps):
        if find_damage(checkpoint_dir / f"step_{step}", kinds) is None:
            return step

    return None


def _find_lost_shard(step_dir: Path) -> Path | None:
    # The model and its optimizer are sharded alike.
    kinds = [step_dir / "model", step_dir / "optimizer"]

    names = [{file.relative_to(d) for file in d.rglob("*.pt")} for d in kinds]

    lost = [kinds[i] / name for i in (0, 1) for name in names[1 - i] - names[i]]

    return min(lost, default=None)


def _examine(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            if not all(map(_is_as_torch_writes, archive.infolist())):
                return "is damaged: its directory is not as it was written"

            name = archive.testzip()
    except OSError as ex:
        return f"cannot be read: {ex.strerror}"
    except _DAMAGED_ARCHIVE:
        return f"is cut off or damaged ({file.stat().st_size} bytes are there)"

    if name is not None:
        return f"is damaged: '{name}' in it does not have the checksum it was given"

    return None


def _is_as_torch_writes(info: zipfile.ZipInfo) -> bool:
    # Some of these fields make torch take an entry for an empty one.
    return (
        info.compress_type == zipfile.ZIP_STORED
        and info.compress_size == info.file_size
        and not info.flag_bits & _ENCRYPTED
        and info.external_attr == info.internal_attr == info.volume == 0
    )


_ENCRYPTED: Final = 0x1

_DAMAGED_ARCHIVE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
"""What :mod:`zipfile` raises, depending on which byte is wrong."""
