"""``python -m moxe_plugin.speed.sharing``: what shared beginnings spare.

A checkpoint scores the same requests twice, with every input computed by itself and
with beginnings that inputs share computed once: the answers to questions, and the last
words of passages.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from moxe_plugin.eval.checkpoints import LoadedModel

TOLERANCE_NATS: Final = 1e-4
"""The largest difference of a summed log-likelihood that float32 explains."""

_DEFAULT_OUT: Final = Path("results") / "speed"

_PAGE: Final = """\
# Shared beginnings: {name}

Written by `python -m moxe_plugin.speed.sharing`, from `{name}.json`; nothing is typed
by hand. A checkpoint of {family}, {num_parameters:,} parameters, {precision}; {model},
{num_threads} of {num_cores} cores, torch {torch}.

{table}

- **tokens**: what the model read, by itself per request (*alone*) and with beginnings
  that requests have in common read once (*shared*).
- **s**: seconds of scoring all requests, once, tokenization included.
- **difference**: the largest of a log-likelihood, in nats; **greedy**: requests of
  which only one way finds the continuation to be the greedy one.
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

    num_other_greedy: int
    """Requests of which only one way finds the greedy continuation."""

    @property
    def agrees(self) -> bool:
        """Whether both ways have the same scores, but for rounding."""
        return self.max_difference_nats <= TOLERANCE_NATS and self.num_other_greedy == 0


def main(argv: list[str] | None = None) -> int:
    """Measure both ways on files and write what was measured.

    :param argv: The arguments; those of the process by default.

    :returns: 0 if all scores agree, 1 if not, 2 for a user error.
    """
    args = _create_parser().parse_args(argv)

    try:
        rows = _measure(args)
    except (OSError, ValueError) as ex:
        sys.stderr.write(f"error: {ex}\n")

        return 2

    for row in rows:
        verdict = "same scores" if row.agrees else "OTHER SCORES"
        sys.stdout.write(
            f"{verdict}: {row.file}: {row.tokens_alone / row.tokens_shared:.2f} times "
            f"fewer tokens, {row.seconds_alone / row.seconds_shared:.2f} times faster, "
            f"{row.max_difference_nats:.2g} nats apart at most\n"
        )

    return 0 if all(row.agrees for row in rows) else 1


def measure_sharing(
    loaded: LoadedModel, file: str, kind: str, pairs: Sequence[tuple[str, str]]
) -> SharingRow:
    """Score requests without sharing and with it.

    :param loaded: A model with recurrent state.
    :param file: The name of the file that the requests come from.
    :param kind: As in :class:`SharingRow`.
    :param pairs: Context and continuation.

    :returns: What was measured.

    :raises ValueError: The model has no state that could be shared.
    """
    from moxe_plugin.eval.adapter import LoadedModelLM
    from moxe_plugin.eval.agreement import compare_scores, score_pairs

    scores, seconds, tokens = [], [], []

    for share_prefixes in (False, True):
        lm = LoadedModelLM(loaded, batch_size="auto", share_prefixes=share_prefixes)
        # Compiles and allocates what the first call must.
        score_pairs(lm, pairs[:2])
        before = int(lm.get_model_info()["num_tokens_computed"])

        began = time.perf_counter()
        scores.append(score_pairs(lm, pairs))
        seconds.append(time.perf_counter() - began)

        tokens.append(int(lm.get_model_info()["num_tokens_computed"]) - before)

    agreement = compare_scores(*scores)

    return SharingRow(
        file=file,
        kind=kind,
        num_requests=len(pairs),
        tokens_alone=tokens[0],
        tokens_shared=tokens[1],
        seconds_alone=seconds[0],
        seconds_shared=seconds[1],
        max_difference_nats=agreement.max_difference_nats,
        num_other_greedy=agreement.num_other_greedy,
    )


def read_questions(
    file: Path, limit: int | None, max_choice_chars: int | None = None
) -> list[tuple[str, str]]:
    """Read questions as the task ``moxe_multiple_choice`` asks them.

    :param file: JSON lines with ``query`` and ``choices``.
    :param limit: How many questions, from the first on; all if ``None``.
    :param max_choice_chars: Leave out questions with a longer answer.

    :returns: Context and continuation, one pair per answer.

    :raises ValueError: There is no question.
    """
    from moxe_plugin.eval.tasks import load_multiple_choice

    questions = load_multiple_choice(str(file), max_choice_chars=max_choice_chars)
    rows: list[Mapping[str, Any]] = questions["test"].to_list()

    return [
        (f"{row['query']}Answer:", f" {choice}")
        for row in rows[:limit]
        for choice in row["choices"]
    ]


def _measure(args: Any) -> list[SharingRow]:
    from moxe_plugin.eval.agreement import read_last_words
    from moxe_plugin.eval.checkpoints import load_checkpoint

    requests = []

    if args.questions is not None:
        pairs = read_questions(args.questions, args.limit, args.max_choice_chars)
        requests.append((args.questions.name, "multiple_choice", pairs))

    if args.lambada is not None:
        pairs = read_last_words(args.lambada, args.limit)
        requests.append((args.lambada.name, "last_word", pairs))

    if not requests:
        raise ValueError(
            "`--questions` or `--lambada` must name a file, but none does."
        )

    loaded = load_checkpoint(args.checkpoint)

    rows = [measure_sharing(loaded, *request) for request in requests]

    _write(args.out, args.name, loaded, rows)

    return rows


def _write(
    out: Path, name: str | None, loaded: LoadedModel, rows: Sequence[SharingRow]
) -> None:
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
        index=False, disable_numparse=True, colalign=["left", *["right"] * 9]
    )
    write_text(
        out / f"{name}.md",
        _PAGE.format(**(machine | model | {"name": name, "table": table})),
    )


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
        "difference": f"{row.max_difference_nats:.1e}",
        "greedy": str(row.num_other_greedy),
    }


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moxe_plugin.speed.sharing",
        description="Measure what it spares to compute beginnings once that requests "
        "of lm-evaluation-harness share.",
    )

    add = parser.add_argument

    add("checkpoint", metavar="CHECKPOINT", help="a run, an export or an asset")
    add(
        "--questions",
        metavar="FILE",
        type=Path,
        help="JSON lines with `query`, `choices` and `gold`, such as PIQA",
    )
    add(
        "--lambada",
        metavar="FILE",
        type=Path,
        help="JSON lines with the field `text`, whose last word is scored",
    )
    add(
        "--max-choice-chars",
        metavar="N",
        type=int,
        help="leave out questions with a longer answer",
    )
    add("--limit", metavar="N", type=int, help="the first N of each file only")
    add("--name", metavar="NAME", help="name of the files without suffix")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=_DEFAULT_OUT,
        help="where NAME.json and NAME.md go (default: %(default)s)",
    )

    return parser


if __name__ == "__main__":
    sys.exit(main())
