"""Keeps secrets of the environment out of logs."""

from __future__ import annotations

import logging
import os
import re
from typing import Final

_SECRET_NAME: Final = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASS(WORD|WD|PHRASE)|CREDENTIAL|AUTH|(^|_)(API)?KEY(_|$)|COOKIE",
    re.IGNORECASE,
)

_MIN_LENGTH: Final = 6
"""Shorter values, such as the ``false`` of ``TOKENIZERS_PARALLELISM``, are words."""

_MASK: Final = "***"


def is_not_environment(record: logging.LogRecord) -> bool:
    """Tell fairseq2's list of all environment variables from other records.

    fairseq2 0.8.1 has no switch for it. The list is made for the log alone: the
    environment itself, and what reads it, stay as they are.

    :param record: What is about to be logged.

    :returns: Whether it is anything else.
    """
    return not record.getMessage().startswith("Environment Variables - ")


def mask_secrets(record: logging.LogRecord) -> bool:
    """Replace the values of variables that look secret, wherever a message has one.

    :param record: What is about to be logged.

    :returns: Always ``True``: the record is logged, as a logging filter says it.
    """
    message = record.getMessage()

    masked = message

    for secret in list_secrets():
        masked = masked.replace(secret, _MASK)

    if masked != message:
        record.msg, record.args = masked, ()

    return True


def list_secrets() -> list[str]:
    """List the values of environment variables whose names look secret.

    :returns: The values, the longest first: one may contain another.
    """
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _MIN_LENGTH
    }

    return sorted(values, key=len, reverse=True)
