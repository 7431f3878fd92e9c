"""Registers the dataset and tokenizer families of this package."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Final, cast, final

from fairseq2.assets import AssetDownloadManager
from fairseq2.composition import register_dataset_family, register_tokenizer_family
from fairseq2.error import NotSupportedError
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.utils.uri import Uri
from typing_extensions import override

from moxe_plugin.data.instructions import (
    MOXE_INSTRUCTIONS_FAMILY,
    InstructionsConfig,
    InstructionsDataset,
    open_instructions,
)
from moxe_plugin.data.tokenizer import (
    MOXE_HG_TOKENIZER_FAMILY,
    HgTextTokenizer,
    HgTextTokenizerConfig,
    load_hg_text_tokenizer,
)
from moxe_plugin.data.tokens import (
    MOXE_TOKENS_FAMILY,
    TokensConfig,
    TokensDataset,
    open_tokens,
)

EMBEDDED_SCHEME: Final = "moxe-embedded"


def register_data(container: DependencyContainer) -> None:
    """Register everything in ``moxe_plugin.data`` with fairseq2.

    The asset cards in ``moxe_plugin.cards`` need it.

    :param container: The container.
    """
    register_dataset_family(
        container,
        MOXE_TOKENS_FAMILY,
        kls=TokensDataset,
        config_kls=TokensConfig,
        opener=open_tokens,
    )

    register_dataset_family(
        container,
        MOXE_INSTRUCTIONS_FAMILY,
        kls=InstructionsDataset,
        config_kls=InstructionsConfig,
        opener=open_instructions,
    )

    register_tokenizer_family(
        container,
        MOXE_HG_TOKENIZER_FAMILY,
        kls=HgTextTokenizer,
        config_kls=HgTextTokenizerConfig,
        loader=load_hg_text_tokenizer,
    )

    container.collection.register_type(AssetDownloadManager, EmbeddedAssets)


@final
class EmbeddedAssets(AssetDownloadManager):
    """Builds what ``moxe-embedded:SIZE`` names in an asset card on first use."""

    @override
    def download_model(
        self,
        uri: Uri,
        model_name: str = "",
        *,
        force: bool = False,
        local_only: bool = False,
        progress: bool = True,
    ) -> Path:
        raise NotSupportedError(f"{uri} is not a model.")

    @override
    def download_tokenizer(
        self,
        uri: Uri,
        tokenizer_name: str = "",
        *,
        force: bool = False,
        local_only: bool = False,
        progress: bool = True,
    ) -> Path:
        from moxe_plugin.data.corpus import EmbeddedSize, prepare_embedded

        return prepare_embedded(cast(EmbeddedSize, uri.path)).tokenizer_dir

    @override
    def download_dataset(
        self,
        uri: Uri,
        dataset_name: str = "",
        *,
        force: bool = False,
        local_only: bool = False,
        progress: bool = True,
    ) -> Path:
        raise NotSupportedError(f"{uri} is not a dataset.")

    @property
    @override
    def supported_schemes(self) -> Set[str]:
        return {EMBEDDED_SCHEME}
