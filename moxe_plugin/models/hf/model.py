"""A transformers model behind fairseq2's ``CausalLM``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import cast, final

import torch
from fairseq2.nn import BatchLayout, Embedding, IncrementalStateBag
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.generic import ModelOutput
from typing_extensions import override

from moxe_plugin.models.clm import AuxLossCausalLM, Prediction
from moxe_plugin.models.hf.cache import HfCacheState
from moxe_plugin.models.packing import repack_documents, unpack_documents


class HfCausalLM(AuxLossCausalLM):
    """A causal language model that transformers computes.

    Subclasses say in :meth:`read_output` what auxiliary losses and statistics they
    take from transformers' output; the loss is ours, since transformers would shift
    targets that fairseq2 has already shifted.

    No attention mask is made for padding: it stands on the right, where causal
    attention does not look. A packed batch is computed with one row per document.

    :param hf: A ``*ForCausalLM`` of transformers.
    :param max_seq_len: The maximum length of a sequence in tokens.
    :param aux_loss_scales: The weight of each auxiliary loss in the aggregate.
    :param stat_names: The names of the statistics that :meth:`predict` returns.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        max_seq_len: int,
        aux_loss_scales: Mapping[str, float],
        stat_names: Sequence[str],
    ) -> None:
        embed = cast(nn.Embedding, hf.get_input_embeddings())

        super().__init__(max_seq_len, embed.padding_idx, aux_loss_scales, stat_names)

        self.hf = hf

        # Read by recipes that compare the vocabularies of model and tokenizer. Not a
        # module, so that the embedding has one name in the state dict.
        self.decoder_frontend = SimpleNamespace(embed=_HfEmbedding(embed))

    @abstractmethod
    def read_output(self, output: ModelOutput, seqs_layout: BatchLayout) -> Prediction:
        """Take auxiliary losses and statistics from what transformers returned.

        :param output: The output of the transformers model.
        :param seqs_layout: Tells tokens from padding; never packed.

        :returns: Auxiliary losses, statistics and loads; without logits.
        """

    @final
    @override
    def predict(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        *,
        with_terms: bool,
        with_logits: bool = True,
        state_bag: IncrementalStateBag | None = None,
    ) -> Prediction:
        if seqs_layout.packed:
            rows, rows_layout = unpack_documents(seqs, seqs_layout)
            prediction = self.predict(rows, rows_layout, with_terms=with_terms)
            assert prediction.logits is not None
            logits = repack_documents(prediction.logits, seqs_layout)

            return prediction._replace(logits=logits)

        if state_bag is not None and not self.training:
            output = self._continue(seqs, seqs_layout, state_bag)
        else:
            self._check_seq_len(seqs_layout.max_seq_len)

            output = self.hf(input_ids=seqs, use_cache=False)

        if not with_terms:
            return Prediction(output["logits"], {}, {})

        terms = self.read_output(output, seqs_layout)

        return terms._replace(logits=output["logits"])

    @override
    def num_idle_parameters(self) -> float:
        if self.hf.config.tie_word_embeddings:
            return 0

        embed = cast(nn.Embedding, self.hf.get_input_embeddings())

        return embed.weight.numel()

    def _continue(
        self, seqs: Tensor, seqs_layout: BatchLayout, state_bag: IncrementalStateBag
    ) -> ModelOutput:
        if seqs_layout.padded:
            raise ValueError("`seqs` must not be padded when `state_bag` is given.")

        begin, end = state_bag.step_nr, state_bag.step_nr + seqs_layout.width

        self._check_seq_len(end)

        state = state_bag.maybe_get_state(self, HfCacheState)
        if state is None:
            state = HfCacheState(DynamicCache(config=self.hf.config))

            state_bag.set_state(self, state)

        positions = torch.arange(begin, end, device=seqs.device)

        output = self.hf(
            input_ids=seqs,
            position_ids=positions.unsqueeze(0),
            cache_position=positions,
            past_key_values=state.cache,
            use_cache=True,
        )

        return cast(ModelOutput, output)

    def _check_seq_len(self, seq_len: int) -> None:
        if seq_len > self.max_seq_len:
            raise ValueError(
                "A sequence in `seqs` must have at most `max_seq_len` "
                f"({self.max_seq_len}) tokens, but has {seq_len} instead."
            )


@final
class _HfEmbedding(Embedding):
    """An embedding of transformers, seen as one of fairseq2's."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__(embed.num_embeddings, embed.embedding_dim, embed.padding_idx)

        self._embed = embed

    @override
    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._embed(x))
