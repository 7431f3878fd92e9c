"""What to measure: cases, and the suites that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Final, Literal, TypeAlias

from moxe_plugin.models.gemma2.config import GEMMA2_FAMILY
from moxe_plugin.models.moxe.config import MOXE_FAMILY
from moxe_plugin.models.qwen_moe.config import QWEN_MOE_FAMILY
from moxe_plugin.models.xlstm.config import XLSTM_FAMILY
from moxe_plugin.systems.catalogue import list_systems

Phase: TypeAlias = Literal["train", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class SpeedCase:
    """A system, and what it is timed at."""

    suite: str
    """The suite that asks for it."""

    family: str
    """The model family."""

    arch: str
    """The architecture's name in the family."""

    overrides: Mapping[str, int] = field(default_factory=dict)
    """Fields of the architecture's configuration that differ."""

    phase: Phase
    """``train``: forward and backward pass; ``prefill``: reading ``length`` tokens,
    without gradients, into a state; ``decode``: one token at a time after that."""

    batch: int
    """The number of sequences."""

    length: int
    """The length of a sequence in tokens; for ``decode``, of what came before."""

    optimizer: bool = False
    """Whether a training step ends with a step of the optimizer."""

    linear: Literal["own", "swapped"] = "own"
    """Whose products linear layers use: the system's ``own``, or ours, ``swapped`` in;
    see :func:`~moxe_plugin.speed.swapping.swapped_linear`."""

    captured: bool = False
    """Whether a token of ``decode`` is launched as a whole, from a CUDA graph; see
    :mod:`moxe_plugin.models.captured_steps`."""

    implementation: Literal["own", "nxai"] = "own"
    """Whose code it is: this package's, or for xLSTM that of NX-AI's package; see
    :mod:`moxe_plugin.speed.nxai`."""


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What the user may change about suites."""

    size: str = "340m"
    """The size of the systems, one of :data:`~moxe_plugin.systems.catalogue.SIZES`."""

    batch: Sequence[int] = ()
    """Batch sizes in place of the suite's own."""

    length: Sequence[int] = ()
    """Lengths in place of the suite's own."""

    experts: Sequence[int] = (8, 16, 32, 64)
    """Numbers of experts, for the suite ``experts``."""

    tokens: int | None = None
    """Tokens of a step, for the suite ``length``; ``None`` means the longest length."""

    swap_linear: bool = False
    """Whether systems of transformers are measured again with our products."""

    nxai_xlstm: bool = False
    """Whether a training step of xLSTM is measured again in NX-AI's package."""

    capture_steps: bool = False
    """Whether ``decode`` of recurrent models is measured again from a CUDA graph."""


_TABLE_1: Final = (MOXE_FAMILY, XLSTM_FAMILY, GEMMA2_FAMILY, QWEN_MOE_FAMILY)

_TRANSFORMERS: Final = (GEMMA2_FAMILY, QWEN_MOE_FAMILY)
"""Families whose products are not ours."""

_BATCHES: Final = (1, 2, 4, 8, 16)
_LENGTHS: Final = (256, 512, 1024, 2048, 4096, 8192)
_CONTEXTS: Final = (256, 1024, 4096, 16384)


def list_cases(suite: str, options: SuiteOptions) -> list[SpeedCase]:
    """List what a suite measures; MoxE comes first, and others are compared with it.

    :param suite: One of :data:`SUITES`.
    :param options: What differs from the suite's own choices.

    :returns: The cases.

    :raises ValueError: ``suite`` is unknown, or an option does not fit it.
    """
    if suite not in SUITES:
        raise ValueError(
            f"`suite` must be one of {', '.join(SUITES)}, but is '{suite}' instead."
        )

    for name in ("batch", "length", "experts"):
        if any(value < 1 for value in getattr(options, name)):
            raise ValueError(
                f"`{name}` must be greater than or equal to 1, but is "
                f"{list(getattr(options, name))} instead."
            )

    cases = SUITES[suite](suite, options)

    if options.swap_linear:
        cases = _add_swapped(cases)
    if options.nxai_xlstm:
        cases = _add_nxai(cases)
    if options.capture_steps:
        cases = _add_captured(cases)

    return list(cases)


def _add_swapped(cases: Iterator[SpeedCase]) -> Iterator[SpeedCase]:
    for case in cases:
        yield case

        if case.family in _TRANSFORMERS:
            yield replace(case, linear="swapped")


