"""Continue prompts token by token, carrying a model's state along."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout, IncrementalStateBag
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor

from moxe_plugin.eval.batching import Batching
from moxe_plugin.eval.scoring import measure_state_bytes
from moxe_plugin.eval.text_codec import TextCodec


@dataclass(kw_only=True, frozen=True)
class GenerationOptions:
    """How prompts are continued."""

    max_gen_toks: int
    """The most tokens to generate."""

    until: tuple[str, ...] = ()
    """Generation ends when the generated text contains one of these."""

    temperature: float = 0.0
    """Divides the logits before sampling; 0 takes the most likely token."""

    top_k: int | None = None
    """Sample among this many most likely tokens; all if ``None``."""

    top_p: float | None = None
    """Sample among the fewest tokens with at least this probability together."""

    @staticmethod
    def parse(
        gen_kwargs: Mapping[str, Any], default_max_gen_toks: int
    ) -> GenerationOptions:
        """Read the generation arguments of a harness request.

        :param gen_kwargs: The arguments; besides our own names, ``do_sample`` and the
            harness' synonyms of ``max_gen_toks``.
        :param default_max_gen_toks: The limit of a request that names none.

        :returns: The options; without ``do_sample`` the temperature is 0.

        :raises ValueError: An argument is not known, or has an impossible value.
        """
        kwargs = normalize_gen_kwargs(dict(gen_kwargs), default_max_gen_toks)

        do_sample = kwargs.pop("do_sample")
        temperature = float(kwargs.pop("temperature", 1.0)) if do_sample else 0.0
        kwargs.pop("temperature", None)

        until = handle_stop_sequences(kwargs.pop("until"), eos=None)

        known = [f.name for f in fields(GenerationOptions)]
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise ValueError(
                f"Generation arguments must be among do_sample, {', '.join(known)}, "
                f"but have `{'`, `'.join(unknown)}` too."
            )

        if not all(isinstance(text, str) for text in until):
            raise ValueError(f"`until` must be texts, but is {until} instead.")

        return GenerationOptions(
            **kwargs, temperature=temperature, until=tuple(s for s in until if s)
        )

    def __post_init__(self) -> None:
        """Check the values.

        :raises ValueError: A value is impossible.
        """
        if self.max_gen_toks < 1:
            raise ValueError(
                f"`max_gen_toks` must be positive, but is {self.max_gen_toks} instead."
            )

        if self.temperature < 0.0:
            raise ValueError(
                "`temperature` must not be negative, but is "
                f"{self.temperature} instead."
            )

        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be positive, but is {self.top_k} instead.")

        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"`top_p` must be in (0, 1], but is {self.top_p} instead.")


def generate_in_batches(
    model: CausalLM,
    prompts: Sequence[tuple[Sequence[int], GenerationOptions]],
    codec: TextCodec,
    *,
    batching: Batching,
    on_generated: Callable[[int, list[int]], None],
) -> None:
    """Continue prompts, those with the same options together.

    :param model: The model, in evaluation mode.
    :param prompts: Token ids, none of them empty, and how they are continued.
    :param codec: As for :func:`generate`.
    :param batching: Which prompts are computed together.
    :param on_generated: Called once per prompt, with its index and what
        :func:`generate` returns; in no particular order.
    """
    groups: dict[GenerationOptions, list[int]] = defaultdict(list)
    for idx, (_, options) in enumerate(prompts):
        groups[options].append(idx)

    state_bytes = measure_state_bytes(model) if prompts else 0

    for options, group in groups.items():
        lengths = [len(prompts[i][0]) + options.max_gen_toks for i in group]

        for batch in batching.make_batches(lengths, state_bytes):
            indices = [group[i] for i in batch]
            generated = generate(
                model, [prompts[i][0] for i in indices], options, codec
            )

            for idx, tokens in zip(indices, generated, strict=True):
                on_generated(idx, tokens)


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    codec: TextCodec,
) -> list[list[int]]:
    """Continue prompts, of any lengths, together.

    The shortest prompt is read in one go, the rest of longer ones token by token, so no
    prompt is padded. Sampling draws from torch's global generator: its results depend
    on the batch, greedy ones do not.

    :param model: The model, in evaluation mode.
    :param prompts: Token ids; none is empty.
    :param options: When to stop and how to choose.
    :param codec: Knows the token that ends a text, and what tokens spell.

    :returns: The generated tokens of each prompt, without the one that ends the text.
        The last one may spell more than the stop string that it completes.
    """
    device = next(model.parameters()).device

    generated: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the prompt of each row of the batch

    position = min(len(p) for p in prompts)
    seqs = torch.tensor([p[:position] for p in prompts], device=device)

    max_num_steps = max(len(p) for p in prompts) + options.max_gen_toks
    state_bag = IncrementalStateBag(max_num_steps)

    while True:
        logits = model(seqs, BatchLayout.of(seqs), state_bag=state_bag)
        assert isinstance(logits, Tensor)

        choices = _choose(logits[:, -1], options).tolist()
        next_tokens, rows = [], []

        for row, idx in enumerate(active):
            token = choices[row]

            if position < len(prompts[idx]):
                token = prompts[idx][position]
            elif _is_last(token, generated[idx], options, codec):
                continue

            next_tokens.append(token)
            rows.append(row)

        if not rows:
            return generated

        if len(rows) < len(active):
            state_bag.reorder(torch.tensor(rows, device=device))
            active = [active[row] for row in rows]

        state_bag.increment_step_nr(seqs.size(1))
        seqs = torch.tensor(next_tokens, device=device)[:, None]
        position += 1


def _is_last(
    token: int,
    generated: list[int],
    options: GenerationOptions,
    codec: TextCodec,
) -> bool:
    if token == codec.eos_idx:
        return True

    generated.append(token)

    if len(generated) >= options.max_gen_toks:
        return True

    if not options.until:
        return False

    text = codec.decode(generated)

    return any(stop in text for stop in options.until)


def _choose(logits: Tensor, options: GenerationOptions) -> Tensor:
    if options.temperature == 0.0:
        return logits.argmax(dim=-1)

    # (N,V), the most likely token first.
    probs, tokens = torch.softmax(logits.float() / options.temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )

    if options.top_k is not None:
        probs[:, options.top_k :] = 0.0

    if options.top_p is not None:
        # A token stays if those before it do not reach `top_p`.
        probs[probs.cumsum(dim=-1) - probs >= options.top_p] = 0.0

    # multinomial normalises the rows.
    return tokens.gather(1, torch.multinomial(probs, 1))[:, 0]
