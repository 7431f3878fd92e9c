"""Reads datasets of the Hugging Face hub, or directories laid out like one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any, Final, TypeVar

from fairseq2.datasets import DatasetError

from moxe_plugin.data.documents import get_text
from moxe_plugin.data.retrying import RetryPolicy, StreamError, is_transient

MAX_REASON_LENGTH: Final = 300

T = TypeVar("T")


class HubTexts:
    """The documents of a dataset, in order; a broken stream is taken up again.

    Nothing of the dataset is executed: ``datasets`` reads data files only.

    :param name: The name, for example ``HuggingFaceFW/fineweb-edu``, or a directory.
    :param config: Its configuration, for example ``sample-10BT``.
    :param split: Its split.
    :param text_column: The column of the text.
    :param revision: The commit, branch or tag; ``None`` means the main branch.
    :param streaming: Whether to read while downloading, and no more than is used.
    :param policy: When a broken stream is tried again.
    :param notify: Told of every failure before the next attempt.
    """

    def __init__(
        self,
        name: str,
        config: str | None,
        split: str,
        text_column: str,
        *,
        revision: str | None = None,
        streaming: bool = True,
        policy: RetryPolicy | None = None,
        notify: Callable[[str], None],
    ) -> None:
        self._name = name
        self._config = config
        self._split = split
        self._text_column = text_column
        self._revision = revision
        self._streaming = streaming
        self._policy = policy if policy is not None else RetryPolicy()
        self._notify = notify

        self._builder: Any = None
        self._rows: Any = None
        self._iterator: Iterator[dict[str, Any]] | None = None

        self._num_read = 0
        # Where `datasets` stands, for it to go there without reading again.
        self._rows_state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[str]:
        """Read on from where reading stopped.

        :yields: The documents.

        :raises DatasetError: The dataset cannot be read.
        :raises StreamError: The stream broke off too often, or for good.
        """
        while (row := self._retry(self._read_row)) is not None:
            self._num_read += 1

            yield get_text(
                row, self._text_column, f"{self._name}, row {self._num_read}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Tell where reading stopped.

        :returns: The number of documents read, and where ``datasets`` stands.
        """
        self._remember()

        return {"num_read": self._num_read, "rows": self._rows_state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another reading of the same dataset stopped.

        :param state: Its state.
        """
        self._num_read = int(state["num_read"])
        self._rows_state = state["rows"]

        self._rows = self._iterator = None

    def describe(self) -> dict[str, Any]:
        """Tell what is read, down to the commit or the time of change of the files.

        :returns: The description.

        :raises DatasetError: The dataset cannot be read.
        :raises StreamError: The hub could not be reached.
        """
        files = self._retry(self._open_builder).config.data_files
        content = repr(
            sorted((k, list(map(str, v)), v.origin_metadata) for k, v in files.items())
        )

        return {
            "hf": self._name,
            "hf_config": self._config,
            "hf_split": self._split,
            "hf_revision": self._revision,
            "text_column": self._text_column,
            "streaming": self._streaming,
            "data_files": sha256(content.encode()).hexdigest(),
        }

    def _retry(self, action: Callable[[], T]) -> T:
        num_failures = 0

        while True:
            try:
                return action()
            # `datasets` raises errors of many libraries, in part plain `Exception`.
            except Exception as ex:
                reason = _explain(ex)

                if not is_transient(ex):
                    message = f"The dataset {self._name} cannot be read: {reason}"

                    if self._num_read == 0:
                        raise DatasetError(message) from ex

                    # What was built so far is worth keeping.
                    raise StreamError(
                        f"{message} (after {self._num_read:,} documents). When it can "
                        "be read again, the same command continues a build."
                    ) from ex

                num_failures += 1

                if num_failures == self._policy.max_attempts:
                    raise StreamError(
                        f"Reading {self._name} failed {num_failures} times in a row "
                        f"after {self._num_read:,} documents: {reason}. Check the "
                        "connection, then run the same command again; `moxe data "
                        "build` continues where it stopped. Or download the data "
                        "files and name them with `--files`."
                    ) from ex

            self._remember()
            self._rows = self._iterator = None

            delay_s = self._policy.delay_s(num_failures)

            self._notify(
                f"Reading {self._name} broke off after {self._num_read:,} documents: "
                f"{reason}. Attempt {num_failures + 1} of {self._policy.max_attempts} "
                f"in {delay_s:g} s."
            )

            self._policy.sleep(delay_s)

    def _read_row(self) -> dict[str, Any] | None:
        if self._iterator is None:
            self._iterator = self._open_rows()

        return next(self._iterator, None)

    def _open_rows(self) -> Iterator[dict[str, Any]]:
        builder = self._open_builder()

        if not self._streaming:
            builder.download_and_prepare()
            rows = builder.as_dataset(self._split)

            # `skip` refuses to skip all rows.
            return (rows[i] for i in range(self._num_read, len(rows)))

        self._rows = builder.as_streaming_dataset(self._split)

        if self._rows_state is not None:
            self._rows.load_state_dict(self._rows_state)

        return iter(self._rows)

    def _open_builder(self) -> Any:
        import datasets

        if self._builder is None:
            self._builder = datasets.load_dataset_builder(
                self._name, self._config, revision=self._revision
            )

        return self._builder

    def _remember(self) -> None:
        if self._rows is not None:
            self._rows_state = self._rows.state_dict()


def _explain(ex: Exception) -> str:
    text = " ".join(str(ex).split())

    # Some list every file name they would have liked.
    if len(text) > MAX_REASON_LENGTH:
        text = text[:MAX_REASON_LENGTH] + "..."

    return f"{type(ex).__name__}: {text}" if text else type(ex).__name__
