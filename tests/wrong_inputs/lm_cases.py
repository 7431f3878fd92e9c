"""Wrong inputs of `fairseq2 lm`."""

from __future__ import annotations

from typing import Final

from tests.wrong_inputs.case import Case

_DATA: Final = (
    "tokenizer.name=null tokenizer.path=$tokenizer tokenizer.family=moxe_hg "
    "dataset.path=$tokens dataset.seq_len=16 dataset.batch_size=4 "
    "common.torch.num_threads=1 common.metric_recorders.tensorboard.enabled=false"
)

_TINY: Final = f"'model.config_overrides={{_set_: {{pad_idx: 1}}}}' {_DATA}"


def _pretrain(options: str, out: str = "$out") -> str:
    return f"fairseq2 lm pretrain {out} --preset smoke --config {_TINY} {options}"


def _model(name: str, options: str, *fragments: str) -> Case:
    """Make a case of a wrong model configuration."""
    padding = "" if "pad_idx" in options else "pad_idx: 1, "

    overrides = f"'model.config_overrides={{_set_: {{{padding}{options}}}}}'"

    return Case(name, _pretrain(overrides), 2, fragments)


MODEL_CASES: Final = [
    _model(
        "odd_experts", "num_experts: 5, top_k: 2", "`num_experts` must be even", "5"
    ),
    _model(
        "mlstm_experts_beyond_experts",
        "num_experts: 4, num_mlstm_experts: 5",
        "`num_mlstm_experts` must be between 0 and `num_experts` (4)",
        "5",
    ),
    _model(
        "one_group_with_difficulty",
        "num_experts: 4, num_mlstm_experts: 4",
        "`router` 'difficulty' must have two groups",
        "Set `router` to 'standard'",
    ),
    _model(
        "top_k_beyond_experts",
        "num_experts: 4, top_k: 9",
        "`top_k` must be between 1 and `num_experts` (4), but is 9",
    ),
    _model("top_k_0", "top_k: 0", "`top_k` must be between 1 and", "but is 0"),
    _model(
        "negative_gamma",
        "difficulty_bias_scale: -0.5",
        "`difficulty_bias_scale` must be",
        "-0.5",
    ),
    _model(
        "gamma_nan",
        "difficulty_bias_scale: .nan",
        "`difficulty_bias_scale` must be",
        "nan",
    ),
    _model(
        "gamma_infinite",
        "difficulty_bias_scale: .inf",
        "`difficulty_bias_scale` must be",
        "inf",
    ),
    _model(
        "negative_loss_scale",
        "router_z_loss_scale: -1.0",
        "`router_z_loss_scale` must be",
        "-1.0",
    ),
    _model(
        "loss_scale_nan", "group_loss_scale: .nan", "`group_loss_scale` must be", "nan"
    ),
    _model(
        "unknown_expert_state",
        "expert_state: sequence",
        "`model.config_overrides` cannot be structured. `expert_state`",
        "sequence",
        "subsequence",
    ),
    _model(
        "unknown_backend",
        "backend: cuda",
        "`model.config_overrides` cannot be structured. `backend`",
        "cuda",
        "native",
    ),
    _model(
        "unknown_router",
        "router: difficult",
        "`model.config_overrides` cannot be structured. `router`",
        "difficult",
        "standard",
    ),
    _model(
        "heads_do_not_divide",
        "num_heads: 5",
        "must be a multiple of `num_heads`",
        "`num_heads` is 5",
    ),
    _model(
        "unknown_model_key",
        "num_expert: 4",
        "`model.config_overrides`",
        "num_expert",
    ),
    _model(
        "vocabulary_too_small",
        "vocab_size: 100",
        "320 tokens, but has 100 only",
        "`model.config_overrides.vocab_size=320`",
    ),
    _model(
        "other_padding",
        "pad_idx: 7",
        "`pad_idx` of the model",
        "(1), but is 7",
        "`model.config_overrides.pad_idx=1`",
    ),
    _model(
        "padding_beyond_vocabulary",
        "pad_idx: 400",
        "`pad_idx` must be",
        "400",
    ),
    _model("context_0", "max_seq_len: 0", "`max_seq_len` must be", "but is 0"),
    Case(
        "unknown_architecture",
        _pretrain("model.arch=tinny"),
        2,
        ("`model.arch`", "tinny", "tiny"),
    ),
    Case(
        "unknown_family",
        _pretrain("model.family=moex"),
        2,
        ("`model.family`", "moex", "moxe"),
    ),
]
"""Models that cannot be made."""

