"""What every model family of this package has in common: one forward contract."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout, IncrementalStateBag, Projection
from fairseq2.nn.functional import cross_entropy
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from moxe_plugin.nn.projected_loss import projected_cross_entropy


class Prediction(NamedTuple):
    """What a model computes before it sees targets."""

    logits: Tensor | None
    """Next-token logits; ``None`` if not wanted. *Shape:* ``(N,S,V)``, or ``(S,V)`` for
    a packed batch."""

    aux_losses: dict[str, Tensor]
    """Unweighted auxiliary losses by name: means over tokens and layers, ``()``."""

    stats: dict[str, Tensor]
    """Statistics by name, detached, ``()``; for reports, never part of a loss."""

    hidden: Tensor | None = None
    """What ``final_proj`` would turn into logits that were not wanted. *Shape:*
    ``(N,S,M)``, or ``(S,M)`` for a packed batch."""

    expert_loads: Tensor | None = None
    """How many tokens each expert of each layer got, int64; ``None`` without experts,
    or without the other terms. *Shape:* ``(L,E)``."""


class LossTerms(NamedTuple):
    """A loss and what it is made of.

    A NamedTuple, because FSDP2 looks for output tensors through pytree and
    silently skips a dataclass.
    """

    aggregate: Tensor
    """What training minimises, in nats, reduced as asked: MoxE eq. (21)."""

    nll: Tensor
    """Cross-entropy in nats, reduced as asked."""

    aux_losses: dict[str, Tensor]
    """As in :class:`Prediction`."""

    stats: dict[str, Tensor]
    """As in :class:`Prediction`."""

    expert_loads: Tensor | None = None
    """As in :class:`Prediction`."""


class AuxLossCausalLM(CausalLM):
    """A causal language model whose training loss has named auxiliary terms.

    In training mode the loss is ``nll + num_targets * sum(scale * term)`` for
    ``reduction="sum"`` and ``nll + sum(scale * term)`` for ``"mean"``; in evaluation
    mode it is the cross-entropy alone.

    :param max_seq_len: The maximum length of a sequence in tokens.
    :param pad_idx: The id that is ignored as a target, if there is one.
    :param aux_loss_scales: The weight of each auxiliary loss in the aggregate.
    :param stat_names: The names of the statistics that :meth:`predict` returns.
    """

    adjusts_to_loads: bool = False
    """Whether :meth:`adjust_to_loads` must be called after each optimizer step."""

    has_recurrent_state: ClassVar[bool] = False
    """Whether a state bag holds nothing but
    :class:`~moxe_plugin.models.recurrent_state.RecurrentState`: of constant size, and
    of rows of different lengths if the batch was padded."""

    has_balance_losses: ClassVar[bool] = False
    """Whether :attr:`balance_group` matters."""

    balance_group: ProcessGroup | None = None
    """The processes over whose tokens the losses that balance the load of experts take
    their means in training; ``None`` means this process. All of them must then call the
    model equally often."""

    def __init__(
        self,
        max_seq_len: int,
        pad_idx: int | None,
        aux_loss_scales: Mapping[str, float],
        stat_names: Sequence[str],
    ) -> None:
        super().__init__(max_seq_len)

        self.pad_idx = pad_idx
        self.aux_loss_scales = dict(aux_loss_scales)
        self.stat_names = tuple(stat_names)

    @abstractmethod
    def predict(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        *,
        with_terms: bool,
        with_logits: bool = True,
        state_bag: IncrementalStateBag | None = None,
    ) -> Prediction:
        """Compute logits and, when they are wanted, auxiliary losses and statistics.

        :param seqs: Token ids. *Shape:* ``(N,S)``, or ``(S)`` for a packed batch.
        :param seqs_layout: Where the sequences of the batch begin and end.
        :param with_terms: Whether auxiliary losses and statistics are wanted.
        :param with_logits: Whether logits are wanted. A model that has ``final_proj``
            otherwise returns what enters it; any other returns them all the same.
        :param state_bag: Holds the recurrent state during generation; ``None`` for a
            packed batch.

        :returns: The prediction; ``aux_losses`` has the keys of ``aux_loss_scales``
            and ``stats`` those of ``stat_names``, or both are empty.
        """

    def num_idle_parameters(self) -> float:
        """Count the parameters that do not take part in a token's matrix products.

        :returns: The input embedding's table unless it is also the output projection,
            and the experts a token is not sent to (on average, where experts differ).
        """
        return 0

    def adjust_to_loads(self, expert_loads: Tensor) -> None:
        """Change what follows the load of experts, and no gradient.

        To be called once after each optimizer step, if ``adjusts_to_loads``.

        :param expert_loads: The sum of ``LossTerms.expert_loads`` over the batches of
            the step, in all processes. *Shape:* ``(L,E)``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not follow any load.")

    @override
    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        targets: Tensor | None = None,
        *,
        state_bag: IncrementalStateBag | None = None,
        label_smoothing: float = 0.0,
        target_mask: Tensor | None = None,
        reduction: Literal["sum", "mean"] = "sum",
        return_logits: bool = False,
        return_terms: bool = False,
    ) -> Any:
        """Compute logits, or a loss when ``targets`` are given.

        :param seqs: Token ids. *Shape:* ``(N,S)``, or ``(S)`` for a packed batch.
        :param seqs_layout: Where the sequences of the batch begin and end.
        :param targets: The next token of each token, already shifted. *Shape:* as
            ``seqs``.
        :param state_bag: Holds the recurrent state during generation.
        :param label_smoothing: The share of probability given to all other tokens.
        :param target_mask: Which targets count. *Shape:* as ``targets``.
        :param reduction: How the loss is reduced over targets.
        :param return_logits: Whether to return the logits beside the loss.
        :param return_terms: Whether the loss comes as :class:`LossTerms`.

        :returns: The logits when ``targets`` is ``None``; otherwise the loss, a tensor
            or :class:`LossTerms`, or a pair ``(loss, logits)``.

        :raises ValueError: ``reduction`` is neither ``"sum"`` nor ``"mean"``, or
            ``seqs`` is packed and ``state_bag`` is given.
        """
        if seqs_layout.packed and state_bag is not None:
            raise ValueError("`seqs` must not be packed when `state_bag` is given.")

        # A step of a generation is short: it would spend much of its time on them.
        with_terms = targets is not None and (self.training or return_terms)

        # The loss can do without all of a large vocabulary's logits at once.
        with_logits = targets is None or return_logits or label_smoothing > 0

        prediction = self.predict(
            seqs,
            seqs_layout,
            with_terms=with_terms,
            with_logits=with_logits,
            state_bag=state_bag,
        )

        if targets is None:
            assert prediction.logits is not None

            return prediction.logits

        if reduction not in ("sum", "mean"):
            raise ValueError(
                f"`reduction` must be 'sum' or 'mean', but is '{reduction}' instead."
            )

        if seqs_layout.padded:
            not_padding = seqs_layout.position_indices >= 0
            if target_mask is None:
                target_mask = not_padding
            else:
                target_mask = target_mask & not_padding

        nll = self._nll(prediction, targets, target_mask, reduction, label_smoothing)

        aggregate = nll

        if self.training and self.aux_loss_scales:
            aux = torch.stack(
                [s * prediction.aux_losses[n] for n, s in self.aux_loss_scales.items()]
            ).sum()

            if reduction == "sum":
                num_targets = (
                    targets.numel() if target_mask is None else target_mask.sum()
                )
                aux = aux * num_targets

            aggregate = nll + aux

        loss: Tensor | LossTerms = aggregate

        if return_terms:
            loss = LossTerms(
                aggregate,
                nll,
                prediction.aux_losses,
                prediction.stats,
                prediction.expert_loads,
            )

        if return_logits:
            assert prediction.logits is not None

            return loss, prediction.logits

        return loss

    def _nll(
        self,
        prediction: Prediction,
        targets: Tensor,
        target_mask: Tensor | None,
        reduction: Literal["sum", "mean"],
        label_smoothing: float,
    ) -> Tensor:
        if prediction.logits is not None:
            return cross_entropy(
                prediction.logits,
                targets,
                self.pad_idx,
                label_smoothing=label_smoothing,
                target_mask=target_mask,
                reduction=reduction,
            )

        hidden, final_proj = prediction.hidden, self.final_proj
        assert hidden is not None
        assert isinstance(final_proj, Projection)
        weight = final_proj.weight
        assert isinstance(weight, Tensor)

        targets = targets.flatten()

        is_counted = torch.ones_like(targets, dtype=torch.bool)
        if target_mask is not None:
            is_counted = is_counted & target_mask.flatten()
        if self.pad_idx is not None:
            is_counted = is_counted & targets.ne(self.pad_idx)

        target_weights = is_counted
        if reduction == "mean":
            target_weights = is_counted / is_counted.sum()

        return projected_cross_entropy(
            hidden.flatten(0, -2), weight, targets, target_weights
        )

    if TYPE_CHECKING:
        __call__ = forward
