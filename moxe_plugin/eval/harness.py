"""The model ``moxe`` of lm-evaluation-harness: any of our families, by checkpoint."""

from __future__ import annotations

import logging
from inspect import signature
from typing import Any, Final, final

import torch

from moxe_plugin.allocator import keep_freed_memory
from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import load_checkpoint

_log = logging.getLogger(__name__)

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@final
class MoxeHarnessLM(LoadedModelLM):
    """Loads a checkpoint and scores it: ``--model moxe --model_args checkpoint=DIR``.

    On a CPU, the process keeps freed memory from then on, unless the environment says
    something else to its allocator: :func:`~moxe_plugin.allocator.keep_freed_memory`.

    :param checkpoint: As ``path_or_asset`` of
        :func:`~moxe_plugin.eval.checkpoints.load_checkpoint`.
    :param model: Another word for ``checkpoint``; the harness names its output
        directory after an argument called so.
    :param step: The training step; the last one by default.
    :param tokenizer: Instead of the tokenizer of the training run: an asset name or a
        directory with a Hugging Face tokenizer.
    :param device: Where to compute. The harness' command line asks for ``cuda:0``
        unless told otherwise; without CUDA that means the CPU, with a warning.
    :param dtype: The type of the parameters, by name; probabilities are always taken
        in float32.
    :param options: As for :class:`~moxe_plugin.eval.adapter.LoadedModelLM`.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        model: str | None = None,
        step: int | None = None,
        tokenizer: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        path_or_asset = model if checkpoint is None else checkpoint

        if path_or_asset is None or (checkpoint is not None and model is not None):
            raise ValueError(
                "Exactly one of `checkpoint` and `model` must be given, as in "
                "`--model_args checkpoint=DIR`."
            )

        known = [*signature(LoadedModelLM).parameters][1:]

        if unknown := sorted(options.keys() - known):
            raise ValueError(
                f"`{unknown[0]}` must not be given. The options of the model are: "
                "checkpoint, model, step, tokenizer, device, dtype, "
                f"{', '.join(known)}."
            )

        if not (step is None or isinstance(step, int)):
            raise ValueError(f"`step` must be a training step, but is '{step}'.")

        if dtype not in _DTYPES:
            raise ValueError(
                f"`dtype` must be one of {', '.join(_DTYPES)}, but is '{dtype}' "
                "instead."
            )

        try:
            torch.device(device)
        except RuntimeError:
            raise ValueError(
                f"`device` must be cpu, cuda or cuda:N, but is '{device}' instead."
            ) from None

        if device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("`device` is '%s', but CUDA is not available: cpu.", device)
            device = "cpu"

        if torch.device(device).type == "cpu":
            keep_freed_memory()

        loaded = load_checkpoint(
            str(path_or_asset),
            step=step,
            device=device,
            dtype=_DTYPES[dtype],
            tokenizer=tokenizer,
        )

        super().__init__(loaded, **options)
