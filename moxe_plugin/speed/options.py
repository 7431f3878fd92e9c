"""How cases are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moxe_plugin.speed.workloads import PARAMETER_DTYPES


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How cases are measured."""

    device: torch.device
    """Where to compute."""

    precision: str = "float32"
    """``float32``, ``bfloat16`` (parameters too), or ``autocast``."""

    repeats: int = 5
    """How many calls are timed."""

    warm_up: int = 1
    """How many calls go before them."""

    decode_tokens: int = 16
    """How many tokens a call of ``decode`` continues by."""

    chunk_len: int = 512
    """How many tokens a state takes in at a time."""

    matmul_size: int = 2048
    """The number of rows of the matrices that tell the peak."""

    copy_bytes: int = 2**30
    """The bytes that a copy reads which tells the memory's speed; fewer where they
    would be a sixteenth of the memory."""

    seed: int = 1
    """Seeds parameters and token ids."""

    allocator: str = "kept"
    """Whether freed memory of the CPU is ``kept`` in the process, as in training, or
    goes to the ``system`` as the environment says."""

    checkpoint_layers: bool = False
    """Whether training keeps the inputs of layers only, and computes the rest again."""

    router_skew: float = 0.0
    """The standard deviation of offsets that MoxE's routers prefer some experts by."""

    @property
    def num_calls(self) -> int:
        """How many calls there are in all."""
        return self.warm_up + self.repeats

    def check(self) -> None:
        """Look for values that cannot be measured with.

        :raises ValueError: There is one.
        """
        if self.precision not in PARAMETER_DTYPES:
            raise ValueError(
                f"`dtype` must be one of {', '.join(PARAMETER_DTYPES)}, but is "
                f"'{self.precision}' instead."
            )

        if self.allocator not in ("kept", "system"):
            raise ValueError(
                f"`allocator` must be kept or system, but is '{self.allocator}' "
                "instead."
            )

        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"`device` must be cpu or cuda, but is '{self.device}' instead."
            )

        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"`device` must be on this machine, but '{self.device}' is not. Choose "
                "'cpu'."
            )

        if not 0.0 <= self.router_skew < math.inf:
            raise ValueError(
                "`router_skew` must be finite and greater than or equal to 0, but is "
                f"{self.router_skew} instead."
            )

        for name, least in (
            *(("repeats", 1), ("warm_up", 0), ("decode_tokens", 1)),
            *(("chunk_len", 1), ("matmul_size", 1)),
            ("copy_bytes", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"`{name}` must be greater than or equal to {least}, but is "
                    f"{getattr(self, name)} instead."
                )