RECIPE_CASES: Final = [
    Case(
        "misspelt_preset",
        "fairseq2 lm pretrain $out --preset quickstart/moxi",
        2,
        ("`--preset`", "'quickstart/moxi'", "Did you mean quickstart/moxe"),
    ),
    Case(
        "unknown_command",
        "fairseq2 lm pretrian $out",
        2,
        ("invalid choice: 'pretrian'", "pretrain"),
    ),
    Case("no_output_directory", "fairseq2 lm pretrain", 2, ("OUTPUT_DIR is required",)),
    Case(
        "output_directory_is_a_file",
        "fairseq2 lm pretrain $bad/blank.txt --preset smoke",
        2,
        ("`OUTPUT_DIR` must be", "blank.txt"),
    ),
    Case(
        "output_directory_below_a_file",
        _pretrain("", out="$bad/blank.txt/out"),
        2,
        ("`OUTPUT_DIR` must be", "blank.txt"),
    ),
    Case(
        "foreign_output_directory",
        _pretrain("", out="$bad/foreign"),
        2,
        ("`OUTPUT_DIR` must be", "foreign", "notes.txt"),
    ),
    Case(
        "configuration_file_missing",
        "fairseq2 lm pretrain $out --config-file $bad/nothing.yaml",
        2,
        ("nothing.yaml' does not exist",),
    ),
    Case(
        "configuration_file_no_yaml",
        "fairseq2 lm pretrain $out --config-file $bad/broken.yaml",
        2,
        ("broken.yaml' is not valid YAML",),
    ),
    Case(
        "configuration_file_no_mapping",
        "fairseq2 lm pretrain $out --config-file $bad/list.yaml",
        2,
        ("list.yaml must hold a mapping",),
    ),
    Case(
        "configuration_file_with_code",
        "fairseq2 lm pretrain $out --config-file $bad/code.yaml",
        2,
        ("code.yaml' is not valid YAML", "python/object/apply:os.system"),
    ),
    Case(
        "configuration_file_is_a_directory",
        "fairseq2 lm pretrain $out --config-file $bad",
        2,
        ("cannot be read",),
    ),
    Case(
        "option_without_value",
        _pretrain("regime.num_steps"),
        2,
        ("`--config`", "regime.num_steps"),
    ),
    Case(
        "unknown_key",
        _pretrain("regime.num_stepz=3"),
        2,
        ("`regime`", "num_stepz"),
    ),
    Case(
        "wrong_type",
        _pretrain("dataset.batch_size=many"),
        2,
        ("`dataset.batch_size`", "many"),
    ),
    Case("num_steps_0", _pretrain("regime.num_steps=0"), 2, ("`num_steps` must be",)),
    Case(
        "num_steps_missing",
        _pretrain("regime.num_steps=null"),
        2,
        ("`num_steps` must be",),
    ),
    Case(
        "epochs",
        _pretrain("regime.num_data_epochs=2"),
        2,
        ("`num_data_epochs` must be null", "but is 2", "Set `num_steps`"),
    ),
    Case(
        "warm_up_as_long_as_training",
        _pretrain("regime.num_steps=5 lr_scheduler.config.num_warmup_steps=5"),
        2,
        ("`lr_scheduler.config.num_warmup_steps` must be less than", "(5), but is 5"),
    ),
    Case(
        "negative_learning_rate",
        _pretrain("optimizer.config.lr=-0.1"),
        2,
        ("`optimizer.config.lr` must be", "-0.1"),
    ),
    Case(
        "learning_rate_nan",
        _pretrain("optimizer.config.lr=.nan"),
        2,
        ("`optimizer.config.lr` must be", "nan"),
    ),
    Case(
        "unknown_optimizer",
        _pretrain("optimizer.name=adamm"),
        2,
        ("adamm",),
    ),
    Case(
        "publishing_does_not_divide",
        _pretrain("regime.publish_metrics_every_n_steps=3"),
        2,
        ("`publish_metrics_every_n_steps`", "3"),
    ),
    Case(
        "bad_dtype",
        _pretrain("model.dtype=float7"),
        2,
        ("`model.dtype`", "float7"),
    ),
    Case(
        "tensor_parallelism",
        _pretrain("gang.tensor_parallel_size=2"),
        2,
        ("`gang.tensor_parallel_size` must be", "2"),
    ),
]
"""Trainings that cannot begin."""

