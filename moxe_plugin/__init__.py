"""MoxE and its baselines for fairseq2 and lm-evaluation-harness."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairseq2.runtime.dependency import DependencyContainer


def setup_moxe_plugin(container: DependencyContainer) -> None:
    """Register everything of this package with fairseq2.

    fairseq2 calls this through the entry-point group ``fairseq2.extension``.
    """
    from moxe_plugin.composition import register_moxe_plugin

    register_moxe_plugin(container)
