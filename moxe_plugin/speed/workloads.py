"""What is timed: a training step, reading a text, continuing it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from fairseq2.recipe.config import AdamWConfig
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from moxe_plugin.models.captured_steps import CapturedStepsLM
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.speed.suites import SpeedCase
from moxe_plugin.train.config import TrainConfig

PARAMETER_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "autocast": torch.float32,
}
"""The data types of parameters by precision; ``autocast`` computes in bfloat16."""


class Workload(NamedTuple):
    """What is timed."""

    call: Callable[[], object]
    """Runs it once."""

    num_tokens: int
    """How many tokens a call is made of."""

    count_state_bytes: Callable[[], int | None]
    """Counts the bytes of the state that ``length`` tokens leave, after the first call;
    ``None`` without a state."""


def prepare_workload(
    model: nn.Module,
    case: SpeedCase,
    *,
    vocab_size: int,
    precision: str,
    num_calls: int,
    decode_tokens: int,
    chunk_len: int,
) -> Workload:
    """Make everything that a call needs and that is not to be timed.

    Token ids are random. So are the parameters, hence a router sends tokens to its
    experts almost evenly, which a trained one need not do.

    :param model: The model; its mode is set.
    :param case: What it is timed at.
    :param vocab_size: Token ids are less.
    :param precision: One of :data:`PARAMETER_DTYPES`.
    :param num_calls: How often it will be called at most.
    :param decode_tokens: How many tokens a call of ``decode`` continues by.
    :param chunk_len: How many tokens a state takes in at a time in ``prefill``, and
        before ``decode``: attention needs memory for this times the length.

    :returns: The workload.
    """
    device = next(model.parameters()).device

    num_new = num_calls * decode_tokens if case.phase == "decode" else 1

    # One more token, which is a target in training.
    ids = torch.randint(0, vocab_size, (case.batch, case.length + num_new))
    ids = ids.to(device)

    def autocast() -> AbstractContextManager[object]:
        if precision != "autocast":
            return nullcontext()

        return torch.autocast(device.type, torch.bfloat16)

    if case.phase == "train":
        return _prepare_training(model, ids, autocast, optimizer=case.optimizer)

    if case.captured:
        assert isinstance(model, AuxLossCausalLM)
        model = CapturedStepsLM(model)

    return _prepare_reading(model.eval(), ids, case, autocast, decode_tokens, chunk_len)


def _prepare_reading(
    model: nn.Module,
    ids: Tensor,
    case: SpeedCase,
    autocast: Callable[[], AbstractContextManager[object]],
    decode_tokens: int,
    chunk_len: int,
) -> Workload:
    def read(state_bag: IncrementalStateBag, begin: int, end: int) -> None:
        seqs = ids[:, begin:end]

        with torch.no_grad(), autocast():
            model(seqs, BatchLayout.of(seqs), state_bag=state_bag)

        state_bag.increment_step_nr(end - begin)

    def prefill() -> IncrementalStateBag:
        state_bag = IncrementalStateBag(ids.size(1) + 1)

        # What is captured is captured at a step, which no call is to count.
        end = case.length - 1 if case.captured else case.length

        for begin in range(0, end, chunk_len):
            read(state_bag, begin, min(begin + chunk_len, end))
        if end < case.length:
            read(state_bag, end, case.length)

        return state_bag

    if case.phase == "prefill":
        return _prepare_prefill(prefill, case.batch * case.length)

    state_bag = prefill()
    state_bytes = state_bag.size_bytes()

    def decode() -> None:
        for _ in range(decode_tokens):
            read(state_bag, state_bag.step_nr, state_bag.step_nr + 1)

    return Workload(decode, case.batch * decode_tokens, lambda: state_bytes)


def _prepare_training(
    model: nn.Module,
    ids: Tensor,
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    optimizer: bool,
) -> Workload:
    model.train()

    # (N,S+1) -> (N,S) twice
    seqs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    layout = BatchLayout.of(seqs)

    update = _create_update(model) if optimizer else None

    # As optimizers do; to look for those of a model takes milliseconds.
    params = list(model.parameters())

    def step() -> None:
        with autocast():
            loss = model(seqs, layout, targets, reduction="mean")

        loss.backward()

        if update is not None:
            update()

        for param in params:
            param.grad = None

    return Workload(step, seqs.numel(), lambda: None)


def _create_update(model: nn.Module) -> Callable[[], None]:
    """Do with gradients what the recipes do by default."""
    config = TrainConfig()

    section = config.optimizer.config
    assert isinstance(section, AdamWConfig)

    # As fairseq2 reads it: `auto` leaves the choice to torch.
    impl: dict[str, bool] = {
        "auto": {},
        "naive": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }[section.impl]

    adamw = AdamW(
        model.parameters(),
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        foreach=impl.get("foreach"),
        fused=impl.get("fused"),
    )

    max_grad_norm = config.trainer.max_grad_norm

    def update() -> None:
        if max_grad_norm is not None:
            clip_grad_norm_(model.parameters(), max_grad_norm)

        adamw.step()

    return update


def _prepare_prefill(
    prefill: Callable[[], IncrementalStateBag], num_tokens: int
) -> Workload:
    sizes: list[int] = []

    def call() -> None:
        sizes[:] = [prefill().size_bytes()]

    return Workload(call, num_tokens, lambda: sizes[0])
