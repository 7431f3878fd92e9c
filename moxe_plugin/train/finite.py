"""Stops a training before a value that is not finite reaches the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from fairseq2.gang import Gang, ReduceOperation
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from moxe_plugin.models.clm import LossTerms
from moxe_plugin.train.continuing import list_resumable_steps


class NonFiniteLossError(Exception):
    """A term of the loss, or the gradient, is NaN or infinite.

    :param step_nr: The training step.
    :param terms: The names of the terms.
    :param output_dir: The output directory of the run.
    """

    def __init__(self, step_nr: int, terms: Iterable[str], output_dir: Path) -> None:
        steps = list_resumable_steps(output_dir)

        if steps:
            state = (
                f"The last checkpoint is that of step {steps[-1]}, and finite: the "
                "same command continues from it"
            )
        else:
            state = "There is no checkpoint yet: the same command begins anew"

        super().__init__(
            f"Training stops at step {step_nr}, before the update of its parameters. "
            f"NaN or infinite are {', '.join(terms)}. {state}, and will end here again "
            "unless something is changed. Lower `optimizer.config.lr`, "
            "lengthen `lr_scheduler.config.num_warmup_steps`, lower "
            "`trainer.max_grad_norm`, or set `trainer.mixed_precision.mode=off`."
        )

        self.step_nr = step_nr


class FiniteWatch:
    """Watches the loss of a step, and its gradient before the parameters follow it.

    It asks the accelerator once per step, where the trainer waits for it anyway, to
    count the targets of all processes.

    :param gang: The processes of the run, which stop together.
    :param output_dir: The output directory of the run.
    """

    def __init__(self, gang: Gang, output_dir: Path) -> None:
        self._gang = gang
        self._output_dir = output_dir
        self._step_nr = 0
        self._names: list[str] = []
        self._num_wrong: Tensor | None = None

    def begin_step(self, step_nr: int) -> None:
        """Forget what was observed.

        :param step_nr: The number of the step that begins.
        """
        self._step_nr = step_nr
        self._num_wrong = None

    @torch.no_grad()
    def observe(self, terms: LossTerms) -> None:
        """Take note of the terms of a batch.

        :param terms: The terms.
        """
        losses = {
            "the cross-entropy": terms.nll,
            **{f"the {name} loss": loss for name, loss in terms.aux_losses.items()},
            "the total loss": terms.aggregate,
        }

        values = torch.stack([v.detach().float() for v in losses.values()])
        num_wrong = values.isfinite().logical_not().float()

        self._names = list(losses)
        self._num_wrong = (
            num_wrong if self._num_wrong is None else self._num_wrong + num_wrong
        )

    @torch.no_grad()
    def check_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Stop if something is not finite; a pre-hook of the optimizer's step.

        :param optimizer: The optimizer, whose parameters have their gradients.

        :raises NonFiniteLossError: A term of the loss or the gradient is not finite on
            any process; raised on all.
        """
        if self._num_wrong is None:
            return

        grads = [
            grad.to_local() if isinstance(grad, DTensor) else grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (grad := parameter.grad) is not None
        ]

        norm = get_total_norm(grads).to(self._num_wrong)

        num_wrong = torch.cat(
            [self._num_wrong, norm.isfinite().logical_not().float()[None]]
        )

        self._gang.all_reduce(num_wrong, ReduceOperation.SUM)

        if not num_wrong.any():
            return

        terms = zip([*self._names, "the gradient"], num_wrong.tolist(), strict=True)

        raise NonFiniteLossError(
            self._step_nr,
            [name for name, number in terms if number > 0],
            self._output_dir,
        )
