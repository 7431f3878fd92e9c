"""Which of the paper's ablations are confirmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from moxe_plugin.report.columns import COLUMNS_BY_KEY, LAMBADA_PERPLEXITY
from moxe_plugin.report.content import ComparisonReport
from moxe_plugin.report.pairs import LEVEL
from moxe_plugin.report_page.wording import find_table

_VERDICTS: Final = (
    "Shown to be worse, as the paper says",
    "Shown to be better, unlike the paper",
    "Not decided",
    "Not tested",
    "Not run",
)


@dataclass(frozen=True, kw_only=True)
class AblationSummary:
    """What became of the paper's ablations."""

    measure: str
    """The number that they are compared by here."""

    findings: Sequence[tuple[str, Sequence[str]]]
    """Verdicts, each with the ablations that it is about."""


def summarize_ablations(report: ComparisonReport) -> AblationSummary | None:
    """Sort the paper's ablations by what is shown of them here.

    :param report: The comparison.

    :returns: The verdicts; ``None`` without Table 2.
    """
    table = find_table(report, "table2")
    if table is None:
        return None

    by_verdict: dict[str, list[str]] = {}

    for cells, numbers in zip(
        table.cells.to_dict("records"), table.numbers.to_dict("records"), strict=True
    ):
        published = cells["paper's change"]

        # The full model itself has no change.
        if published.startswith("+"):
            text = f"{cells['configuration']} (paper: {published})"
            if not pd.isna(numbers["system"]):
                text = f"{cells['ours']}: here {cells['change']} "
                text += f"{cells['95 % interval']}, p = {cells['p, Holm']}; "
                text += f"paper {published}"

            by_verdict.setdefault(_judge(numbers), []).append(text)

    key = table.numbers["metric"].iloc[0]
    measure = COLUMNS_BY_KEY[key].heading

    # Changes are those of perplexities, whatever was tested.
    if key != LAMBADA_PERPLEXITY:
        measure = "perplexity per token on held-out text (LAMBADA was not measured)"

    return AblationSummary(
        measure=measure,
        findings=[(v, by_verdict[v]) for v in _VERDICTS if v in by_verdict],
    )


def _judge(numbers: Mapping[Any, Any]) -> str:
    if pd.isna(numbers["system"]):
        return "Not run"

    if pd.isna(numbers["change_value"]):
        return "Not tested"

    decided = numbers["change_adjusted_p_value"] < LEVEL
    if decided and numbers["change_low"] > 0.0:
        return "Shown to be worse, as the paper says"

    if decided and numbers["change_high"] < 0.0:
        return "Shown to be better, unlike the paper"

    return "Not decided"
