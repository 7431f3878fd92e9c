"""``claims.md``: the verdict on every claim, from tables only."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import pandas as pd

from moxe_plugin.claims.evidence import Evidence
from moxe_plugin.claims.judging import Answer, Judgement
from moxe_plugin.claims.tables import system_table, time_table

DASH: Final = "—"

_HOW: Final = """\
- **Numbers** are means over seeds; differences are between systems of the same seed,
  which read the same training text in the same order, on the same documents.
- **Intervals** are 95 % over seeds and documents: Student's t, with a standard error
  made of the variance between seeds and of the variance over 2,000 bootstrap resamples
  of documents, and Satterthwaite's degrees of freedom. With {num_seeds} seeds the
  seeds' part rests on {num_seeds} numbers: it assumes that runs with other seeds would
  scatter like a normal distribution, and an interval is wide (up to {t_factor:.1f}
  standard errors) because so few runs say little about that scatter. It says nothing of
  other learning rates, sizes or texts.
- **Verdicts.** A number is *supported* if it lies on the claimed side of its bound and
  differs from the bound at the 5 % level (two-sided p, adjusted by Holm's method for
  the numbers of the claim), *not supported* if it does so on the other side, else *not
  decided at this scale*. A claim is supported if all its numbers are, not supported if
  any is not, else not decided."""

_PLOTS: Final[Mapping[str, Sequence[str]]] = {
    "a": ("losses",),
    "d": ("rarity",),
    "e": ("shares",),
    "f": ("time",),
    "odds": ("odds",),
}
"""Plots by the claim that they belong to."""


def claims_page(
    evidence: Evidence,
    judgements: Sequence[Judgement],
    times: Mapping[str, Any] | None,
    plots: Sequence[str],
) -> str:
    """Write the page.

    :param evidence: The measured runs.
    :param judgements: The judged claims.
    :param times: Measured times, if there are any.
    :param plots: The names of the plots that exist.

    :returns: Markdown.
    """
    parts = [
        "# The claims of the paper, judged",
        _describe_setting(evidence),
        "## Verdicts",
        _verdicts(judgements),
        "## How a verdict is made",
        _describe_rule(evidence),
    ]

    for judgement in judgements:
        parts += _claim_parts(judgement)

        if judgement.claim.key == "f" and times is not None:
            parts += _time_parts(times)

        parts += [
            f"![{name}](claims/{name}.png)"
            for name in _PLOTS.get(judgement.claim.key, ())
            if name in plots
        ]

    parts += ["## Systems", _describe_systems(evidence)]

    return "\n\n".join(parts) + "\n"


def _describe_setting(evidence: Evidence) -> str:
    run = evidence.runs(evidence.systems[0])[0]
    setting = run.setting

    documents = run.documents["num_tokens"]

    lambada = "LAMBADA was not measured."
    if setting["num_passages"]:
        lambada = (
            f"LAMBADA: {setting['num_passages']:,} passages by order of a hash "
            f"(`{setting['lambada_sha256'][:12]}`)."
        )

    return (
        "Written by `moxe claims` from the files in `claims/runs`; no number is typed "
        "by hand. "
        f"Every run was trained on {setting['training_tokens']:,} tokens (text "
        f"`{setting['train_sha256'][:12]}`, vocabulary {setting['vocab_size']:,}, "
        f"tokenizer `{setting['tokenizer_sha256'][:12]}`) and measured on "
        f"{len(documents)} held-out documents, {int(sum(documents)):,} tokens "
        f"(`{setting['text']}`, `{setting['text_sha256'][:12]}`), in windows of "
        f"{setting['window_len']} tokens as in training. {lambada} Learning rates are "
        "those of the presets, one per family, picked by hand. Small models and "
        "little text: a verdict holds for this scale, and nothing here compares with "
        "the paper's numbers."
    )


def _verdicts(judgements: Sequence[Judgement]) -> str:
    rows = [
        {
            "claim": f"({j.claim.key}) {j.claim.title}",
            "statement": j.claim.statement,
            "verdict": f"**{j.verdict}**",
        }
        for j in judgements
    ]

    return _markdown(pd.DataFrame(rows))


def _describe_rule(evidence: Evidence) -> str:
    from scipy.stats import t as student_t

    num_seeds = max(len(evidence.runs(system)) for system in evidence.systems)
    t_factor = float(student_t.ppf(0.975, max(1, num_seeds - 1)))

    return _HOW.format(num_seeds=num_seeds, t_factor=t_factor)


def _claim_parts(judgement: Judgement) -> list[str]:
    claim = judgement.claim

    rows = [
        {
            "number": answer.question.text,
            "claimed": f"{answer.question.direction} {answer.question.bound:g}",
            **_cells(answer),
            "verdict": answer.verdict,
        }
        for answer in judgement.answers
    ]

    parts = [
        f"## ({claim.key}) {claim.title}: {judgement.verdict}",
        f"> {claim.statement}",
        claim.method,
        _markdown(pd.DataFrame(rows)),
    ]

    if reasons := sorted({a.missing for a in judgement.answers if a.missing}):
        parts.append("\n".join(f"- Missing: {reason}." for reason in reasons))

    return parts


def _cells(answer: Answer) -> dict[str, str]:
    estimate = answer.estimate

    if estimate is None or answer.p_value is None:
        return {"value": DASH, "95 % interval": DASH, "p (Holm)": DASH}

    unit = f" {answer.question.unit}" if answer.question.unit else ""
    p_value = "< 0.001" if answer.p_value < 0.001 else f"{answer.p_value:.3f}"

    return {
        "value": f"{estimate.value:.3f}{unit}",
        "95 % interval": f"{estimate.low:.3f} to {estimate.high:.3f}",
        "p (Holm)": p_value,
    }


def _time_parts(times: Mapping[str, Any]) -> list[str]:
    table = time_table(times)

    cells = table.pivot(
        index="label", columns="length", values="min_us_per_token"
    ).reindex(table["label"].unique())
    text = cells.map(lambda value: f"{value:,.1f}").reset_index()
    text.columns = ["microseconds per token, fastest round", *cells.columns.map(str)]

    hardware = times["hardware"]
    facts = (
        f"{hardware['model']}, {hardware['num_threads']} thread(s), float32, one "
        "sequence, forward pass with logits; leaves out loading and tokenizing."
    )

    return [_markdown(text), facts]


def _describe_systems(evidence: Evidence) -> str:
    table = system_table(evidence)

    rows = [
        {
            "system": row["label"],
            "seeds": _text(row.get("seeds")),
            "parameters": _number(row.get("num_parameters"), ",.0f"),
            "active": _number(row.get("num_active_parameters"), ",.0f"),
            "MFLOP per token": _number(row.get("forward_mflops_per_token"), ",.2f"),
            "held-out loss, nats per token": _mean(row, "held_out_loss_nats_per_token"),
            "LAMBADA, nats per word": _mean(row, "lambada_loss_nats_per_word"),
            "perplexity per word": _perplexity(row, "lambada_loss_nats_per_word"),
            "perplexity per token": _perplexity(row, "lambada_loss_nats_per_token"),
            "accuracy": _number(row.get("lambada_accuracy"), ".2%"),
        }
        for row in table.to_dict("records")
    ]

    legend = (
        "`±` is the standard deviation over seeds. *Active* parameters are those that "
        "one token uses; MFLOP are the useful ones of its forward pass in a window, of "
        "the chosen experts only. Perplexity per word is of the last word of a LAMBADA "
        "passage, as lm-evaluation-harness reports it; per token divides by the word's "
        "tokens first. Accuracy is the share of last words that are the greedy "
        "continuation."
    )

    return f"{_markdown(pd.DataFrame(rows))}\n\n{legend}"


def _mean(row: Mapping[Hashable, Any], name: str) -> str:
    text = _number(row.get(name), ".3f")
    sd = row.get(f"{name}_sd")

    return text if sd is None or math.isnan(sd) else f"{text} ± {sd:.3f}"


def _perplexity(row: Mapping[Hashable, Any], name: str) -> str:
    value = row.get(name)

    return DASH if value is None or math.isnan(value) else f"{math.exp(value):,.0f}"


def _number(value: Any, number_format: str) -> str:
    if value is None or math.isnan(value):
        return DASH

    return format(value, number_format)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else DASH


def _markdown(frame: pd.DataFrame) -> str:
    text: str = frame.to_markdown(index=False, disable_numparse=True)

    return text
