"""Wrong commands whose output directory holds a finished run."""

from __future__ import annotations

from typing import Final

from tests.wrong_inputs.case import Case


def _resume(options: str) -> str:
    return (
        "fairseq2 lm pretrain $run --preset smoke --config "
        "'model.config_overrides={_set_: {pad_idx: 1}}' "
        "tokenizer.name=null tokenizer.path=$tokenizer tokenizer.family=moxe_hg "
        "dataset.path=$tokens dataset.seq_len=16 dataset.batch_size=4 "
        "regime.num_steps=12 regime.checkpoint_every_n_steps=4 "
        "regime.validate_every_n_steps=4 regime.publish_metrics_every_n_steps=1 "
        "common.torch.num_threads=1 common.metric_recorders.tensorboard.enabled=false "
        f"{options}"
    )


RESUME_CASES: Final = [
    Case(
        "another_family",
        _resume("model.family=xlstm"),
        2,
        ("holds a training run of another model", "Choose another output directory"),
    ),
    Case(
        "another_size",
        _resume("'model.config_overrides={_set_: {pad_idx: 1, num_layers: 3}}'"),
        2,
        ("holds a training run of another model", "Choose another output directory"),
    ),
    Case(
        "another_length",
        _resume("dataset.seq_len=8"),
        2,
        ("rows when the checkpoint was saved", "output directory"),
    ),
    Case(
        "another_seed",
        _resume("common.seed=7"),
        2,
        ("The order of the data had the seed", "another output directory"),
    ),
    Case(
        "unknown_data",
        _resume("dataset.path=$bad/nothing"),
        2,
        ("nothing is not a directory of token shards",),
    ),
    Case(
        "unknown_architecture",
        _resume("model.arch=tinny"),
        2,
        ("`model.arch` must be", "tiny"),
    ),
    Case(
        "typing_error",
        _resume("regime.num_stepz=4"),
        2,
        ("`regime`", "num_stepz"),
    ),
    Case(
        "generation_into_a_training_run",
        "fairseq2 lm generate $run --from $bad/nothing --prompt a",
        2,
        ("`pretrained.source` must be",),
    ),
]
