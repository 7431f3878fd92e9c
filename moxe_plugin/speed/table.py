"""The measurements as a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeVar

import pandas as pd

from moxe_plugin.speed.records import SpeedRow
from moxe_plugin.speed.remarks import (
    format_phase,
    list_changes,
    list_remarks,
    moxe_ratio,
)

_DASH: Final = "—"

_T = TypeVar("_T")

_PREAMBLE: Final = """\
Written by `moxe speed`, from `{name}.json`; nothing is typed by hand. {model},
{num_threads} of {num_cores} cores, torch {torch}; a product of two {matmul_size:,} by
{matmul_size:,} matrices reaches {peaks}.{products}{memory}{allocator}"""

_FREED_MEMORY: Final = {
    "kept": "\nThe process kept freed memory of the CPU.",
    "returned": "\nFreed memory of the CPU went back to the system.",
}
"""What the page says, by what the description of the machine says."""

_COLUMNS: Final = """\
- **phase**: `train` is a forward and a backward pass, `+ AdamW` with clipping of the
  gradient and a step of the optimizer, `(checkpointed)` with layers computed again in
  the backward pass, which counts no FLOPs; `prefill` is reading `length` tokens into a
  state, without gradients; `decode` is continuing them, one token at a time. Choosing
  the next token, loading data and copying it to the device are left out.
- **s**: seconds of a call, the median of its repeats; **range**: the least and most.
- **GFLOP**: useful FLOPs of a call, as `moxe systems` counts them; a training step
  takes three times a forward pass. Those of `decode` are a token's of a whole pass over
  `length` tokens. Causal products count whole, half of which is masked.
- **of peak**: useful FLOPs a second over those of the product of two matrices in the
  data type that is computed in, by the fastest library that was measured.
- **weights (s)**: how long a training step takes at least to read each parameter in
  the forward and in the backward pass and to write its gradient, at the speed of
  copies; tables that tokens are looked up in are only written a gradient. **gradients
  (s)**: how long the same gradients take to be written into memory that the allocator
  has just handed out.
- **busiest**: the share of its layer's load that the busiest expert of MoxE gets.
- **memory**: the most that was in use in the timed calls: the whole process on the CPU,
  with its libraries and, if freed memory is kept, with what the warm-up has freed;
  allocated tensors on an accelerator.
- **state**: what `length` tokens leave for the next one, of the whole batch.
- **MoxE ÷ it**: tokens a second of MoxE, the first row of the same phase, batch and
  length, over those of the row: above 1, MoxE is faster.

Parameters and tokens are random. Therefore routers spread tokens almost evenly over
their experts, unless `router_skew` stands beside the system: the standard deviation of
a fixed offset of each expert's logit. With `linear=swapped`, linear layers of a system
of transformers multiply by our products in place of torch's; its attention does not.
`implementation=nxai` is the model of NX-AI's package `xlstm`, of the same sizes. With
`captured=True` each token is launched as a whole, from a CUDA graph, as in `lm_eval`
and `lm chat`; otherwise Python launches one kernel after the other."""


def write_speed_table(
    file: Path, machine: Mapping[str, Any], rows: Sequence[SpeedRow]
) -> None:
    """Write the page: a table for each suite.

    :param file: The file; its name without the suffix is that of the JSON file.
    :param machine: What :func:`~moxe_plugin.speed.measuring.describe_machine` returned.
    :param rows: The rows, suite by suite.
    """
    parts = [
        f"# Speed: {file.stem}",
        _PREAMBLE.format(
            name=file.stem,
            torch=machine["versions"]["torch"],
            peaks=_format_peaks(machine),
            products=_format_products(machine),
            memory=_format_memory(machine),
            allocator=_format_allocator(machine),
            **{
                name: machine[name]
                for name in ("model", "num_threads", "num_cores", "matmul_size")
            },
        ),
    ]

    for suite, suite_rows in groupby(rows, key=lambda row: row.suite):
        same_suite = list(suite_rows)
        parts += [f"## {suite}", _format_table(same_suite)]

        remarks = list_remarks(same_suite)
        if remarks:
            parts.append("\n".join(f"- {remark}" for remark in remarks))

    parts.append(_COLUMNS)

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _format_peaks(machine: Mapping[str, Any]) -> str:
    # Older records know torch only.
    by_library = machine.get("matmul_by_library", {})

    peaks = []
    for dtype, gflop in sorted(machine["matmul_gflop_per_s"].items()):
        rates = by_library.get(dtype, {"torch": gflop})
        libraries = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        peaks.append(f"{gflop:,.0f} GFLOP/s in {dtype} ({libraries})")

    return ", ".join(peaks)


def _format_products(machine: Mapping[str, Any]) -> str:
    if "why_torch_products" not in machine:
        return ""

    reason = machine["why_torch_products"]
    if reason is None:
        return (
            "\nMoxE and xLSTM multiply float32 by our own products, and bfloat16, also "
            "under\nautocast, if the processor has no AMX."
        )

    return f"\nMoxE and xLSTM multiply by torch's products: {reason}."


def _format_memory(machine: Mapping[str, Any]) -> str:
    if "copy_gb_per_s" not in machine:
        return ""

    return (
        f"\nCopies read and write {machine['copy_gb_per_s']:,.1f} GB/s; new memory is "
        f"filled at {machine['new_memory_gb_per_s']:,.1f} GB/s."
    )


def _format_allocator(machine: Mapping[str, Any]) -> str:
    lines = []

    if settings := machine.get("allocator"):
        words = ", ".join(f"`{name}={value}`" for name, value in settings.items())
        lines.append(f"\nThe environment set {words}.")

    # Records from before it was tried say nothing about it.
    if "freed_memory" in machine:
        lines.append(_FREED_MEMORY[machine["freed_memory"]])

    return "".join(lines)


def _format_table(rows: Sequence[SpeedRow]) -> str:
    table = pd.DataFrame([_format_cells(row, rows) for row in rows], dtype="object")

    text: str = table.to_markdown(
        index=False,
        disable_numparse=True,
        # Names to the left, numbers to the right.
        colalign=["left"] * 3 + ["right"] * (table.shape[1] - 3),
    )

    return text


def _format_cells(row: SpeedRow, rows: Sequence[SpeedRow]) -> dict[str, str]:
    changes = [f"`{name}={value}`" for name, value in list_changes(row).items()]

    times = row.seconds_all

    return {
        "system": " ".join([f"`{row.family}` `{row.arch}`", *changes]),
        "phase": format_phase(row),
        "type": row.dtype,
        "batch": f"{row.batch:,}",
        "length": f"{row.length:,}",
        "tokens/s": _format(row.tokens_per_s, "{:,.1f}".format),
        "s": _format(row.seconds, "{:.4g}".format),
        "range": f"{min(times):.4g} – {max(times):.4g}" if times else _DASH,  # noqa: RUF001  # a range
        "GFLOP": _format(row.useful_gflop, "{:,.1f}".format),
        "of peak": _format(row.peak_fraction, "{:.1%}".format),
        "weights (s)": _format(row.least_memory_seconds, "{:.3g}".format),
        "gradients (s)": _format(row.new_gradient_seconds, "{:.3g}".format),
        "busiest": _format(row.busiest_expert_share, "{:.1%}".format),
        "memory (GiB)": _format(row.peak_memory_gib, "{:.2f}".format),
        "state (MiB)": _format(row.state_bytes, lambda n: f"{n / 2**20:,.2f}"),
        "MoxE ÷ it": _format(moxe_ratio(row, rows), "{:.2f}".format),
    }


def _format(value: _T | None, formatted: Callable[[_T], str]) -> str:
    return _DASH if value is None else formatted(value)
