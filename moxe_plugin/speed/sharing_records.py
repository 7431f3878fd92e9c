"""What sharing beginnings spared, as files hold it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from moxe_plugin.eval.checkpoints import LoadedModel

TOLERANCE: Final = 1e-5
"""The largest relative difference of a log-likelihood that float32 explains."""

_PAGE: Final = """\
# Shared beginnings: {name}

Written by `python -m moxe_plugin.speed.sharing`, from `{name}.json`; nothing is typed
by hand. A checkpoint of {family}, {num_parameters:,} parameters, {precision}; {model},
{num_threads} of {num_cores} cores, torch {torch}.

{table}

- **tokens**: what the model read, by itself per request (*alone*) and with beginnings
  that requests have in common read once (*shared*).
- **s**: seconds of scoring all requests, once, tokenization included.
- **nats apart**: the largest difference of a log-likelihood, which is a sum over the
  tokens of a continuation; **per token**: the largest after division by their number;
  **relative**: the largest over the log-likelihood's own size, at least a nat, of which
  float32 explains {tolerance:.0e}.
- **greedy**: requests of which only one way finds the continuation to be the greedy
  one.
"""


@dataclass(frozen=True, kw_only=True)
class SharingRow:
    """One file's requests, scored both ways."""

    file: str
    """The file's name."""

    kind: str
    """``multiple_choice`` or ``last_word``."""

    num_requests: int
    """Pairs of context and continuation."""

    tokens_alone: int
    """Tokens that were read without sharing."""

    tokens_shared: int
    """Tokens that were read with sharing."""

    seconds_alone: float
    """Seconds without sharing."""

    seconds_shared: float
    """Seconds with sharing."""

    max_difference_nats: float
    """The largest difference of a log-likelihood."""

    max_relative_difference: float
    """The largest difference over the size of the log-likelihood without sharing, or
    over a nat where that is less."""

    max_difference_per_token_nats: float
    """The largest difference over the number of tokens of the continuation."""

    num_other_greedy: int
    """Requests of which only one way finds the greedy continuation."""

    @property
    def agrees(self) -> bool:
        """Whether both ways have the same scores, but for rounding."""
        return self.max_relative_difference <= TOLERANCE and self.num_other_greedy == 0


def write_sharing(
    out: Path, name: str | None, loaded: LoadedModel, rows: Sequence[SharingRow]
) -> None:
    """Write ``NAME.json`` and ``NAME.md``.

    :param out: The directory; it is made if there is none.
    :param name: The name of the files without suffix; machine and family if ``None``.
    :param loaded: What was measured with.
    :param rows: What was measured.
    """
    import pandas as pd
    import torch

    from moxe_plugin.bench.machine import describe_code, describe_hardware
    from moxe_plugin.report.files import write_json, write_text

    parameter = next(loaded.model.parameters())
    device = parameter.device

    gpu_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    num_threads = torch.get_num_threads()

    machine = {
        **asdict(describe_hardware(device.type, gpu_name, num_threads, 1)),
        "num_cores": len(os.sched_getaffinity(0)),
        "code": asdict(describe_code()),
        "torch": torch.__version__.partition("+")[0],
    }
    model = {
        "checkpoint": loaded.name,
        "family": loaded.provenance.get("model_family"),
        "num_parameters": sum(p.numel() for p in loaded.model.parameters()),
        "precision": str(parameter.dtype).removeprefix("torch."),
    }
    name = name or f"sharing_{machine['name']}_{model['family']}"

    out.mkdir(parents=True, exist_ok=True)

    write_json(
        out / f"{name}.json",
        {"machine": machine, "model": model, "rows": [asdict(row) for row in rows]},
    )

    table = pd.DataFrame([_format_cells(row) for row in rows]).to_markdown(
        index=False, disable_numparse=True, colalign=["left", *["right"] * 11]
    )
    words = {"name": name, "table": table, "tolerance": TOLERANCE}
    write_text(out / f"{name}.md", _PAGE.format(**(machine | model | words)))


def _format_cells(row: SharingRow) -> dict[str, str]:
    return {
        "requests from": row.file,
        "requests": f"{row.num_requests:,}",
        "tokens alone": f"{row.tokens_alone:,}",
        "shared": f"{row.tokens_shared:,}",
        "ratio": f"{row.tokens_alone / row.tokens_shared:.2f}",
        "s alone": f"{row.seconds_alone:.1f}",
        "shared ": f"{row.seconds_shared:.1f}",
        "ratio ": f"{row.seconds_alone / row.seconds_shared:.2f}",
        "nats apart": f"{row.max_difference_nats:.1e}",
        "per token": f"{row.max_difference_per_token_nats:.1e}",
        "relative": f"{row.max_relative_difference:.1e}",
        "greedy": str(row.num_other_greedy),
    }
