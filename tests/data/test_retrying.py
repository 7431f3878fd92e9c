"""Tests of telling passing trouble of a network from other errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import httpx
import pytest
import requests
from aiohttp import ClientPayloadError, ClientResponseError, RequestInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from moxe_plugin.data.retrying import RetryPolicy, is_transient


def _aiohttp_error(status: int) -> Exception:
    url = URL("http://localhost")
    info = RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)

    return ClientResponseError(info, (), status=status)


def _httpx_error(status: int) -> Exception:
    request = httpx.Request("GET", "http://localhost")
    response = httpx.Response(status, request=request)

    return httpx.HTTPStatusError("", request=request, response=response)


def _hub_error(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status

    return HfHubHTTPError("", response)


@pytest.mark.parametrize("make", [_aiohttp_error, _httpx_error, _hub_error])
@pytest.mark.parametrize(
    ("status", "expected"),
    [(500, True), (503, True), (429, True), (408, True), (404, False), (401, False)],
)
def test_status_decides(
    make: Callable[[int], Exception], status: int, expected: bool
) -> None:
    error = make(status)

    assert is_transient(error) == expected
    # As `datasets` hides the error of its last attempt.
    assert is_transient(_chain(ConnectionError("Disconnected"), error)) == expected


def _chain(*errors: BaseException) -> BaseException:
    for error, cause in pairwise(errors):
        error.__cause__ = cause

    return errors[0]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([ConnectionResetError()], True),
        ([TimeoutError()], True),
        ([requests.exceptions.ReadTimeout()], True),
        ([requests.exceptions.ChunkedEncodingError()], True),
        ([httpx.ReadTimeout("")], True),
        ([ClientPayloadError("not enough data")], True),
        ([ConnectionError(), LocalEntryNotFoundError("not in the cache")], True),
        ([ConnectionError(), OfflineModeIsEnabled()], False),
        ([FileNotFoundError()], False),
        ([ConnectionError(), FileNotFoundError()], False),
        ([FileNotFoundError(), ConnectionResetError()], True),
        ([PermissionError()], False),
        ([OSError(28, "No space left on device")], False),
        ([ValueError("bad data")], False),
        ([ValueError("bad data"), TimeoutError()], True),
    ],
    ids=lambda v: "_".join(type(e).__name__ for e in v) if isinstance(v, list) else "",
)
def test_earliest_error_that_tells_decides(
    errors: Sequence[BaseException], expected: bool
) -> None:
    assert is_transient(_chain(*errors)) == expected


def test_what_was_being_handled_counts_unless_hidden() -> None:
    def fail(*, hidden: bool) -> None:
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            if hidden:
                raise ValueError("bad") from None
            raise ValueError("bad")  # noqa: B904  # the context is what is tested

    for hidden in (False, True):
        with pytest.raises(ValueError, match="bad") as info:
            fail(hidden=hidden)

        assert is_transient(info.value) == (not hidden)


def test_delays_double_up_to_a_limit() -> None:
    policy = RetryPolicy(first_delay_s=0.5, max_delay_s=3.0)

    assert [policy.delay_s(n) for n in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
