"""Fixtures of all tests, and the environment that they run in."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import IO, TYPE_CHECKING, Final, get_args

# Libraries read these when they are imported, and child processes inherit them.
_ENVIRONMENT: Final = {
    # An extension that fails must fail the test; fairseq2 alone would only warn.
    "FAIRSEQ2_EXTENSION_TRACE": "1",
    "FAIRSEQ2_NO_PROGRESS": "1",
    # No test touches the network.
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    # One thread is fastest at these shapes, and sums in the same order everywhere.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(_ENVIRONMENT)

_LONGEST: Final = (
    "docs/test_commands.py",
    "train/test_random_kills.py",
    "train/test_training_options.py",
    "bench/test_smoke_suite.py",
    "docs/test_commands_on_a_run.py",
    "train/test_distributed.py",
    "train/test_presets.py",
    "nn/triton/test_block_rows.py",
    "wrong_inputs/test_commands.py",
    "hf/test_export.py",
    "bench/test_killing.py",
)
"""The files that take longest, longest first. One that begins last keeps a process busy
while the others have nothing left to do."""

import pytest  # noqa: E402  # after the environment is set
import torch  # noqa: E402  # after the environment is set
from tqdm.std import tqdm  # noqa: E402  # after the environment is set

from moxe_plugin.nn.native.library import (  # noqa: E402  # as these
    NativeSource,
    library_dir,
    why_not_loaded,
)

if TYPE_CHECKING:
    from fairseq2.runtime.dependency import DependencyResolver
    from selenium.webdriver import Chrome

    from moxe_plugin.data.corpus import EmbeddedData


@pytest.fixture(autouse=True)
def _root_logging() -> Iterator[None]:
    # fairseq2 replaces all handlers of the root logger, pytest's among them.
    logger = logging.getLogger()

    handlers, level = logger.handlers[:], logger.level

    yield

    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the C++ before processes start that would each compile it.

    :param session: The session of one of them, or of what starts them.
    """
    is_worker = hasattr(session.config, "workerinput")
    if is_worker or not session.config.getoption("numprocesses", None):
        return

    with ThreadPoolExecutor(2) as pool:
        # Tests tell what cannot be compiled.
        list(pool.map(why_not_loaded, get_args(NativeSource)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option ``--device``.

    :param parser: The command line of pytest.
    """
    parser.addoption(
        "--device",
        default="cpu",
        type=torch.device,
        help="device on which to run tests (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let Triton interpret its kernels where tests run on a CPU.

    Also keep progress bars from sharing a lock with forked processes: one that is
    killed while it draws would hold that of this process for ever.

    :param config: The configuration of pytest.
    """
    tqdm.set_lock(threading.RLock())
    # Its thread would take the lock at any time, that of a fork among them.
    tqdm.monitor_interval = 0

    if config.getoption("--device").type == "cpu":
        # Triton reads it when it is imported, which no test has done yet.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Begin with the files that take longest where several processes share the tests.

    :param config: The configuration of pytest.
    :param items: The tests; put in another order, but never within a file.
    """
    if not hasattr(config, "workerinput"):
        return

    ranks = {Path(__file__).parent / file: i for i, file in enumerate(_LONGEST)}

    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    """Leave what the test files have imported out of all garbage collections.

    One would take a third of a second, and every training begins with one. Forked
    processes would copy what it looks at.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device on which a test puts its tensors.

    :param request: The requesting test.

    :returns: The value of ``--device``.
    """
    device = request.config.getoption("--device")
    assert isinstance(device, torch.device)

    return device


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the session a cache of its own, also for child processes.

    It is empty but for what is compiled, which is named after what it is made of, and
    takes a minute to compile.

    :param tmp_path_factory: Makes the directory.

    :returns: The directory that ``MOXE_CACHE_DIR`` names.
    """
    directory = tmp_path_factory.mktemp("moxe_cache")
    compiled = library_dir()
    compiled.mkdir(parents=True, exist_ok=True)
    (directory / "native").symlink_to(compiled)
    os.environ["MOXE_CACHE_DIR"] = str(directory)

    return directory


@pytest.fixture(scope="session", autouse=True)
def _patch_language_once() -> Iterator[None]:
    # Triton's interpreter puts its functions in place of the language's at each call of
    # a function within a kernel, to no effect but the first time. That is a quarter of
    # the time in which it runs kernels.
    if "TRITON_INTERPRET" not in os.environ or find_spec("triton") is None:
        yield
        return

    from triton.runtime import interpreter

    original, known = interpreter._patch_lang, set()

    def patch_lang(fn: FunctionType) -> None:
        names = id(fn.__globals__)
        if names not in known:
            known.add(names)
            original(fn)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
        yield


@pytest.fixture(scope="session", autouse=True)
def _parse_once() -> Iterator[None]:
    # For each run fairseq2 parses its configuration two dozen times, and all its asset
    # cards: half of what a run of few steps takes.
    if "fairseq2.utils.yaml" not in sys.modules:
        yield
        return

    from fairseq2.utils.yaml import RuamelYamlLoader

    original = RuamelYamlLoader.load
    known: dict[str, list[object]] = {}

    def load(self: RuamelYamlLoader, input_: Path | IO[str]) -> list[object]:
        if not isinstance(input_, Path):
            return original(self, input_)

        with self._file_system.open_text(input_) as file:
            text = file.read()

            if text not in known:
                file.seek(0)
                known[text] = original(self, file)

        return deepcopy(known[text])

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(RuamelYamlLoader, "load", load)
        yield


@pytest.fixture(scope="session")
def embedded_data(cache_dir: Path) -> EmbeddedData:
    """Build the embedded corpus of the quickstart, once.

    :param cache_dir: Where it goes, and where the asset cards look for it.

    :returns: Its paths.
    """
    from moxe_plugin.data.corpus import prepare_embedded

    return prepare_embedded("quickstart", cache_dir)


@pytest.fixture(scope="session")
def fairseq2_setup() -> DependencyResolver:
    """Initialise fairseq2 with our extension, once; only for tests that need it.

    :returns: The resolver of the library.
    """
    from fairseq2.runtime.dependency import get_dependency_resolver

    return get_dependency_resolver()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(2)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Start Chromium, once for all pages; ask for it behind ``NEEDS_CHROMIUM``."""
    from tests.browser import start_browser

    with start_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser
