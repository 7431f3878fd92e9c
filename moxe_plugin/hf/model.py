"""Our recurrent models as models of transformers."""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import override

from moxe_plugin.hf.cache import RecurrentCache
from moxe_plugin.hf.config import MoxEConfig, RecurrentConfig, XLSTMConfig
from moxe_plugin.hf.padding import Alignment, align

_IGNORED_LABEL: Final = -100
"""transformers' mark of a label that does not count."""


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers' own bases differ
    """Runs a model of a recurrent family, ``model``, for transformers.

    :param config: The configuration.
    """

    config_class = RecurrentConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    # Refuses what needs states of the past, such as assisted generation.
    _is_stateful = True

    # transformers evaluates annotations, hence no type of ours.
    model: nn.Module

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)

        # fairseq2 takes seconds to import.
        from moxe_plugin.hf.families import create_family_model

        self.model = create_family_model(config.family, config.create_family_config())

        self.post_init()  # type: ignore[no-untyped-call]  # of transformers

    @classmethod
    @override
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, as transformers does, from safetensors with every parameter.

        :param args: As transformers has them.
        :param kwargs: As transformers has them.

        :returns: The model, or what transformers returns for ``output_loading_info``.

        :raises ValueError: A parameter is missing, unknown or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)

        kwargs.setdefault("use_safetensors", True)

        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)

        # transformers would go on with fresh values, or with none.
        for problem in ("missing", "unexpected", "mismatched"):
            if names := info[f"{problem}_keys"]:
                raise ValueError(
                    "The checkpoint must have exactly the parameters that its "
                    f"config.json asks for, but has {len(names)} {problem}: "
                    f"{', '.join(map(str, sorted(names)[:3]))}."
                )

        return (model, info) if wants_info else model

    @override
    def _init_weights(self, module: nn.Module) -> None:
        # The modules have initialised themselves.
        pass

    @override
    def get_input_embeddings(self) -> nn.Module:
        """Return the module that embeds tokens."""
        return self.model.get_submodule("decoder_frontend.embed")

    @override
    def get_output_embeddings(self) -> nn.Module:
        """Return the module that projects to logits."""
        return self.model.get_submodule("final_proj")

    @override
    def prepare_inputs_for_generation(  # type: ignore[override]  # another cache
        self,
        input_ids: Tensor,
        past_key_values: RecurrentCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **_: Any,
    ) -> dict[str, Any]:
        """Choose what the next step of ``generate`` reads.

        :param input_ids: All token ids so far. *Shape:* ``(N,S)``.
        :param past_key_values: What was read already.
        :param attention_mask: 1 for tokens, 0 for padding. *Shape:* ``(N,S)``.
        :param use_cache: Whether to remember what is read.

        :returns: Arguments of :meth:`forward`.

        :raises ValueError: A prompt is padded on the right.
        """
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "`attention_mask` must end with a 1 in each row, since a text goes on "
                "after its last column. Set the tokenizer's `padding_side` to 'left'."
            )

        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]

        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Compute logits, and a loss if there are labels.

        :param input_ids: Token ids. *Shape:* ``(N,S)``.
        :param attention_mask: 1 for tokens, 0 for padding on the left or right; with a
            cache, the columns that it has read stand before. *Shape:* ``(N,S)``.
        :param past_key_values: What was read before ``input_ids``; changed in place.
        :param labels: Token ids again, not shifted; -100 and the pad token do not
            count. *Shape:* ``(N,S)``.
        :param use_cache: Whether to return a cache where none is given. Not the default
            that other models have: it is slower, and few callers want it.
        :param return_dict: Whether to return an object and not a tuple.

        :returns: ``logits``, *shape* ``(N,S,V)``, without meaning at padding;
            ``past_key_values``; and ``loss``, the mean over labels in nats, in training
            mode with the model's auxiliary losses.

        :raises ValueError: ``attention_mask`` is none of the above, or a cache is asked
            for in training mode.
        """
        # fairseq2 takes seconds to import.
        from fairseq2.nn import BatchLayout

        if use_cache and past_key_values is None:
            past_key_values = RecurrentCache()

        if past_key_values is not None and self.training:
            raise ValueError(
                "`past_key_values` and `use_cache` must be left out in training mode; "
                "`eval()` leaves it."
            )

        alignment = align(input_ids, attention_mask)

        seqs = alignment.to_left(input_ids)
        layout = BatchLayout.of(seqs, alignment.seq_lens)
        state_bag = None if past_key_values is None else past_key_values.state_bag

        loss: Tensor | None = None
        if labels is None:
            logits = self.model(seqs, layout, state_bag=state_bag)
        else:
            targets, target_mask = _shift(alignment.to_left(labels), alignment)

            loss, logits = self.model(
                seqs,
                layout,
                targets,
                state_bag=state_bag,
                target_mask=target_mask,
                reduction="mean",
                return_logits=True,
            )

        if past_key_values is not None:
            past_key_values.state_bag.increment_step_nr(seqs.size(1))

        output = CausalLMOutputWithPast(
            loss=cast(Any, loss),
            logits=cast(Any, alignment.back(logits)),
            past_key_values=cast(Any, past_key_values),
        )

        return output if return_dict else output.to_tuple()


def _shift(labels: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Turn labels into targets and tell which of them count."""
    # Padding that was on the left is behind the last token now.
    seq_lens = torch.tensor(alignment.seq_lens, device=labels.device)
    columns = torch.arange(labels.size(1), device=labels.device)

    has_next = columns + 1 < seq_lens[:, None]
    targets = labels.roll(-1, dims=1)
    target_mask = has_next & (targets != _IGNORED_LABEL)

    return targets.where(target_mask, 0), target_mask


class MoxEForCausalLM(RecurrentForCausalLM):
    """A MoxE language model."""

    config_class = MoxEConfig


class XLSTMForCausalLM(RecurrentForCausalLM):
    """An xLSTM language model of this package."""

    config_class = XLSTMConfig
