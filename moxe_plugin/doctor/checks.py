"""What the doctor examines. Whatever may fail to import runs in a child process."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from tempfile import TemporaryFile
from typing import IO, Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moxe_plugin.libsndfile import find_libsndfile, link_libsndfile
from moxe_plugin.resources import resource_dir

FINDING_PREFIX: Final = "moxe_plugin.doctor: "
"""Tells the finding of a probe from what libraries print."""

WARNING_PREFIX: Final = "moxe_plugin.doctor warns: "
"""The same for a finding that is no failure, but should be better."""

_DISTRIBUTION: Final = "moxe-plugin"

# fairseq2 pins fairseq2n, which pins torch.
_REQUIRING: Final = (_DISTRIBUTION, "fairseq2", "fairseq2n")

_REINSTALL: Final = "Reinstall moxe-plugin."

_MAX_ERROR_LEN: Final = 200
"""In characters; some messages list every name that they know."""


@dataclass(kw_only=True, frozen=True)
class Check:
    """The result of one examination."""

    name: str
    """What was examined."""

    passed: bool
    """Whether the installation can be used as far as this check tells."""

    finding: str
    """What was found, in one line."""

    remedy: str
    """The way out if the check failed; otherwise of no interest."""

    warns: bool = False
    """Whether it passed, but the installation could be better: slow, for example."""


def run_checks(*, fix: bool) -> Iterator[Check]:
    """Examine the installation.

    :param fix: Whether to link a libsndfile if there is none.

    :yields: The checks, each as soon as it is done.
    """
    yield check_python()

    for name in ("torch", "fairseq2", "fairseq2n", "lm-eval", "transformers"):
        yield check_version(name)
    yield check_version("datasets")

    yield check_libsndfile(fix=fix)
    yield check_resources()

    yield from check_probes()


def check_python() -> Check:
    """Check the version of the interpreter.

    :returns: The check.
    """
    try:
        specifier = SpecifierSet(metadata(_DISTRIBUTION)["Requires-Python"])
    except PackageNotFoundError:
        return Check(
            name="python",
            passed=False,
            finding=f"{_DISTRIBUTION} is not installed in '{sys.prefix}'",
            remedy="Run `pip install .` in a clone, in an environment of its own.",
        )

    return Check(
        name="python",
        passed=platform.python_version() in specifier,
        finding=f"{platform.python_version()} ({specifier}) in {sys.prefix}",
        remedy=f"Install into an environment of Python {specifier}.",
    )


def check_version(name: str) -> Check:
    """Check the version of an installed distribution against what requires it.

    :param name: The name of the distribution.

    :returns: The check.
    """
    specifier = _required_specifier(name)

    try:
        found = version(name)
    except PackageNotFoundError:
        found = ""

    return Check(
        name=name,
        passed=found != "" and specifier.contains(found, prereleases=True),
        finding=f"{found or 'not installed'} ({str(specifier) or 'any'})",
        remedy=f"Run `pip install '{name}{specifier}'`.",
    )


def check_libsndfile(*, fix: bool) -> Check:
    """Check that fairseq2n will find libsndfile.

    :param fix: Whether to link the library of ``soundfile`` if it will not.

    :returns: The check.
    """
    name = find_libsndfile()
    finding = "not found, and fairseq2 cannot be imported without it"
    remedy = "Run `moxe doctor --fix`, or install libsndfile1 in the system."

    if name is None and fix:
        try:
            name = link_libsndfile()
        except OSError as ex:
            finding = str(ex)
            remedy = "Install libsndfile1 with the package manager of the system."

    return Check(
        name="libsndfile",
        passed=name is not None,
        finding=finding if name is None else name,
        remedy=remedy,
    )


def check_resources() -> Check:
    """Check that the recipes and the evaluation tasks came with the package.

    :returns: The check.
    """
    try:
        counts = [
            f"{sum(1 for _ in resource_dir('recipes').rglob('*.yaml'))} recipes",
            f"{sum(1 for _ in resource_dir('eval_tasks').rglob('*.yaml'))} tasks",
        ]
        finding = f"{', '.join(counts)} in {resource_dir('recipes').parent}"
    except FileNotFoundError as ex:
        counts, finding = [], str(ex)

    return Check(
        name="resources",
        passed=bool(counts) and not any(c.startswith("0 ") for c in counts),
        finding=finding,
        remedy=_REINSTALL,
    )


_PROBES_COMMAND: Final = (sys.executable, "-m", "moxe_plugin.doctor.probes")

_PROBES: Final = {
    "device": "Check the installation of torch and the driver of the GPU.",
    "extension": "fairseq2 does not know our models. If the error names another "
    f"package, that one is at fault; otherwise: {_REINSTALL}",
    "cache": "Set `MOXE_CACHE_DIR` to a directory that can be written.",
    "native": "Set `MOXE_PRODUCTS` to 'auto', or leave it out.",
    "lm_eval": f"`lm_eval --model moxe` does not work. {_REINSTALL}",
}


def check_probes() -> Iterator[Check]:
    """Run :mod:`moxe_plugin.doctor.probes` in child processes, since any may crash.

    :yields: The checks. One process runs all; after a failure another runs the rest.
    """
    remaining = list(_PROBES)

    while remaining:
        with TemporaryFile("w+") as errors:
            for finding, warns in _run_probes(remaining, errors):
                name = remaining.pop(0)
                yield Check(
                    name=name, passed=True, finding=finding, remedy="", warns=warns
                )

            if remaining:
                errors.seek(0)
                name = remaining.pop(0)
                yield Check(
                    name=name,
                    passed=False,
                    finding=_summarize_error(errors.read()),
                    remedy=_PROBES[name],
                )


def _run_probes(names: list[str], errors: IO[str]) -> Iterator[tuple[str, bool]]:
    with subprocess.Popen(
        [*_PROBES_COMMAND, *names],
        # fairseq2 only warns of an extension that fails, unless this is set.
        env=os.environ | {"FAIRSEQ2_EXTENSION_TRACE": "1"},
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    ) as child:
        for line in child.stdout or ():
            for prefix in (FINDING_PREFIX, WARNING_PREFIX):
                if line.startswith(prefix):
                    yield line.removeprefix(prefix).strip(), prefix == WARNING_PREFIX


def _required_specifier(name: str) -> SpecifierSet:
    specifier = SpecifierSet()

    for distribution in _REQUIRING:
        try:
            lines = requires(distribution) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.name == name and not requirement.marker:
                specifier &= requirement.specifier

    return specifier


def _summarize_error(stderr: str) -> str:
    # One line for each exception of the chain, the cause first.
    errors = re.findall(r"^[\w.]+(?:Error|Exception|Exit)\b.*$", stderr, re.MULTILINE)
    if not errors:
        return stderr.strip()[-_MAX_ERROR_LEN:] or "the process died"

    return "; then ".join(e[:_MAX_ERROR_LEN] for e in errors)
