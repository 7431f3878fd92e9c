"""The page of a suite, as Markdown and as LaTeX."""

from __future__ import annotations

from typing import Final

from moxe_plugin.report.cells import comparison_cells, shown_columns
from moxe_plugin.report.columns import COLUMNS, GROUPS
from moxe_plugin.report.comparison import Comparison, SuiteResults
from moxe_plugin.report.formats import latex_table, markdown_table
from moxe_plugin.report.rows import describe_codes

_PREAMBLE: Final = """\
Written by `moxe tables` from the run directories named below each table; no number is
typed by hand. A dash is a number that does not exist. `±` is the sample standard
deviation over seeds. `[low, high]` is something else: the 95 % interval over items
(passages, documents, questions) by bootstrap, the models being as they are. Neither
alone tells systems apart; {pairs} does.
A share that is 0 % on all items has an interval without width, which is not certainty:
on n items the true share may be up to 3 / n. Small models and little text: nothing here
compares with the paper's numbers unless it says so."""


def suite_markdown(results: SuiteResults) -> str:
    """Write the page of a suite.

    :param results: The suite.

    :returns: Markdown.
    """
    pairs = f"[{results.suite}_pairs.md]({results.suite}_pairs.md)"
    parts = [f"# {results.suite}", _PREAMBLE.format(pairs=pairs)]

    if len(results.comparisons) > 1:
        parts.append("**The tables below do not compare with each other.**")

    for comparison in results.comparisons:
        parts += _comparison_parts(comparison)

    if results.excluded:
        lines = [f"- `{run.name}`: {run.reason}" for run in results.excluded]
        parts += ["## Excluded runs", "\n".join(lines)]

    shown = {column.key for c in results.comparisons for column in shown_columns(c)}
    if shown:
        lines = [
            f"- **{column.heading}**: {column.meaning}."
            for column in COLUMNS
            if column.key in shown
        ]
        parts += ["## Columns", "\n".join(lines)]

    return "\n\n".join(parts) + "\n"


def suite_latex(results: SuiteResults) -> str:
    """Write the tables of a suite.

    :param results: The suite.

    :returns: LaTeX, one ``table`` for each group of columns; needs ``booktabs``.
    """
    parts = ["% Written by `moxe tables`; needs \\usepackage{booktabs}."]

    for number, comparison in enumerate(results.comparisons, start=1):
        columns = shown_columns(comparison)

        for group in GROUPS:
            if not (part := [c for c in columns if c.group == group]):
                continue

            cells = comparison_cells(comparison, part, with_intervals=True)
            caption = (
                f"{results.suite}: {group}. {describe_setting(comparison)} Mean and "
                "sample standard deviation over seeds, 95 % interval over items in "
                "brackets."
            )
            label = f"tab:{results.suite}-{number}-{group.lower()}"
            parts.append(latex_table(cells, caption=caption, label=label, num_names=2))

    return "\n".join(parts)


def describe_setting(comparison: Comparison) -> str:
    """Say what the runs of a comparison have in common.

    :param comparison: The comparison.

    :returns: Sentences for a caption: data, tokens, vocabulary, seeds.
    """
    data = comparison.data
    tokens = comparison.training_tokens
    seeds = comparison.seeds

    parts = [f"Data {data.name}"]
    if tokens is not None:
        parts.append(f"{tokens:,} training tokens")
    parts.append(f"vocabulary {data.vocab_size:,}")
    if seeds:
        parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")

    return ", ".join(parts) + "."


def _comparison_parts(comparison: Comparison) -> list[str]:
    data = comparison.data

    tokens = comparison.training_tokens
    title = f"## Data `{data.name}`"
    if tokens is not None:
        title += f", {tokens:,} training tokens"

    facts = (
        f"Vocabulary {data.vocab_size:,} (tokenizer `{data.tokenizer_sha256[:12]}`), "
        f"training text `{data.train_sha256[:12]}`, "
        f"held-out text `{data.valid_sha256[:12]}`."
    )

    parts = [title, facts]

    if comparison.notes:
        parts.append("\n".join(f"- Note: {note}" for note in comparison.notes))

    columns = shown_columns(comparison)

    for group in GROUPS:
        if part := [column for column in columns if column.group == group]:
            cells = comparison_cells(comparison, part, with_intervals=True)
            parts += [f"### {group}", markdown_table(cells, num_names=2)]

    if missing := [c.heading for c in COLUMNS if c not in columns]:
        parts.append(f"No run has: {'; '.join(missing)}.")

    runs = [
        f"- {row.marked_label}: "
        + ", ".join(f"`{name}`" for name in row.run_names)
        + f"; code {', '.join(describe_codes(row.records))}"
        for row in comparison.rows
    ]

    return [*parts, "### Runs", "\n".join(runs)]
