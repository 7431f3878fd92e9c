"""The configurations of our models in transformers' form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig


class RecurrentConfig(PretrainedConfig):
    """Holds the configuration of a recurrent family of this package.

    transformers has own meanings for ``top_k`` and other names of ours, hence the
    nested mapping.

    :param model_config: The fields of the family's configuration that differ from its
        default values, as in an asset card.
    :param kwargs: What every configuration of transformers has.
    """

    family: ClassVar[str]
    """The name of the family in fairseq2."""

    def __init__(
        self, model_config: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.model_config = dict(model_config or {})

        # transformers ties them unless told otherwise.
        kwargs.setdefault("tie_word_embeddings", False)

        super().__init__(**kwargs)

    def create_family_config(self) -> Any:
        """Create the configuration that the family itself uses.

        :returns: An object of the family's configuration class.

        :raises ValueError: ``model_config`` has an unknown field or a wrong value.
        """
        # fairseq2 takes seconds to import.
        from moxe_plugin.hf.families import structure_family_config

        return structure_family_config(self.family, self.model_config)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary."""
        return int(self.create_family_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        """The dimensionality of the residual stream."""
        return int(self.create_family_config().model_dim)

    @property
    def max_position_embeddings(self) -> int:
        """The context length of the training; the model itself has no limit."""
        return int(self.create_family_config().max_seq_len)


class MoxEConfig(RecurrentConfig):
    """Holds the configuration of a MoxE model."""

    model_type = "moxe"
    family = "moxe"


class XLSTMConfig(RecurrentConfig):
    """Holds the configuration of an xLSTM model of this package.

    transformers has another xLSTM, of mLSTM blocks alone: ``xLSTMConfig``.
    """

    model_type = "moxe_xlstm"
    family = "xlstm"
