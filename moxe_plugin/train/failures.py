"""Says what failed around a training: a file, or another process of the run."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from fairseq2.checkpoint import CheckpointError
from fairseq2.error import OperationalError
from fairseq2.gang import GangError

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION: Final = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_PATH: Final = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)

_LOST_PROCESS: Final = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says, in a plain `RuntimeError`, when a process it talks to has died."""


def describe_failure(ex: BaseException) -> str | None:
    """Find out whether the surroundings are to blame for an error, and say so.

    :param ex: What was raised.

    :returns: What happened and what to do, in one line; ``None`` if the cause is none
        of those that this module knows.
    """
    known = [*_NO_SPACE, *_NO_PERMISSION]

    # Otherwise what is missing need not be a file that was to be written.
    if isinstance(ex, OperationalError):
        known += _NO_PATH

    for cause in _causes(ex):
        if isinstance(cause, OSError) and cause.errno in known:
            return _describe_os_error(cause)
        if isinstance(cause, GangError) or any(m in str(cause) for m in _LOST_PROCESS):
            return (
                "Another process of this run has died or cannot be reached: this one "
                "ends too. The reason is in the log of that process "
                "(logs/rank_*.log), unless it was killed. The same command continues "
                "from the last checkpoint."
            )

        if isinstance(cause, CheckpointError):
            return (
                f"The checkpoint of step {cause.step_nr} does not fit or is damaged: "
                f"{cause} Restore its file from a copy, or remove the directory "
                f"'step_{cause.step_nr}' to continue from an earlier one."
            )

    return None


def _describe_os_error(ex: OSError) -> str:
    file = "A file" if ex.filename is None else f"'{ex.filename}'"

    if ex.errno in _NO_SPACE:
        way_out = (
            "Free some space and run the same command again: it continues from the "
            "last checkpoint that was finished."
        )
    else:
        way_out = "Choose an output directory in which you may write."

    return f"{file} cannot be written: {ex.strerror}. {way_out}"


def _causes(ex: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = ex

    while cause is not None:
        yield cause

        # Libraries raise anew in `except` and `finally`, often without `from`.
        cause = cause.__cause__ or cause.__context__
