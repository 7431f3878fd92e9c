"""A bash whose `fairseq2`, `moxe`, `lm_eval`, `torchrun` and `python` start at once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

from tests.docs.checking import CHECK_ONLY_VARIABLE, CHECKED_FILE_VARIABLE, PROGRAMS
from tests.docs.pages import ROOT, Block

_TIMEOUT_S: Final = 600

_CHECKING_PROLOGUE: Final = f"""
cd() {{ :; }}
command_not_found_handle() {{
    while [ $# -gt 0 ]; do
        case $1 in {"|".join(PROGRAMS)}) "$@"; return;; esac
        shift
    done
}}
"""
"""Other programs do nothing, but what they would start is looked for: `srun moxe …`."""


class FailedPageError(AssertionError):
    """A command of a page failed; the message has what it printed."""


@final
class DocsShell:
    """Runs blocks of the pages.

    :param directory: For the programs and the socket.
    """

    def __init__(self, directory: Path) -> None:
        self._bin = directory / "bin"
        self._bin.mkdir()

        self._socket = directory / "server"

        client = Path(__file__).with_name("command_client.py")

        for program in PROGRAMS:
            argv = [sys.executable, "-I", "-S", str(client), str(self._socket), program]

            file = self._bin / program
            file.write_text(f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n')
            file.chmod(0o755)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Run the server of the commands meanwhile.

        :yields: Nothing.
        """
        command = [sys.executable, "-m", "tests.docs.command_server", str(self._socket)]

        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as server:
            assert server.stdout is not None
            try:
                assert server.stdout.readline() == "ready\n"

                yield
            finally:
                # Also what it has forked.
                os.killpg(server.pid, signal.SIGKILL)

    def run(self, blocks: Sequence[Block], directory: Path) -> str:
        """Run blocks one after the other, as if they were typed into one shell.

        :param blocks: The blocks.
        :param directory: Where.

        :returns: What they printed.

        :raises FailedPageError: A command failed.
        """
        parts = ["set -euo pipefail", "PS4='$ '"]

        for block in blocks:
            parts += [f"echo '--- {block.place}'", f"set -x\n{block.code}"]
            parts.append("{ set +x; } 2>/dev/null")

        environment = {
            **os.environ,
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHON_EXEC": str(self._bin / "python"),
        }

        return self._run("\n".join(parts), directory, environment)

    def check(self, block: Block, directory: Path) -> list[str]:
        """Check a block without running it.

        :param block: The block.
        :param directory: Where it would run.

        :returns: The commands that were checked.

        :raises FailedPageError: One has an option, or names a preset, a suite or a
            task, that does not exist.
        """
        checked = directory / "checked.txt"
        checked.write_text("")

        environment = {
            **os.environ,
            "PATH": str(self._bin),
            CHECK_ONLY_VARIABLE: "1",
            CHECKED_FILE_VARIABLE: str(checked),
        }

        script = f"set -eo pipefail\n{_CHECKING_PROLOGUE}\n{block.code}"

        self._run(f"echo '--- {block.place}'\n{script}", directory, environment)

        return checked.read_text().splitlines()

    def _run(self, script: str, directory: Path, environment: dict[str, str]) -> str:
        bash = shutil.which("bash")
        assert bash is not None

        result = subprocess.run(
            [bash, "-c", script],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )

        if result.returncode != 0:
            raise FailedPageError(
                f"The exit code is {result.returncode}:\n{result.stdout[-6000:]}"
            )

        return result.stdout
