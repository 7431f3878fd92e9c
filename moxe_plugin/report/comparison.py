"""Which runs may share a table, and what a row of it says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moxe_plugin.report.pairs import MetricPairs, compare_rows
from moxe_plugin.report.records import DamagedRun, Data, RunRecord
from moxe_plugin.report.rows import ItemWeights, Row, create_row, describe_codes
from moxe_plugin.report.soundness import split_sound


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows with the same data, tokenizer and number of training tokens."""

    data: Data
    training_tokens: int | None
    rows: Sequence[Row]
    """Best held-out loss first, guesses below."""

    pairs: Sequence[MetricPairs]
    """Tests of each system against each other, one entry a metric."""

    notes: Sequence[str]
    """What a reader must know before comparing rows."""

    @property
    def trained_rows(self) -> list[Row]:
        """The rows that are no guesses."""
        return [row for row in self.rows if not row.is_guess]

    @property
    def seeds(self) -> list[int]:
        """All seeds of its runs, sorted."""
        return sorted({seed for row in self.rows for seed in row.seeds})


@dataclass(frozen=True, kw_only=True)
class SuiteResults:
    """What is known of one suite."""

    suite: str
    comparisons: Sequence[Comparison]
    excluded: Sequence[DamagedRun]
    """Runs that no number comes from, and why."""


def compare(
    records: Sequence[RunRecord], damaged: Sequence[DamagedRun]
) -> list[SuiteResults]:
    """Sort runs into suites, comparisons and rows.

    :param records: The runs.
    :param damaged: Runs that could not be read; every suite names them, since nobody
        knows which one they belong to.

    :returns: One entry a suite, sorted by name.
    """
    sound, foreign = split_sound(records)
    damaged = sorted([*damaged, *foreign], key=lambda run: run.name)

    by_suite = defaultdict(list)
    for record in sound:
        by_suite[record.environment.suite].append(record)

    return [
        _compare_suite(suite, by_suite[suite], damaged) for suite in sorted(by_suite)
    ]


def _compare_suite(
    suite: str, records: Sequence[RunRecord], damaged: Sequence[DamagedRun]
) -> SuiteResults:
    newest, superseded = _drop_repeated(records)

    guesses = [r for r in newest if r.environment.kind == "guess"]
    trained = [r for r in newest if r.environment.kind == "trained"]

    by_key = defaultdict(list)
    for record in trained:
        by_key[_comparison_key(record)].append(record)

    # A guess belongs to every comparison on its data, however many tokens it trains.
    for record in guesses:
        data = record.environment.data
        keys = [k for k in by_key if k[0] == data] or [(data, None)]
        for key in keys:
            by_key[key].append(record)

    comparisons = [
        _create_comparison(data, tokens, by_key[data, tokens])
        for data, tokens in sorted(by_key, key=lambda k: (str(k[0]), k[1] or 0))
    ]

    return SuiteResults(
        suite=suite, comparisons=comparisons, excluded=[*damaged, *superseded]
    )


def _comparison_key(record: RunRecord) -> tuple[Data, int | None]:
    return record.environment.data, record.environment.training_tokens


def _drop_repeated(
    records: Sequence[RunRecord],
) -> tuple[list[RunRecord], list[DamagedRun]]:
    newest: dict[object, RunRecord] = {}
    superseded = []

    # Names end with the date and the seed, so the last one is the newest.
    for record in sorted(records, key=lambda r: r.name):
        env = record.environment
        key = (*_comparison_key(record), env.system, env.recipe_sha256, env.seed)

        if key in newest:
            reason = f"superseded by the later `{record.name}` (same system and seed)."
            superseded.append(DamagedRun(name=newest[key].name, reason=reason))

        newest[key] = record

    return list(newest.values()), superseded


def _create_comparison(
    data: Data, training_tokens: int | None, records: Sequence[RunRecord]
) -> Comparison:
    by_row = defaultdict(list)
    for record in records:
        by_row[record.environment.system, record.environment.recipe_sha256].append(
            record
        )

    weights = ItemWeights()

    rows = _mark_codes([create_row(by_row[key], weights) for key in sorted(by_row)])
    rows.sort(key=_by_loss)

    return Comparison(
        data=data,
        training_tokens=training_tokens,
        rows=rows,
        pairs=compare_rows(rows),
        notes=[
            *_note_seeds(rows),
            *_note_variants(rows),
            *_note_differences(records),
            *(f"{row.label}: {note}" for row in rows for note in row.notes),
        ],
    )


def _mark_codes(rows: Sequence[Row]) -> list[Row]:
    codes = [describe_codes(row.records) for row in rows]

    if len({code for row_codes in codes for code in row_codes}) < 2:
        return list(rows)

    # A row of several codes is marked already.
    return [
        replace(row, marks=[*row.marks, f"code {row_codes[0]}"])
        if len(row_codes) == 1
        else row
        for row, row_codes in zip(rows, codes, strict=True)
    ]


def _by_loss(row: Row) -> tuple[bool, bool, float, str]:
    # Best first, rows without a loss last, guesses below all systems.
    statistic = row.statistics.get("valid_loss_nats")
    loss = statistic.mean if statistic else 0.0

    return row.is_guess, statistic is None, loss, row.label


def _note_seeds(rows: Sequence[Row]) -> list[str]:
    trained = [row for row in rows if not row.is_guess]

    seeds = {tuple(r.environment.seed for r in row.records) for row in trained}
    if len(seeds) > 1:
        return ["Rows have different seeds."]

    if trained and len(trained[0].records) == 1:
        return ["One seed: differences between rows may be chance."]

    return []


def _note_variants(rows: Sequence[Row]) -> list[str]:
    labels = [row.label for row in rows]

    return [
        f"{label} stands in several rows, whose configurations differ."
        for label in sorted(set(labels))
        if labels.count(label) > 1
    ]


def _note_differences(records: Sequence[RunRecord]) -> list[str]:
    trained = [r.environment for r in records if r.environment.kind == "trained"]

    notes = []

    if len(codes := describe_codes(records)) > 1:
        notes.append(f"Runs come from different code: {', '.join(codes)}.")

    dirty = sum(1 for e in trained if e.code.dirty)
    if dirty:
        notes.append(
            f"{dirty} of {len(trained)} runs come from code with uncommitted changes."
        )

    machines = {
        f"{e.hardware.model}, {e.hardware.num_threads} threads, "
        f"{e.hardware.num_jobs} runs at a time"
        for e in trained
    }
    if len(machines) > 1:
        names = "; ".join(sorted(machines))
        notes.append(
            f"Runs come from different machines, so times and memory do not compare: "
            f"{names}."
        )

    return notes
