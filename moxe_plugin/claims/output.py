"""Writes the page, the tables and the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moxe_plugin.claims.evidence import Evidence
from moxe_plugin.claims.judging import Judgement
from moxe_plugin.claims.page import claims_page
from moxe_plugin.claims.plots import write_plots
from moxe_plugin.claims.tables import (
    odds_table,
    rarity_table,
    share_table,
    system_table,
    time_table,
    verdict_table,
)


def write_claims(
    out: Path,
    evidence: Evidence,
    judgements: Sequence[Judgement],
    times: Mapping[str, Any] | None,
) -> list[str]:
    """Write ``claims.md``, and tables and plots beside the measurements.

    The same measurements give the same files, byte for byte.

    :param out: The directory of results.
    :param evidence: The measured runs.
    :param judgements: The judged claims.
    :param times: Measured times, if there are any.

    :returns: The files, relative to ``out``.
    """
    directory = out / "claims"
    directory.mkdir(parents=True, exist_ok=True)

    tables = {
        "verdicts": verdict_table(judgements),
        "systems": system_table(evidence),
        "rarity": rarity_table(evidence),
        "shares": share_table(evidence),
        "odds": odds_table(evidence),
    }
    if times is not None:
        tables["time"] = time_table(times)

    for name, table in tables.items():
        table.to_csv(
            directory / f"{name}.csv",
            index=False,
            lineterminator="\n",
            float_format="%.7g",
        )

    plots = write_plots(directory, evidence, judgements, times)

    page = claims_page(evidence, judgements, times, plots)
    (out / "claims.md").write_text(page, encoding="utf-8")

    return [
        "claims.md",
        *(f"claims/{name}.csv" for name in tables),
        *(f"claims/{name}.{suffix}" for name in plots for suffix in ("png", "svg")),
    ]
