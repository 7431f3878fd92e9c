"""What the number of processes means for a run: its checkpoints, its losses."""

from __future__ import annotations

from pathlib import Path

from fairseq2.gang import Gangs
from fairseq2.recipe import RecipeContext
from fairseq2.recipe.error import RecipeError

from moxe_plugin.models.clm import AuxLossCausalLM


def check_topology(context: RecipeContext) -> None:
    """Make sure that the processes of the run can continue its last checkpoint.

    fairseq2 writes a file for each process, and one of model and optimizer for each
    shard. It can read them in fewer processes, but not in more, and not with another
    number of shards.

    :param context: The context of the recipe, before its model is created.

    :raises RecipeError: fairseq2 would find files missing, or call them erroneous.
    """
    step = context.get_checkpoint_manager().maybe_get_last_step_number(
        exclude_model_only=True
    )

    if step is not None:
        checkpoint_dir = context.output_dir / "checkpoints"

        _check_checkpoint(checkpoint_dir / f"step_{step}", context.gangs)


def balance_over_processes(model: AuxLossCausalLM, gangs: Gangs) -> None:
    """Let the losses that balance experts take their means over all processes.

    :param model: The model itself, not its data-parallel wrapper.
    :param gangs: Their ``dp`` gang has the processes.

    :raises RecipeError: The model's losses are of a process's own batch.
    """
    if not model.has_balance_losses:
        raise RecipeError(
            "`balance_over` must be 'local' for this model family, which has no "
            "balance losses over several processes, but is 'global' instead."
        )

    if gangs.dp.size > 1:
        model.balance_group = gangs.dp.as_process_group()


def _check_checkpoint(step_dir: Path, gangs: Gangs) -> None:
    num_ranks = _count(step_dir, "trainer/rank_*.pt")
    num_shards = _count(step_dir, "model/pp_00/tp_00/sdp_*.pt")

    if num_ranks == 0 or num_shards == 0:
        # Elsewhere, or damaged: fairseq2 tells.
        return

    if gangs.sdp.size == num_shards and gangs.root.size <= num_ranks:
        return

    raise RecipeError(
        f"The checkpoint '{step_dir}' is of {_describe(num_ranks, num_shards)}, but "
        f"this run has {_describe(gangs.root.size, gangs.sdp.size)}. fairseq2 "
        "continues a run only with as many shards, and in no more processes. Launch it "
        f"as before, by `torchrun --nproc-per-node {num_ranks}` with the same "
        "`trainer.data_parallelism`; or start a new run from its parameters, in "
        f"another output directory, with `--config "
        f"model.name=checkpoint_{step_dir.name} "
        f"common.assets.prev_checkpoint_dir={step_dir.parent}`."
    )


def _count(step_dir: Path, pattern: str) -> int:
    return len(list(step_dir.glob(pattern)))


def _describe(num_ranks: int, num_shards: int) -> str:
    processes = "1 process" if num_ranks == 1 else f"{num_ranks} processes"
    shards = "1 shard" if num_shards == 1 else f"{num_shards} shards"

    return f"{processes} and {shards} of the model"
