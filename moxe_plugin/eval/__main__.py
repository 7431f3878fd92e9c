"""``python -m moxe_plugin.eval``: lm-evaluation-harness with our model and tasks.

The same as ``lm_eval --include_path …/eval_tasks``, but independent of the ``.pth``
file by which ``lm_eval`` itself learns of our models.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from moxe_plugin.models.checkpoint_files import DamagedCheckpointError
from moxe_plugin.resources import resource_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness' command line.

    :param argv: The arguments; those of the process by default.

    :returns: The exit code: 2 for a user error, 1 for a damaged checkpoint.
    """
    parser = argparse.ArgumentParser(
        prog="moxe_plugin.eval",
        description="lm-evaluation-harness (`lm_eval`) with the model `moxe` and the "
        "tasks of this package. All further options are the harness' own.",
        epilog="example: %(prog)s --model moxe --model_args checkpoint=DIR "
        "--tasks moxe_embedded_rolling,moxe_embedded_last_word --batch_size auto",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--print-task-path",
        action="store_true",
        help="print the directory for `lm_eval --include_path`, and exit",
    )

    args, rest = parser.parse_known_args(argv)

    task_path = str(resource_dir("eval_tasks"))

    if args.print_task_path:
        print(task_path)  # noqa: T201  # the output of the command
        return 0

    if not rest:
        parser.print_help()
        return 0

    try:
        _run_harness(rest, task_path)
    # The harness and the adapter say so that a task, checkpoint or option is wrong.
    except ValueError as ex:
        logging.getLogger(__name__).debug("The harness failed.", exc_info=True)
        print(f"moxe_plugin.eval: error: {ex}", file=sys.stderr)  # noqa: T201  # as argparse
        return 1 if isinstance(ex, DamagedCheckpointError) else 2

    return 0


def _run_harness(argv: list[str], task_path: str) -> None:
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from moxe_plugin.eval.registration import (
        register_harness_model,
        register_transformers_classes,
    )

    register_harness_model()
    register_transformers_classes()
    setup_logging()

    cli = HarnessCLI()
    # The harness reads `sys.argv`; it inserts `run` if there is no subcommand.
    sys.argv = ["lm_eval", *argv]
    args = cli.parse_args()

    if hasattr(args, "include_path"):
        # `TaskManager` takes several paths, later ones first; the option does not.
        paths = [task_path, args.include_path]
        args.include_path = [p for p in paths if p is not None]

    cli.execute(args)


if __name__ == "__main__":
    sys.exit(main())
