"""The decoder of MoxE: layers of sequence mixer, router and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fairseq2.nn import IncrementalStateBag
from torch import Tensor
from torch.nn import Module, ModuleList

from moxe_plugin.models.recurrent_state import RecurrentState
from moxe_plugin.nn.difficulty_router import DifficultyRouter
from moxe_plugin.nn.experts import SparseExperts
from moxe_plugin.nn.layers import ScaleNorm
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.routing import Routing, StandardRouter
from moxe_plugin.nn.slstm import SLSTMBlock


@final
class MoxEDecoderLayer(Module):
    """Mix the sequence, route each token, and sum its experts: MoxE eqs. (4)-(9).

    No residual goes around the layer: the blocks carry their own, and since the
    experts' weights sum to 1 the mixer's output passes through them.

    :param mixer_blocks: The xLSTM blocks of the sequence mixer.
    :param mixer_norm: The norm at the end of the mixer.
    :param router: Chooses the experts.
    :param experts: The experts.
    """

    def __init__(
        self,
        mixer_blocks: Sequence[MLSTMBlock | SLSTMBlock],
        mixer_norm: ScaleNorm,
        router: DifficultyRouter | StandardRouter,
        experts: SparseExperts,
    ) -> None:
        super().__init__()

        self.mixer_blocks = ModuleList(mixer_blocks)
        self.mixer_norm = mixer_norm
        self.router = router
        self.experts = experts

    def forward(
        self,
        seqs: Tensor,
        seq_lens: Tensor | None,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> tuple[Tensor, Routing]:
        """Apply the layer.

        :param seqs: The layer's input. *Shape:* ``(N,S,M)``.
        :param seq_lens: The lengths of right-padded rows. *Shape:* ``(N)``.
        :param state_bag: Holds the recurrent state; read and written in evaluation
            mode only.

        :returns: The layer's output, *Shape:* ``(N,S,M)``, and the routing of its
            ``T = N * S`` tokens.
        """
        keeps_state = state_bag is not None and not self.training

        state = None
        if keeps_state and state_bag is not None:
            state = state_bag.maybe_get_state(self, RecurrentState)

        block_states = []
        for idx, block in enumerate(self.mixer_blocks):
            seqs, block_state = block(
                seqs,
                seq_lens,
                None if state is None else state.block_states[idx],
                return_state=keeps_state,
                # The bag forgets it.
                reuse_state=True,
            )
            block_states.append(block_state)

        seqs = self.mixer_norm(seqs)

        # (N,S,M) -> (T,M)
        routing = self.router(seqs.flatten(0, 1))

        seqs, experts_state = self.experts(
            seqs,
            routing,
            seq_lens,
            None if state is None else state.experts_state,
            return_state=keeps_state,
            reuse_state=True,
        )

        if keeps_state and state_bag is not None:
            state_bag.set_state(self, RecurrentState(block_states, experts_state))

        return seqs, routing


@final
class MoxEDecoder(Module):
    """A stack of MoxE decoder layers.

    :param layers: The layers.
    :param layer_norm: The norm after the last layer, if any.
    """

    def __init__(
        self, layers: Sequence[MoxEDecoderLayer], layer_norm: ScaleNorm | None
    ) -> None:
        super().__init__()

        self.layers = ModuleList(layers)
        self.layer_norm: ScaleNorm | None
        self.register_module("layer_norm", layer_norm)

    def forward(
        self,
        seqs: Tensor,
        seq_lens: Tensor | None,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Apply all layers.

        :param seqs: Token embeddings. *Shape:* ``(N,S,M)``.
        :param seq_lens: The lengths of right-padded rows. *Shape:* ``(N)``.
        :param state_bag: Holds the recurrent state during generation.

        :returns: The decoder's output, *Shape:* ``(N,S,M)``, and each layer's routing.
        """
        routings = []

        for layer in self.layers:
            seqs, routing = layer(seqs, seq_lens, state_bag=state_bag)
            routings.append(routing)

        if self.layer_norm is not None:
            seqs = self.layer_norm(seqs)

        return seqs, routings
