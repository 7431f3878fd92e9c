"""What all forms of the routing page show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from torch import Tensor

from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.eval.text_codec import TextCodec
from moxe_plugin.eval.traces import LayerTrace, TextTrace, trace_tokens
from moxe_plugin.models.moxe.model import MoxELM
from moxe_plugin.nn.routing import normalized_entropy
from moxe_plugin.routing_page.colours import Colouring, find_scale
from moxe_plugin.routing_page.pieces import Piece, split_text

GROUP_NAMES: Final = {
    "m": "mLSTM experts only",
    "s": "sLSTM experts only",
    "ms": "experts of both groups",
}
"""What the marks of tokens mean."""


class LayerSummary(NamedTuple):
    """A layer in a few numbers, means over the tokens."""

    mlstm_share: float | None
    """The weight of mLSTM experts, if there are groups."""

    group_shares: dict[str, float]
    """The share of tokens with each mark."""

    difficulty: float | None
    """The predicted difficulty."""

    entropy: float
    """The router's normalised entropy, MoxE eq. (11)."""

    experts_per_token: float
    """The number of chosen experts."""


@dataclass(frozen=True, kw_only=True)
class RoutingView:
    """A text, and what a model does with its tokens."""

    title: str
    """What the model is called."""

    notes: Sequence[str]
    """Sentences that a reader must know."""

    source: str | None
    """Where the text is from."""

    pieces: Sequence[Piece]
    """The text of each token."""

    trace: TextTrace
    """Losses and routing."""

    num_experts: int
    """The number of experts of a layer."""

    num_mlstm_experts: int | None
    """How many of them, the first ones, are mLSTM blocks, the others being sLSTM
    blocks; ``None`` for experts that are neither."""

    def expert_name(self, idx: int) -> str:
        """Name an expert.

        :param idx: Its index.

        :returns: Its kind and index.
        """
        if self.num_mlstm_experts is None:
            return f"FFN {idx}"

        return f"{'mLSTM' if idx < self.num_mlstm_experts else 'sLSTM'} {idx}"

    def mlstm_shares(self, layer: LayerTrace) -> Tensor | None:
        """Sum the weights of each token's mLSTM experts.

        :param layer: The layer.

        :returns: The sums, in [0, 1]; ``None`` where there are no groups. *Shape:*
            ``(S)``.
        """
        if self.num_mlstm_experts is None:
            return None

        is_mlstm = layer.expert_indices < self.num_mlstm_experts

        # An empty place, index -1, has weight 0.
        return (layer.expert_weights * is_mlstm).sum(dim=-1)

    def marks(self, layer: LayerTrace) -> list[str]:
        """Tell which groups each token's experts are of.

        :param layer: The layer.

        :returns: ``m``, ``s`` or ``ms`` for each token, or empty strings where there
            are no groups.
        """
        if self.num_mlstm_experts is None:
            return [""] * len(self.pieces)

        chosen = layer.expert_indices
        has_mlstm = ((chosen >= 0) & (chosen < self.num_mlstm_experts)).any(dim=-1)
        has_slstm = (chosen >= self.num_mlstm_experts).any(dim=-1)

        return [
            "m" * m + "s" * s
            for m, s in zip(has_mlstm.tolist(), has_slstm.tolist(), strict=True)
        ]

    def colourings(self) -> list[Colouring]:
        """List what tokens can be coloured by, the most telling first.

        :returns: Difficulty, if the model predicts one, loss and entropy.
        """
        layers = self.trace.layers
        losses = [self.trace.nll_nats] * len(layers)
        entropies = [normalized_entropy(layer.unbiased_probs) for layer in layers]
        difficulties = [la.difficulty for la in layers if la.difficulty is not None]

        named = [
            ("loss", "loss of the token, nats", losses),
            ("entropy", "entropy of the router, share of its maximum", entropies),
        ]
        if difficulties:
            named.insert(0, ("difficulty", "predicted difficulty", difficulties))

        return [
            Colouring(key, label, values, *find_scale(values))
            for key, label, values in named
        ]

    def summarize(self, layer: LayerTrace) -> LayerSummary:
        """Describe a layer in a few numbers.

        :param layer: The layer.

        :returns: The numbers.
        """
        shares = self.mlstm_shares(layer)
        marks = self.marks(layer)

        return LayerSummary(
            None if shares is None else float(shares.mean()),
            {m: marks.count(m) / len(marks) for m in GROUP_NAMES if m in marks},
            None if layer.difficulty is None else float(layer.difficulty.mean()),
            float(normalized_entropy(layer.unbiased_probs).mean()),
            float((layer.expert_indices >= 0).sum(dim=-1).float().mean()),
        )


def create_view(
    loaded: LoadedModel,
    text: str,
    *,
    max_tokens: int,
    title: str | None = None,
    source: str | None = None,
) -> RoutingView:
    """Let a model read a text.

    :param loaded: The model and its tokenizer.
    :param text: The text.
    :param max_tokens: How much of it to read.
    :param title: What to call the model; where it was loaded from by default.
    :param source: Where the text is from.

    :returns: The view.

    :raises ValueError: The model is no MoxE, ``text`` is empty or no valid Unicode, or
        ``max_tokens`` is less than 1.
    """
    model = loaded.model

    if not isinstance(model, MoxELM):
        family = loaded.provenance.get("model_family", "another family")

        raise ValueError(
            f"`{loaded.name}` must be a MoxE model, but is of {family} instead, which "
            "has no experts of two groups to route between."
        )

    if max_tokens < 1:
        raise ValueError(
            f"`max_tokens` must be greater than or equal to 1, but is {max_tokens} "
            "instead."
        )

    if not text:
        raise ValueError("`text` must have at least one character, but is empty.")

    _check_unicode(text)

    codec = TextCodec(loaded.tokenizer, None, add_bos_token=False)
    all_ids = codec.encode(text)
    token_ids = all_ids[:max_tokens]

    notes = []
    if len(token_ids) < len(all_ids):
        notes.append(
            f"Only the first {len(token_ids):,} of the text's {len(all_ids):,} tokens "
            "were read (`--max-tokens`)."
        )

    if len(token_ids) > model.max_seq_len:
        notes.append(
            f"The {len(token_ids):,} tokens were read in one pass, beyond the model's "
            f"context of {model.max_seq_len:,} tokens (`max_seq_len`)."
        )

    config = model.config

    return RoutingView(
        title=title or _name(loaded),
        notes=notes,
        source=source,
        pieces=split_text(
            loaded.tokenizer.create_decoder(skip_special_tokens=False), token_ids
        ),
        trace=trace_tokens(model, token_ids, codec.prefix_token_id),
        num_experts=config.num_experts,
        num_mlstm_experts=(
            config.mlstm_group_size if config.experts == "xlstm" else None
        ),
    )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as ex:
        raise ValueError(
            f"The text must be valid Unicode, but has {text[ex.start]!r} at character "
            f"{ex.start}."
        ) from ex


def _name(loaded: LoadedModel) -> str:
    return loaded.name if loaded.step is None else f"{loaded.name}, step {loaded.step}"
