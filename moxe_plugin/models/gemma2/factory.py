"""Build Gemma 2 models."""

from __future__ import annotations

from fairseq2.utils.validation import StandardObjectValidator
from transformers import Gemma2Config as HfGemma2Config
from transformers import Gemma2ForCausalLM

from moxe_plugin.models.gemma2.config import GEMMA2_FAMILY, Gemma2Config
from moxe_plugin.models.gemma2.model import Gemma2LM
from moxe_plugin.models.parallel import check_no_tensor_parallelism


def create_gemma2_model(config: Gemma2Config) -> Gemma2LM:
    """Create a Gemma 2 model on the current device, in the current data type.

    :param config: The configuration.

    :returns: The model with the initial weights of transformers.

    :raises ValidationError: The configuration is not valid.
    :raises NotSupportedError: Tensor parallelism is on.
    """
    StandardObjectValidator().validate(config)

    check_no_tensor_parallelism(GEMMA2_FAMILY)

    return Gemma2Factory(config).create_model()


class Gemma2Factory:
    """Creates the parts of a Gemma 2 model.

    :param config: The configuration.
    """

    def __init__(self, config: Gemma2Config) -> None:
        self._config = config

    def create_model(self) -> Gemma2LM:
        """Create the model.

        :returns: The model.
        """
        hf = Gemma2ForCausalLM(self.create_hf_config())

        return Gemma2LM(hf, self._config.max_seq_len, aux_loss_scales={}, stat_names=())

    def create_hf_config(self) -> HfGemma2Config:
        """Translate the configuration.

        Attention is ``eager``, the one implementation that always caps its logits.

        :returns: The configuration in transformers' words.
        """
        config = self._config

        return HfGemma2Config(
            vocab_size=config.vocab_size,
            pad_token_id=config.pad_idx,
            max_position_embeddings=config.max_seq_len,
            hidden_size=config.model_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            query_pre_attn_scalar=config.head_dim,
            intermediate_size=config.ffn_inner_dim,
            sliding_window=config.sliding_window,
            attn_implementation="eager",
        )
