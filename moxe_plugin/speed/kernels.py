"""``python -m moxe_plugin.speed.kernels``: the Triton kernels, against torch.

Each kernel computes the same as its reference in torch, and both are timed, at the
widths of Table 1, on a GPU. Triton's interpreter, which runs kernels on a CPU for
tests, tells nothing about speed.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moxe_plugin.speed.arguments import add_numbers, add_output_options

if TYPE_CHECKING:
    import torch

    from moxe_plugin.speed.kernel_measuring import KernelOptions, KernelRow

DTYPES: Final = ("bfloat16", "float16", "float32")
"""What the kernels take."""

_COPY_BYTES: Final = 2**30

_MATMUL_SIZE: Final = 8192

_PAGE: Final = """\
# Kernels: {name}

Written by `python -m moxe_plugin.speed.kernels`, from `{name}.json`; nothing is typed
by hand. {gpu}, {dtype}, torch {torch}, Triton {triton}. Measured here: products of
matrices {matmul_gflop_per_s:,.0f} GFLOP/s ({matmul_size:,} rows), copies
{copy_gb_per_s:,.0f} GB/s.

{table}

- **mlstm**, **slstm**: what training runs, on ragged rows; **scan**: the sLSTM that
  carries a memory. slstm is in bfloat16 and float16 only, where scan has its kernels.
- **E x N x S x H x D**: experts, sequences of each, positions, heads, width.
- **ms**: the median of {repeats} launches from a CUDA graph, after {warm_up}, each of
  all that a call launches: the GPU's time alone; *train* is forward and backward.
- **ratio**: the reference's time over the kernel's.
- **called**: the same of calls from Python, in which the GPU may wait for the host.
- **of products**, **of copies**: FLOPs and bytes that the kernel must do and move
  (`moxe_plugin.speed.kernel_cases` says which) over its time, as a share of what was
  measured here. The larger one is how near it is to its limit.
- **error**: of the output and, in *train*, of gradients, the largest relative to the
  reference's length.
"""


def main(argv: list[str] | None = None) -> int:
    """Measure the kernels and write what was measured.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = _create_parser().parse_args(argv)

    try:
        rows = _measure(args)
    except (OSError, ValueError) as ex:
        sys.stderr.write(f"error: {ex}\n")

        return 2

    for row in rows:
        case = row.case
        sys.stdout.write(
            f"{case.kernel} of {case.system}, {case.phase}: {row.ratio:.2f} times "
            f"faster, {row.matmul_fraction:.0%} of products, {row.copy_fraction:.0%} "
            f"of copies, error {row.error:.1e}\n"
        )

    return 0


def write_kernels(
    out: Path,
    name: str,
    machine: dict[str, Any],
    options: KernelOptions,
    rows: Sequence[KernelRow],
) -> None:
    """Write ``NAME.json`` and ``NAME.md``.

    :param out: The directory; it is made if there is none.
    :param name: The name of the files without suffix.
    :param machine: Plain values, among them ``gpu``, ``torch`` and ``triton``.
    :param options: How the rows were measured.
    :param rows: What was measured.
    """
    import pandas as pd

    from moxe_plugin.report.files import write_json, write_text

    out.mkdir(parents=True, exist_ok=True)

    measured = asdict(options) | {"matmul_size": _MATMUL_SIZE}
    write_json(
        out / f"{name}.json",
        {
            "machine": machine,
            "options": measured,
            "rows": [
                asdict(row) | {"ratio": row.ratio, "call_ratio": row.call_ratio}
                for row in rows
            ],
        },
    )

    table = pd.DataFrame([_format_cells(row) for row in rows]).to_markdown(
        index=False, disable_numparse=True, colalign=["left"] * 3 + ["right"] * 9
    )
    write_text(
        out / f"{name}.md",
        _PAGE.format(**(machine | measured | {"name": name, "table": table})),
    )


