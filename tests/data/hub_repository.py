"""Directories laid out like datasets of the hub, and a server with faults."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
from pyarrow import parquet

Fault = str | int
"""``reset``, ``cut``, or an HTTP status."""


def write_repository(
    path: Path, texts: Sequence[str], suffix: str, num_files: int = 3
) -> Path:
    """Write a repository with a card and columns of FineWeb-Edu.

    The configuration ``sample`` has the splits ``train`` and ``held``, whose only
    document is the last text; ``small`` has the last file of ``train``.

    :param path: The directory to make.
    :param texts: The documents.
    :param suffix: ``parquet`` or ``jsonl``.
    :param num_files: The number of files of the split ``train``.

    :returns: ``path``.
    """
    files = path / "data"
    files.mkdir(parents=True)

    size = -(-(len(texts) - 1) // num_files)
    starts = [*range(0, len(texts) - 1, size), len(texts) - 1]
    ends = [*starts[1:], len(texts)]

    for nr, (start, end) in enumerate(zip(starts, ends, strict=True)):
        name = f"train-{nr:05}" if end < len(texts) else "held-00000"
        rows = [
            {"text": texts[i], "id": f"<urn:{i}>", "score": 3.5}
            for i in range(start, end)
        ]

        file = files / f"{name}.{suffix}"

        if suffix == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=37)
        else:
            file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    write_card(
        path,
        {
            "sample": {
                "train": [f"data/train-*.{suffix}"],
                "held": [f"data/held-*.{suffix}"],
            },
            "small": {"train": [f"data/train-{num_files - 1:05}.{suffix}"]},
        },
    )

    return path


def write_card(path: Path, configs: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Write the card of a repository, ``README.md``.

    :param path: The directory.
    :param configs: The paths, patterns or URLs of each split of each configuration.
    """
    lines = ["---", "license: odc-by", "configs:"]

    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]

        for split, files in splits.items():
            lines += [f"  - split: {split}", "    path:"]
            lines += [f"    - {file}" for file in files]

    path.joinpath("README.md").write_text("\n".join([*lines, "---", "# Texts", ""]))


class FlakyServer(ThreadingHTTPServer):
    """Serves a directory on the loopback address, with faults.

    :param path: The directory.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)

        self.path = path
        self.faults: list[Fault | None] = []
        """What happens to the next requests for content; then, all is well."""
        self.num_faults = 0
        """The number of requests that met a fault."""

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that give up on a fault are expected.

        :param request: The connection.
        :param client_address: Its other end.
        """


@contextmanager
def serve(path: Path) -> Iterator[FlakyServer]:
    """Serve a directory while the context is entered.

    :param path: The directory.

    :yields: The server.
    """
    with FlakyServer(path) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing.

        :param args: The message.
        """

    def do_HEAD(self) -> None:
        """Answer with the size of a file."""
        self._send_head(200, len(self._read_file()))

    def do_GET(self) -> None:
        """Answer with a file, a part of it, or a fault."""
        content = self._read_file()
        size = len(content)
        content_range = None

        if wanted := self.headers["Range"]:
            start, end = wanted.removeprefix("bytes=").split("-")
            content = content[int(start) : int(end) + 1 if end else None]
            content_range = f"bytes {start}-{int(start) + len(content) - 1}/{size}"

        fault = self.server.faults.pop(0) if self.server.faults else None
        self.server.num_faults += fault is not None

        if fault == "reset":
            # Closing without lingering sends RST.
            self.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            self.connection.close()
            self.close_connection = True

            return

        if isinstance(fault, int):
            self._send_head(fault, 0)

            return

        self._send_head(206 if content_range else 200, len(content), content_range)

        if fault == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True

        self.wfile.write(content)

    def _read_file(self) -> bytes:
        return self.server.path.joinpath(self.path.lstrip("/")).read_bytes()

    def _send_head(
        self, status: int, size: int, content_range: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("Accept-Ranges", "bytes")

        if content_range is not None:
            self.send_header("Content-Range", content_range)

        self.end_headers()