DATA_CASES: Final = [
    Case(
        "seq_len_0",
        _pretrain("dataset.seq_len=0"),
        2,
        ("`seq_len` must be greater than or equal to 1, but is 0",),
    ),
    Case(
        "seq_len_beyond_context",
        _pretrain("dataset.seq_len=65"),
        2,
        ("`dataset.seq_len` must be at most the model's `max_seq_len` (64)", "65"),
    ),
    Case(
        "batch_size_0",
        _pretrain("dataset.batch_size=0"),
        2,
        ("`batch_size` must be greater than or equal to 1, but is 0",),
    ),
    Case(
        "batch_larger_than_split",
        _pretrain("dataset.batch_size=100000"),
        2,
        ("fewer than one batch of 100000", "smaller batch"),
    ),
    Case(
        "no_shards",
        _pretrain("dataset.path=$bad/foreign"),
        2,
        ("foreign is not a directory of token shards", "`moxe data build`"),
    ),
    Case(
        "no_such_data",
        _pretrain("dataset.path=$bad/nothing"),
        2,
        ("nothing is not a directory of token shards", "`moxe data build`"),
    ),
    Case(
        "damaged_manifest",
        _pretrain("dataset.path=$bad/shards"),
        1,
        ("manifest.json is damaged",),
    ),
    Case(
        "token_beyond_vocabulary",
        _pretrain("dataset.path=$bad/beyond"),
        1,
        ("beyond", "400", "320"),
    ),
    Case(
        "unknown_dataset",
        _pretrain("dataset.path=null dataset.name=moxe_embeded"),
        2,
        ("moxe_embeded is not a known dataset",),
    ),
    Case(
        "unknown_split",
        _pretrain("dataset.train_split=training"),
        2,
        ("training", "train, valid"),
    ),
    Case(
        "other_tokenizer",
        _pretrain("tokenizer.path=$bad/tokenizer 'model.config_overrides={_set_: {}}'"),
        2,
        ("was made with another tokenizer", "Set `tokenizer`"),
    ),
    Case(
        "tokenizer_missing",
        _pretrain("tokenizer.path=$bad/nothing"),
        2,
        ("nothing", "tokenizer"),
    ),
    Case(
        "tokenizer_damaged",
        _pretrain("tokenizer.path=$bad/damaged_tokenizer"),
        2,
        ("damaged_tokenizer", "is not a valid Hugging Face tokenizer"),
    ),
    Case(
        "unknown_tokenizer",
        _pretrain("tokenizer.path=null tokenizer.name=gpt5"),
        2,
        ("gpt5 is not a known tokenizer",),
    ),
]
"""Data that a training cannot read."""


def _finetune(options: str, source: str = "--from $run") -> str:
    return (
        f"fairseq2 lm instruction_finetune $out {source} --config "
        "dataset.seq_len=32 dataset.batch_size=4 common.torch.num_threads=1 "
        f"dataset.path=$instructions {options}"
    )