def _measure(args: Namespace) -> list[KernelRow]:
    import torch

    from moxe_plugin.bench.machine import describe_code, describe_hardware
    from moxe_plugin.speed.clock import measure_copy, measure_matmul
    from moxe_plugin.speed.kernel_calls import why_not_run
    from moxe_plugin.speed.kernel_cases import list_kernel_cases
    from moxe_plugin.speed.kernel_measuring import KernelOptions, measure_kernel

    cases = list_kernel_cases(args.batch, args.length)

    if args.repeats < 1 or args.warm_up < 0:
        raise ValueError(
            "`repeats` must be at least 1 and `warm_up` at least 0, but are "
            f"{args.repeats} and {args.warm_up} instead."
        )

    device, gpu = _find_gpu()

    options = KernelOptions(
        dtype=args.dtype,
        repeats=args.repeats,
        warm_up=args.warm_up,
        matmul_gflop_per_s=measure_matmul(
            getattr(torch, args.dtype), _MATMUL_SIZE, device
        ),
        copy_gb_per_s=measure_copy(_COPY_BYTES, device),
    )
    machine = {
        **asdict(describe_hardware("cuda", gpu, torch.get_num_threads(), 1)),
        "gpu": gpu,
        "code": asdict(describe_code()),
        "torch": torch.__version__.partition("+")[0],
        "triton": version("triton"),
    }
    name = args.name or f"kernels_{machine['name']}_{options.dtype}"

    rows: list[KernelRow] = []
    for case in cases:
        if reason := why_not_run(case, getattr(torch, options.dtype)):
            sys.stderr.write(
                f"{case.kernel} of {case.system}, {case.phase}: left out, as {reason}\n"
            )
            continue

        rows.append(measure_kernel(case, options, device))
        # A later case may need more memory than there is.
        write_kernels(args.out, name, machine, options, rows)

    return rows


def _find_gpu() -> tuple[torch.device, str]:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "The kernels can be timed on a GPU only, but there is none here: Triton's "
            "interpreter, which runs them on a CPU, tells nothing about speed."
        )

    import triton

    if triton.knobs.runtime.interpret:
        raise ValueError(
            "`TRITON_INTERPRET` must not be set, but is: Triton's interpreter tells "
            "nothing about speed."
        )

    device = torch.device("cuda")

    return device, torch.cuda.get_device_name(device)


def _format_cells(row: KernelRow) -> dict[str, str]:
    case = row.case
    shape = (case.num_experts, case.num_rows, case.length, case.num_heads, case.dim)
    milliseconds, reference, called = (
        f"{statistics.median(x) * 1e3:.4g}"
        for x in (row.seconds, row.reference_seconds, row.call_seconds)
    )

    return {
        "kernel": f"{case.kernel} of {case.system}",
        "phase": case.phase,
        "E x N x S x H x D": " x ".join(map(str, shape)),
        "ms": milliseconds,
        "torch, ms": reference,
        "ratio": f"{row.ratio:.2f}",
        "called, ms": called,
        "called, ratio": f"{row.call_ratio:.2f}",
        "GB/s": f"{row.gbytes / statistics.median(row.seconds):,.0f}",
        "of copies": f"{row.copy_fraction:.0%}",
        "of products": f"{row.matmul_fraction:.0%}",
        "error": f"{row.error:.1e}",
    }


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moxe_plugin.speed.kernels",
        description="Time the Triton kernels against torch on a GPU, at the widths of "
        "the paper's Table 1.",
    )

    add = parser.add_argument

    add(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="the type of the inputs (default: %(default)s)",
    )
    add_numbers(
        parser,
        int,
        ("--batch", 64, "sequences that the system reads at once"),
        ("--length", 256, "tokens of each"),
        ("--repeats", 20, "calls that are timed"),
        ("--warm-up", 3, "calls before them"),
    )
    add_output_options(parser)

    return parser


if __name__ == "__main__":
    sys.exit(main())
