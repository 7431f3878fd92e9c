"""Says in one line what a user can correct, where fairseq2 logs a stack trace."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Final

from fairseq2.data.tokenizers import TokenizerModelError
from fairseq2.datasets import DatasetError
from fairseq2.recipe.error import RecipeConfigParseError
from fairseq2.utils.structured import StructureError

from moxe_plugin.models.interop import AuthorsCheckpointError
from moxe_plugin.train.failures import describe_failure

_FIELD: Final = re.compile(r"`(\w+)` field cannot be structured\.")


def shorten_trace(record: logging.LogRecord) -> bool:
    """Replace the stack trace of what a user can correct by its reason.

    :param record: What is about to be logged.

    :returns: Always ``True``: the record is logged, as a logging filter says it.
    """
    ex = record.exc_info[1] if record.exc_info else None

    if isinstance(ex, RecipeConfigParseError):
        record.msg, record.args = f"{ex} {describe_config_error(ex)}", ()
    elif isinstance(ex, (DatasetError, TokenizerModelError, AuthorsCheckpointError)):
        record.msg, record.args = str(ex), ()
    elif ex is not None and (failure := describe_failure(ex)) is not None:
        record.msg, record.args = failure, ()
    else:
        return True

    record.exc_info = None

    return True


def describe_config_error(ex: BaseException) -> str:
    """Find out which key of a configuration does not fit, and why.

    :param ex: What fairseq2 raised; its causes tell the key level by level.

    :returns: The dotted path of the key, if it is known, and the reason.
    """
    keys = []
    reason = ex

    for cause in _causes(ex):
        if isinstance(cause, StructureError) and (match := _FIELD.match(str(cause))):
            keys.append(match[1])

        reason = cause

    return f"`{'.'.join(keys)}`: {reason}" if keys else str(reason)


def _causes(ex: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = ex

    while cause is not None:
        yield cause

        cause = cause.__cause__
