"""The table of systems as Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pandas as pd

from moxe_plugin.systems.measuring import SystemCost

_DASH: Final = "—"

_PREAMBLE: Final = """\
Written by `moxe systems --size {size} --context-len {context_len}`; nothing is typed by
hand but the paper's own numbers."""

_COLUMNS: Final = """\
- **experts remember**: what an xLSTM expert sees of its past: the tokens of the
  sequence that were routed to it (`subsequence`), nothing (`token`, the authors' code),
  or all tokens (`dense`).
- **total**: all parameters.
- **active**: those in a token's matrix products: without the input embedding unless it
  is also the output projection, and without the experts that the token is not sent to
  (the mean over experts).
- **effective**: those that can receive a gradient at all, measured: backward passes of
  the training loss in float64, at random parameters, until another batch adds no
  element to the union of gradients. Rows of the embedding count as those of the tokens
  in the batches do.
- **never trained**: total less effective.
- **MFLOP per token**: useful FLOPs of a forward pass, in millions, at a context of
  {context_len:,} tokens spread evenly over the experts. A multiply-add is 2; only
  matrix products count, of the chosen experts, without padding; attention and the
  parallel form of the mLSTM count whole, though half of it is masked.
- **paper**: what the paper's Table 1 says. It does not say what experts remember."""

_NOTES: Final = """\
Parameters that never train: with `token` an sLSTM expert never uses its recurrent
matrix, its input and forget gates and the convolution before them, nor an mLSTM expert
its forget gate; of convolutions that see one token only the last tap works. The bias of
an sLSTM's input gate never trains in any system: it scales the memory and its
normaliser alike, and their ratio stays as it is. The embedding of the padding token
does not train either, where there is one."""


def write_systems_table(
    costs: Sequence[SystemCost], *, size: str, context_len: int, tables_dir: Path
) -> list[Path]:
    """Write ``systems_<size>.md`` and ``systems_<size>.csv``.

    :param costs: The rows.
    :param size: The size of the systems.
    :param context_len: The length of the sequence that FLOPs were counted at.
    :param tables_dir: Where the files go.

    :returns: The files.
    """
    tables_dir.mkdir(parents=True, exist_ok=True)

    frame = systems_frame(costs, context_len)

    csv_file = tables_dir / f"systems_{size}.csv"
    frame.to_csv(csv_file, index=False, lineterminator="\n")

    table = pd.DataFrame([_format_cells(cost) for cost in costs], dtype="object")

    parts = [
        f"# Systems at size `{size}`",
        _PREAMBLE.format(size=size, context_len=context_len),
        table.to_markdown(
            index=False,
            disable_numparse=True,
            # Names to the left, numbers to the right.
            colalign=["left"] * 3 + ["right"] * (table.shape[1] - 3),
        ),
        _COLUMNS.format(context_len=context_len),
        _NOTES,
    ]

    markdown_file = csv_file.with_suffix(".md")
    markdown_file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")

    return [markdown_file, csv_file]


def systems_frame(costs: Sequence[SystemCost], context_len: int) -> pd.DataFrame:
    """List the costs with unrounded numbers.

    :param costs: The rows.
    :param context_len: The length of the sequence that FLOPs were counted at.

    :returns: One line a system.
    """
    lines = []

    for cost in costs:
        fields = cost._asdict()
        system = fields.pop("system")

        lines.append({**system._asdict(), **fields, "context_len": context_len})

    frame: pd.DataFrame = pd.DataFrame(lines)

    return frame


def _format_cells(cost: SystemCost) -> dict[str, str]:
    system = cost.system

    num_idle = cost.num_parameters - cost.num_effective_parameters

    return {
        "system": system.label,
        "architecture": f"`{system.family}` `{system.arch}`",
        "experts remember": system.expert_state or _DASH,
        "total": f"{cost.num_parameters:,}",
        "active": f"{cost.num_active_parameters:,}",
        "effective": f"{cost.num_effective_parameters:,}",
        "never trained": f"{num_idle:,} ({num_idle / cost.num_parameters:.2%})",
        "MFLOP per token": f"{cost.flops_per_token / 1e6:,.1f}",
        "paper": system.paper_parameters or _DASH,
    }
