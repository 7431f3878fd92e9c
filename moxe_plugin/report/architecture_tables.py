"""Table 1 as the paper shows it: our architectures beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pandas as pd

from moxe_plugin.report.architectures import Architecture, find_architecture
from moxe_plugin.report.comparison import Comparison
from moxe_plugin.report.formats import DASH
from moxe_plugin.report.named_tables import Table
from moxe_plugin.report.paper import Cell, Paper, format_paper_cell

_COST_NOTE: Final = (
    "Total, active (one token's matrix products) and effective parameters (those that "
    "can receive a gradient), and useful FLOPs of a forward pass per token, are "
    "`moxe systems`'; systems_<size>.md says what they count."
)

_NUM_PRINTED: Final = 7
"""Columns that the paper itself prints; what follows them in paper.json is ours."""


def architecture_table(
    architectures: Sequence[Architecture], paper: Paper | None
) -> Table | None:
    """Set our architectures beside the paper's Table 1.

    :param architectures: What `moxe systems` found.
    :param paper: The paper's numbers.

    :returns: The table; ``None`` without one of the paper's architectures.
    """
    ours = [a for a in architectures if a.paper_parameters is not None]
    if not ours:
        return None

    published = paper.table("table1") if paper else None
    columns = [] if published is None else list(published.columns[1:_NUM_PRINTED])

    cells, numbers = [], []
    for architecture in ours:
        row: Sequence[Cell] = ()
        if published is not None:
            row = next((r for r in published.rows if r[0] == architecture.label), ())

        printed = dict(zip(columns, row[1:_NUM_PRINTED], strict=True)) if row else {}

        cells.append(
            {
                "model": architecture.label,
                "experts remember": architecture.expert_state or DASH,
                **{name: format_paper_cell(printed.get(name)) for name in columns},
                **_cost_cells(architecture),
            }
        )
        numbers.append({**printed, **architecture.__dict__})

    return Table(
        name="paper_table1",
        title="Table 1: architectures, ours beside the paper's",
        caption="The paper's Table 1 (embedding to parameters, paper: as printed) and "
        "our architectures of the same sizes, vocabulary 49,152. No training.",
        cells=pd.DataFrame(cells, dtype="object"),
        numbers=pd.DataFrame(numbers),
        notes=[_COST_NOTE, "The paper does not say what experts remember."],
        num_names=2,
    )


def suite_architecture_table(
    name: str,
    caption: str,
    comparison: Comparison,
    architectures: Sequence[Architecture],
) -> Table:
    """List the architectures of a comparison, as Table 1 does.

    :param name: The stem of its files.
    :param caption: Data, seeds and size.
    :param comparison: The rows.
    :param architectures: What `moxe systems` found.

    :returns: The table.
    """
    cells, numbers, unknown = [], [], []

    for row in comparison.trained_rows:
        model = row.records[0].model
        assert model is not None

        found = find_architecture(architectures, model.family, model.arch)
        if found is None:
            unknown.append(f"{model.family} {model.arch}")

        cells.append(
            {
                "model": row.marked_label,
                "architecture": f"{model.family} {model.arch}",
                **_cost_cells(found),
                # What a run counted itself goes before what somebody counted later.
                "total": f"{model.num_parameters:,}",
                "active": f"{model.num_active_parameters:,}",
            }
        )
        numbers.append(
            {
                "system": row.system,
                "label": row.label,
                "family": model.family,
                "arch": model.arch,
                "num_parameters": model.num_parameters,
                "num_active_parameters": model.num_active_parameters,
                "num_effective_parameters": found and found.num_effective_parameters,
                "flops_per_token": found and found.flops_per_token,
                "context_len": found and found.context_len,
                "runs": " ".join(row.run_names),
            }
        )

    notes = [_COST_NOTE]
    if unknown:
        notes.append(
            f"No systems_<size>.csv has {', '.join(unknown)}: `moxe systems --size "
            "SIZE` writes it."
        )

    return Table(
        name=name,
        title=f"{name}: architectures, as in the paper's Table 1",
        caption=caption,
        cells=pd.DataFrame(cells, dtype="object"),
        numbers=pd.DataFrame(numbers),
        notes=notes,
        num_names=2,
    )


def _cost_cells(architecture: Architecture | None) -> dict[str, str]:
    if architecture is None:
        return dict.fromkeys(("total", "active", "effective", "MFLOP per token"), DASH)

    return {
        "total": f"{architecture.num_parameters:,}",
        "active": f"{architecture.num_active_parameters:,}",
        "effective": f"{architecture.num_effective_parameters:,}",
        "MFLOP per token": f"{architecture.flops_per_token / 1e6:,.1f}",
    }
