"""The systems of the paper, by name and size."""

from __future__ import annotations

from typing import Final, NamedTuple

from moxe_plugin.models.gemma2.config import GEMMA2_FAMILY
from moxe_plugin.models.moxe.config import MOXE_FAMILY
from moxe_plugin.models.qwen_moe.config import QWEN_MOE_FAMILY
from moxe_plugin.models.xlstm.config import XLSTM_FAMILY


class System(NamedTuple):
    """A named architecture."""

    label: str
    """What the paper calls it."""

    family: str
    """The model family."""

    arch: str
    """The architecture's name in the family."""

    expert_state: str | None = None
    """What its xLSTM experts remember; ``None`` if it has none."""

    paper_parameters: str | None = None
    """The number of parameters that the paper gives, as it is printed there."""


SIZES: Final = ("340m", "small", "quickstart", "tiny")
"""The sizes that every system has; ``340m`` is the paper's Table 1."""

_MOXE: Final = {
    "MoxE": "",
    "MoxE, gamma = 0": "_gamma0",
    "MoxE-Standard": "_standard",
    "MoxE, no group loss": "_no_group_loss",
    "mLSTM-MoE": "_mlstm",
    "sLSTM-MoE": "_slstm",
}

_BASELINES: Final = (
    ("xLSTM[5:1]", XLSTM_FAMILY, "338m"),
    ("Gemma 2", GEMMA2_FAMILY, "356m"),
    ("Qwen1.5-MoE", QWEN_MOE_FAMILY, "350m"),
)


def list_systems(size: str) -> list[System]:
    """List every system of the paper at a size.

    :param size: One of :data:`SIZES`.

    :returns: MoxE and its ablations, each with experts that remember their own
        sub-sequence and with such as the authors' that remember nothing (MoxE also with
        ``dense`` ones), and the three baselines.

    :raises ValueError: ``size`` is unknown.
    """
    if size not in SIZES:
        raise ValueError(
            f"`size` must be one of {', '.join(SIZES)}, but is '{size}' instead."
        )

    # Only MoxE itself is in Table 1; the paper does not say what its experts remember.
    table_1 = size == SIZES[0]

    systems = []

    for label, suffix in _MOXE.items():
        arch = size + suffix
        paper = "340M" if table_1 and not suffix else None

        systems += [
            System(label, MOXE_FAMILY, arch, "subsequence", paper),
            System(label, MOXE_FAMILY, f"{arch}_token", "token", paper),
        ]

        if not suffix:
            systems.append(System(label, MOXE_FAMILY, f"{arch}_dense", "dense", paper))

    systems.append(System("xLSTM-MoE (FFN experts)", MOXE_FAMILY, f"{size}_ffn"))

    for label, family, table_1_arch in _BASELINES:
        systems.append(
            System(
                label,
                family,
                table_1_arch if table_1 else size,
                paper_parameters=table_1_arch.upper() if table_1 else None,
            )
        )

    return systems
