"""What this package registers with fairseq2: the one list."""

from __future__ import annotations

from fairseq2.composition import register_package_assets
from fairseq2.runtime.dependency import DependencyContainer

from moxe_plugin.data.registration import register_data
from moxe_plugin.hf.converters import register_hf_converters
from moxe_plugin.models.gemma2 import register_gemma2
from moxe_plugin.models.moxe import register_moxe
from moxe_plugin.models.npz_checkpoint import register_npz_checkpoints
from moxe_plugin.models.qwen_moe import register_qwen_moe
from moxe_plugin.models.xlstm import register_xlstm


def register_moxe_plugin(container: DependencyContainer) -> None:
    """Register the model families, their file formats, the data and the asset cards.

    :param container: fairseq2's container; nothing is resolved from it here.
    """
    register_moxe(container)
    register_xlstm(container)
    register_gemma2(container)
    register_qwen_moe(container)

    register_npz_checkpoints(container)

    register_hf_converters(container)

    register_data(container)

    register_package_assets(container, "moxe_plugin.cards")
