"""Tells passing trouble of a network from other errors, and waits it out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

# By name, since huggingface_hub and fsspec choose among these HTTP libraries; the
# built-in ConnectionError and TimeoutError need no name.
_CONNECTION_ERRORS: Final = {
    "aiohttp.client_exceptions.ClientError",
    "asyncio.exceptions.TimeoutError",
    "http.client.IncompleteRead",
    "httpx.TransportError",
    # A file that is not in the cache, while the hub cannot be reached.
    "huggingface_hub.errors.LocalEntryNotFoundError",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.TimeoutError",
}

# Raised although, or because, nobody may connect: trying again changes nothing.
_LASTING_ERRORS: Final = {"huggingface_hub.errors.OfflineModeIsEnabled"}

_PASSING_STATUS: Final = {408, 425, 429}
"""Client errors that ask to come back later; so do all server errors (5xx)."""


class StreamError(ConnectionError):
    """A stream broke off, and trying again did not help."""


@dataclass(kw_only=True)
class RetryPolicy:
    """How often and when a broken stream is tried again."""

    max_attempts: int = 6
    """The attempts without any progress after which to give up."""

    first_delay_s: float = 1.0
    """The wait after the first failure; it doubles with each."""

    max_delay_s: float = 60.0
    """The longest wait."""

    sleep: Callable[[float], None] = time.sleep
    """What waits."""

    def delay_s(self, num_failures: int) -> float:
        """Return how long to wait.

        :param num_failures: The failures so far, at least 1.

        :returns: The seconds.
        """
        return min(self.first_delay_s * 2.0 ** (num_failures - 1), self.max_delay_s)


def is_transient(ex: BaseException) -> bool:
    """Tell whether an error may pass by itself: a lost connection, a timeout, a 5xx.

    Libraries raise errors of their own from, or while handling, the one that tells: of
    the errors that lead to this one, the earliest that tells anything decides.

    :param ex: The error.

    :returns: Whether trying again makes sense.
    """
    chain = list(_iter_chain(ex))

    if any(_LASTING_ERRORS & set(_class_names(e)) for e in chain):
        return False

    verdicts = (_judge(e) for e in reversed(chain))

    return next((v for v in verdicts if v is not None), False)


def _judge(ex: BaseException) -> bool | None:
    status = _get_status(ex)

    if status is not None:
        return status >= 500 or status in _PASSING_STATUS

    is_connection = isinstance(ex, (ConnectionError, TimeoutError))

    if is_connection or _CONNECTION_ERRORS & set(_class_names(ex)):
        return True

    return False if isinstance(ex, (FileNotFoundError, PermissionError)) else None


def _iter_chain(ex: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = ex

    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current

        if current.__cause__ is not None or current.__suppress_context__:
            current = current.__cause__
        else:
            current = current.__context__


def _class_names(ex: BaseException) -> list[str]:
    return [f"{c.__module__}.{c.__qualname__}" for c in type(ex).__mro__]


def _get_status(ex: BaseException) -> int | None:
    # aiohttp's errors have a status themselves, the others' a response.
    status = getattr(ex, "status", None)

    if status is None:
        status = getattr(getattr(ex, "response", None), "status_code", None)

    # aiohttp has 0 or 400 for answers it could not parse to the end.
    if "aiohttp.client_exceptions.ClientPayloadError" in _class_names(ex):
        return None

    return status if isinstance(status, int) and status >= 400 else None