FINETUNE_CASES: Final = [
    Case(
        "nothing_to_start_from",
        _finetune("", source=""),
        2,
        ("`pretrained.source` must be", "`--from`"),
    ),
    Case(
        "run_missing",
        _finetune("", source="--from $bad/nothing"),
        2,
        ("`pretrained.source` must be", "is no directory"),
    ),
    Case(
        "asset_unknown",
        _finetune("", source="--from moxe_foo"),
        2,
        ("moxe_foo is not a known",),
    ),
    Case(
        "no_training_run",
        _finetune("", source="--from $bad/foreign"),
        2,
        ("foreign' is not the output directory of a training run", "model.yaml"),
    ),
    Case(
        "no_checkpoint",
        _finetune("", source="--from $bad/unfinished"),
        2,
        ("has no checkpoint", "`regime.checkpoint_every_n_steps`"),
    ),
    Case(
        "no_such_step",
        _finetune("", source="--from $run --step 5"),
        2,
        ("has no checkpoint of step 5. Its steps: 4, 8",),
    ),
    Case(
        "step_is_no_number",
        _finetune("", source="--from $run --step last"),
        2,
        ("--step", "'last'"),
    ),
    Case(
        "no_instructions",
        _finetune("dataset.path=$bad/foreign"),
        2,
        ("foreign is not a directory of instructions", "jsonl"),
    ),
    Case(
        "instruction_without_fields",
        _finetune("dataset.path=$bad/no_fields"),
        1,
        ("train.jsonl:1", "`src`", "`tgt`"),
    ),
    Case(
        "instruction_no_json",
        _finetune("dataset.path=$bad/no_json"),
        1,
        ("train.jsonl:2", "JSON"),
    ),
    Case(
        "instruction_no_utf8",
        _finetune("dataset.path=$bad/no_utf8"),
        1,
        ("train.jsonl", "UTF-8"),
    ),
    Case(
        "instructions_empty",
        _finetune("dataset.path=$bad/no_lines"),
        2,
        ("The train split of", "has no example"),
    ),
    Case(
        "no_response_fits",
        _finetune("dataset.seq_len=1"),
        2,
        ("has no example whose response begins within 2 tokens",),
    ),
]
"""Wrong inputs of `lm instruction_finetune`."""


def _generate(options: str, source: str = "--from $run") -> str:
    return f"fairseq2 lm generate $out {source} {options}"


GENERATE_CASES: Final = [
    Case(
        "generate_from_nothing",
        _generate("--prompt a", source=""),
        2,
        ("`pretrained.source` must be", "`--from`"),
    ),
    Case(
        "no_prompt",
        _generate(""),
        2,
        ("`prompts` or `prompt_file` must be specified", "`--prompt`"),
    ),
    Case(
        "empty_prompt",
        _generate("--prompt ''"),
        2,
        ("`prompts`", "must not be empty"),
    ),
    Case(
        "prompt_file_missing",
        _generate("--prompt-file $bad/nothing.txt"),
        2,
        ("`prompt_file` must be a text file", "nothing.txt"),
    ),
    Case(
        "prompt_file_empty",
        _generate("--prompt-file $bad/blank.txt"),
        2,
        ("`prompt_file` must have a prompt",),
    ),
    Case(
        "prompt_file_no_utf8",
        _generate("--prompt-file $bad/latin1.txt"),
        2,
        ("`prompt_file` must be", "UTF-8", "latin1.txt"),
    ),
    Case(
        "prompt_line_no_json",
        _generate("--prompt-file $bad/no_json/train.jsonl"),
        2,
        ("train.jsonl:2", "JSON"),
    ),
    Case(
        "prompt_line_without_text",
        _generate("--prompt-file $bad/no_fields/train.jsonl"),
        2,
        ("train.jsonl:1", "`prompt` or `src`"),
    ),
    Case(
        "prompt_beyond_context",
        _generate("--prompt-file $bad/long.txt"),
        2,
        ("must have between 1 and 63 tokens", "`prompt"),
    ),
    Case(
        "generation_of_0_tokens",
        _generate("--prompt a --config seq_generator.config.max_gen_len=0"),
        2,
        ("`max_gen_len`", "0"),
    ),
    Case(
        "temperature_0",
        _generate("--prompt a --config seq_generator.config.temperature=0"),
        2,
        ("`temperature`", "0"),
    ),
    Case(
        "generate_batch_size_0",
        _generate("--prompt a --config batch_size=0"),
        2,
        ("`batch_size` must be greater than or equal to 1, but is 0",),
    ),
    Case(
        "tokenizer_of_another_model",
        _generate("--prompt a", source="--from $bad/other_tokenizer_run"),
        2,
        ("`pad_idx`",),
    ),
]
"""Wrong inputs of `lm generate`."""
