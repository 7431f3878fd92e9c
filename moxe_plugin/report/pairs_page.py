"""The page of pairs of a suite: who is better than whom, by how much, how sure."""

from __future__ import annotations

from typing import Final

from moxe_plugin.report.comparison import SuiteResults
from moxe_plugin.report.formats import latex_table, markdown_table
from moxe_plugin.report.pair_tables import leader_cells, pair_cells
from moxe_plugin.report.pairs import LEVEL, MetricPairs
from moxe_plugin.report.suite_page import describe_setting

_PREAMBLE: Final = f"""\
Written by `moxe tables`. Each system is compared with each other on the same items and
the same seeds. `difference` is the first less the second, with its 95 % interval: the
variance over seeds and that over 2000 bootstrap resamples of items (paired: the same
resamples for both) added, with Student's t and Satterthwaite's degrees of freedom.
Metrics without items, such as the loss on held-out tokens, have seeds only: a paired t
test. `p, Holm` is the p-value adjusted by Holm's method for all pairs of the metric in
its table. The first is *better* (or *worse*) only if that is below {LEVEL} and the
interval excludes 0; all else is *not decided*, which is not the same as equal.
Differences of perplexities are of their logarithms, and `ratio` is what they come to:
0.9 is a perplexity lower by a tenth."""

_GUESSES: Final = (
    "Against the best guess, which has no seeds; Holm's method over these alone:"
)

_LEADERS: Final = "### Which system is best on what"


def pairs_markdown(results: SuiteResults) -> str:
    """Write the page of pairs.

    :param results: The suite.

    :returns: Markdown.
    """
    parts = [f"# {results.suite}: pairs of systems", _PREAMBLE]

    for comparison in results.comparisons:
        parts.append(f"## {describe_setting(comparison)}")

        if not comparison.pairs:
            parts.append("There are no two systems with the same number to compare.")
            continue

        parts += [_LEADERS, markdown_table(leader_cells(comparison), num_names=2)]

        for metric in comparison.pairs:
            parts += _metric_parts(metric)

    return "\n\n".join(parts) + "\n"


def pairs_latex(results: SuiteResults) -> str:
    """Write the tables of pairs.

    :param results: The suite.

    :returns: LaTeX, one ``table`` a metric; needs ``booktabs``.
    """
    parts = ["% Written by `moxe tables`; needs \\usepackage{booktabs}."]

    for number, comparison in enumerate(results.comparisons, start=1):
        for metric in comparison.pairs:
            caption = (
                f"{results.suite}: {metric.column.heading}, pairs of systems. "
                f"{describe_setting(comparison)} p-values adjusted by Holm's method "
                f"over the {len(metric.pairs)} pairs."
            )
            label = f"tab:{results.suite}-{number}-pairs-{metric.column.key}"
            parts.append(
                latex_table(
                    pair_cells(metric, metric.pairs),
                    caption=caption,
                    label=label,
                    num_names=2,
                )
            )

    return "\n".join(parts)


def _metric_parts(metric: MetricPairs) -> list[str]:
    parts = [f"### {metric.column.heading}", _describe_basis(metric)]

    if any(pair.estimate is not None for pair in metric.pairs):
        parts.append(markdown_table(pair_cells(metric, metric.pairs), num_names=2))

    if any(pair.estimate is not None for pair in metric.guess_pairs):
        cells = pair_cells(metric, metric.guess_pairs)
        parts += [_GUESSES, markdown_table(cells, num_names=2)]

    if metric.notes:
        parts.append("\n".join(f"- Note: {note}" for note in metric.notes))

    return parts


def _describe_basis(metric: MetricPairs) -> str:
    num_tested = sum(pair.estimate is not None for pair in metric.pairs)
    better = "lower" if metric.column.lower_is_better else "higher"
    bases = sorted({pair.basis for pair in metric.pairs if pair.basis})
    items = sorted({pair.num_items for pair in metric.pairs if pair.num_items})

    text = f"In {metric.column.unit}; {better} is better. "
    text += f"{num_tested} of {len(metric.pairs)} pairs tested"

    if bases:
        text += f", over {' or '.join(bases)}"
    if items:
        text += f" ({', '.join(f'{count:,}' for count in items)} items)"

    return text + "; Holm's method over these."