def _add_nxai(cases: Iterator[SpeedCase]) -> Iterator[SpeedCase]:
    for case in cases:
        yield case

        if (case.family, case.phase, case.optimizer) == (XLSTM_FAMILY, "train", False):
            yield replace(case, implementation="nxai")


def _add_captured(cases: Iterator[SpeedCase]) -> Iterator[SpeedCase]:
    for case in cases:
        if case.phase == "decode" and case.family not in _TRANSFORMERS:
            # The first case is what others are compared with: the faster one.
            yield replace(case, captured=True)

        yield case


def _archs(family: str, size: str) -> list[str]:
    return [s.arch for s in list_systems(size) if s.family == family]


def _table_1(suite: str, options: SuiteOptions) -> Iterator[SpeedCase]:
    batches, lengths = options.batch or (4,), options.length or (256,)

    for optimizer, batch, length in product((False, True), batches, lengths):
        for family in _TABLE_1:
            yield SpeedCase(
                suite=suite,
                family=family,
                arch=_archs(family, options.size)[0],
                phase="train",
                batch=batch,
                length=length,
                optimizer=optimizer,
            )


def _ablations(suite: str, options: SuiteOptions) -> Iterator[SpeedCase]:
    batches, lengths = options.batch or (4,), options.length or (256,)

    for batch, length in product(batches, lengths):
        for arch in _archs(MOXE_FAMILY, options.size):
            yield _train_moxe(suite, arch, batch, length)


def _by_length(suite: str, options: SuiteOptions) -> Iterator[SpeedCase]:
    if options.batch:
        raise ValueError(
            f"`batch` must not be set for the suite '{suite}', but is "
            f"{list(options.batch)} instead. Set `tokens`, the number of tokens of a "
            "step: it is divided by the length."
        )

    lengths = options.length or _LENGTHS
    tokens = max(lengths) if options.tokens is None else options.tokens

    for length in lengths:
        if tokens < 1 or tokens % length != 0:
            raise ValueError(
                "`tokens` must be a multiple of every `length` "
                f"({', '.join(map(str, lengths))}), but is {tokens} instead. Choose "
                "another `length`, or a multiple of the longest."
            )

    for length in lengths:
        arch = _archs(MOXE_FAMILY, options.size)[0]

        yield _train_moxe(suite, arch, tokens // length, length)


def _by_experts(suite: str, options: SuiteOptions) -> Iterator[SpeedCase]:
    batches, lengths = options.batch or (4,), options.length or (256,)

    for batch, length in product(batches, lengths):
        for num_experts in options.experts:
            arch = _archs(MOXE_FAMILY, options.size)[0]

            yield _train_moxe(suite, arch, batch, length, num_experts=num_experts)


def _by_batch(suite: str, options: SuiteOptions) -> Iterator[SpeedCase]:
    batches, lengths = options.batch or _BATCHES, options.length or (256,)

    for length, batch in product(lengths, batches):
        arch = _archs(MOXE_FAMILY, options.size)[0]

        yield _train_moxe(suite, arch, batch, length)


def _decode(suite: str, options: SuiteOptions) -> Iterator[SpeedCase]:
    return _by_context(suite, "decode", options)


def _prefill(suite: str, options: SuiteOptions) -> Iterator[SpeedCase]:
    return _by_context(suite, "prefill", options)


def _by_context(suite: str, phase: Phase, options: SuiteOptions) -> Iterator[SpeedCase]:
    batches, lengths = options.batch or (1,), options.length or _CONTEXTS

    for batch, length in product(batches, lengths):
        for family in (MOXE_FAMILY, GEMMA2_FAMILY):
            yield SpeedCase(
                suite=suite,
                family=family,
                arch=_archs(family, options.size)[0],
                phase=phase,
                batch=batch,
                length=length,
            )


def _train_moxe(
    suite: str, arch: str, batch: int, length: int, **overrides: int
) -> SpeedCase:
    return SpeedCase(
        suite=suite,
        family=MOXE_FAMILY,
        arch=arch,
        overrides=overrides,
        phase="train",
        batch=batch,
        length=length,
    )


SUITES: Final[Mapping[str, Callable[[str, SuiteOptions], Iterator[SpeedCase]]]] = {
    "table1": _table_1,
    "ablations": _ablations,
    "length": _by_length,
    "experts": _by_experts,
    "batch": _by_batch,
    "decode": _decode,
    "prefill": _prefill,
}
"""How the cases of each suite are listed."""
