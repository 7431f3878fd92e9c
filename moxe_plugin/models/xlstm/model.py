"""The xLSTM language model, a stack of xLSTM blocks, for fairseq2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fairseq2.models.transformer import TransformerFrontend
from fairseq2.nn import BatchLayout, IncrementalStateBag, Projection
from torch import Tensor
from torch.nn import Module, ModuleList
from typing_extensions import override

from moxe_plugin.models.clm import AuxLossCausalLM, Prediction
from moxe_plugin.models.packing import repack_documents, unpack_documents
from moxe_plugin.models.recurrent_state import RecurrentState
from moxe_plugin.models.xlstm.config import XLSTMConfig
from moxe_plugin.nn.layers import ScaleNorm
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.slstm import SLSTMBlock


@final
class XLSTMDecoderLayer(Module):
    """One xLSTM block that keeps its state in fairseq2's state bag.

    :param block: The block.
    """

    def __init__(self, block: MLSTMBlock | SLSTMBlock) -> None:
        super().__init__()

        self.block = block

    def forward(
        self,
        seqs: Tensor,
        seq_lens: Tensor | None,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> Tensor:
        """Apply the block.

        :param seqs: The block's input. *Shape:* ``(N,S,M)``.
        :param seq_lens: The lengths of right-padded rows. *Shape:* ``(N)``.
        :param state_bag: Holds the recurrent state; read and written in evaluation
            mode only.

        :returns: The block's output. *Shape:* ``(N,S,M)``.
        """
        if state_bag is None or self.training:
            return self.block(seqs, seq_lens, return_state=False)[0]  # type: ignore[no-any-return]  # Module.__call__

        state = state_bag.maybe_get_state(self, RecurrentState)

        seqs, block_state = self.block(
            seqs,
            seq_lens,
            None if state is None else state.block_states[0],
            # The bag forgets it.
            reuse_state=True,
        )

        state_bag.set_state(self, RecurrentState([block_state]))

        return seqs


@final
class XLSTMDecoder(Module):
    """A stack of xLSTM blocks.

    :param layers: The blocks.
    :param layer_norm: The norm after the last block.
    """

    def __init__(
        self, layers: Sequence[XLSTMDecoderLayer], layer_norm: ScaleNorm
    ) -> None:
        super().__init__()

        self.layers = ModuleList(layers)
        self.layer_norm = layer_norm

    def forward(
        self,
        seqs: Tensor,
        seq_lens: Tensor | None,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> Tensor:
        """Apply all blocks.

        :param seqs: Token embeddings. *Shape:* ``(N,S,M)``.
        :param seq_lens: The lengths of right-padded rows. *Shape:* ``(N)``.
        :param state_bag: Holds the recurrent state during generation.

        :returns: The decoder's output. *Shape:* ``(N,S,M)``.
        """
        for layer in self.layers:
            seqs = layer(seqs, seq_lens, state_bag=state_bag)

        seqs = self.layer_norm(seqs)

        return seqs


@final
class XLSTMLM(AuxLossCausalLM):
    """An xLSTM language model (arXiv 2405.04517).

    :param config: The configuration.
    :param decoder_frontend: Embeds tokens.
    :param decoder: The blocks.
    :param final_proj: Projects the decoder's output to logits.
    """

    has_recurrent_state = True

    def __init__(
        self,
        config: XLSTMConfig,
        decoder_frontend: TransformerFrontend,
        decoder: XLSTMDecoder,
        final_proj: Projection,
    ) -> None:
        super().__init__(config.max_seq_len, config.pad_idx, {}, ())

        self.config = config
        self.decoder_frontend = decoder_frontend
        self.decoder = decoder
        self.final_proj = final_proj

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
        packed_layout = None
        if seqs_layout.packed:
            packed_layout = seqs_layout
            seqs, seqs_layout = unpack_documents(seqs, seqs_layout)

        seq_lens = seqs_layout.seq_lens_pt.long() if seqs_layout.padded else None

        # (N,S) -> (N,S,M)
        hidden, _ = self.decoder_frontend(seqs, seqs_layout, state_bag=state_bag)

        hidden = self.decoder(hidden, seq_lens, state_bag=state_bag)

        if packed_layout is not None:
            # (N,S,M) -> (S,M)
            hidden = repack_documents(hidden, packed_layout)

        if not with_logits:
            return Prediction(None, {}, {}, hidden)

        return Prediction(self.final_proj(hidden), {}, {})

    @override
    def num_idle_parameters(self) -> float:
        return self.config.vocab_size * self.config.model_dim
