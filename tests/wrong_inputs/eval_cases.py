"""Wrong inputs of `lm_eval --model moxe`."""

from __future__ import annotations

from typing import Final

from tests.wrong_inputs.case import Case


def _eval(model_args: str, options: str = "") -> str:
    return (
        f"lm_eval --model moxe --model_args {model_args} "
        f"--tasks moxe_embedded_rolling --limit 1 {options}"
    )


EVAL_CASES: Final = [
    Case(
        "checkpoint_not_named",
        "lm_eval --model moxe --tasks moxe_embedded_rolling",
        2,
        ("Exactly one of `checkpoint` and `model`", "checkpoint=DIR"),
    ),
    Case(
        "checkpoint_missing",
        _eval("checkpoint=$bad/nothing"),
        2,
        ("`checkpoint` must be an existing directory or a known asset",),
    ),
    Case(
        "checkpoint_of_no_run",
        _eval("checkpoint=$bad/foreign"),
        2,
        ("foreign' is not the output directory of a training run",),
    ),
    Case(
        "checkpoint_unfinished",
        _eval("checkpoint=$bad/unfinished"),
        2,
        ("has no checkpoint", "`regime.checkpoint_every_n_steps`"),
    ),
    Case(
        "checkpoint_is_a_file",
        _eval("checkpoint=$bad/blank.txt"),
        2,
        ("`checkpoint` must be an existing directory", "blank.txt"),
    ),
    Case(
        "checkpoint_of_another_family",
        _eval("checkpoint=$bad/other_family"),
        1,
        ("model.yaml' is damaged: it is not what step 8 was saved with", "Copy"),
    ),
    Case(
        "step_missing",
        _eval("checkpoint=$run,step=5"),
        2,
        ("has no checkpoint of step 5. Its steps: 4, 8",),
    ),
    Case(
        "step_no_number",
        _eval("checkpoint=$run,step=last"),
        2,
        ("`step` must be", "last"),
    ),
    Case(
        "unknown_option",
        _eval("checkpoint=$run,max_len=5"),
        2,
        ("`max_len` must not be given", "max_length"),
    ),
    Case(
        "max_length_0",
        _eval("checkpoint=$run,max_length=0"),
        2,
        ("`max_length` must be", "but is 0"),
    ),
    Case(
        "max_length_no_number",
        _eval("checkpoint=$run,max_length=long"),
        2,
        ("`max_length` must be", "long"),
    ),
    Case(
        "max_gen_toks_negative",
        _eval("checkpoint=$run,max_gen_toks=-3"),
        2,
        ("`max_gen_toks` must be", "but is -3"),
    ),
    Case(
        "bad_dtype",
        _eval("checkpoint=$run,dtype=float7"),
        2,
        ("`dtype` must be one of", "'float7'"),
    ),
    Case(
        "unknown_device",
        _eval("checkpoint=$run", "--device quantum"),
        2,
        ("`device` must be cpu, cuda or cuda:N", "'quantum'"),
    ),
    Case(
        "batch_size_0",
        _eval("checkpoint=$run", "--batch_size 0"),
        2,
        ("`batch_size` must be a positive number or 'auto'", "'0'"),
    ),
    Case(
        "batch_size_no_number",
        _eval("checkpoint=$run", "--batch_size many"),
        2,
        ("`batch_size` must be a positive number or 'auto'", "'many'"),
    ),
    Case(
        "prefix_token_beyond_vocabulary",
        _eval("checkpoint=$run,prefix_token=999"),
        2,
        ("`prefix_token` must be in [0, 320)", "999"),
    ),
    Case(
        "prefix_token_unknown",
        _eval("checkpoint=$run,prefix_token=start"),
        2,
        ("`prefix_token` must be 'bos', 'eos' or a token id", "'start'"),
    ),
    Case(
        "tokenizer_missing",
        _eval("checkpoint=$run,tokenizer=$bad/nothing"),
        2,
        ("`tokenizer` must be an existing directory or a known asset",),
    ),
    Case(
        "tokenizer_damaged",
        _eval("checkpoint=$run,tokenizer=$bad/damaged_tokenizer"),
        2,
        ("damaged_tokenizer", "is not a valid Hugging Face tokenizer"),
    ),
    Case(
        "tokenizer_of_another_model",
        _eval("checkpoint=$bad/other_tokenizer_run"),
        2,
        ("`tokenizer` must be the one", "is 1, but that of this one is None"),
    ),
    Case(
        "unknown_task",
        "lm_eval --model moxe --model_args checkpoint=$run --tasks moxe_embeded",
        2,
        ("moxe_embeded",),
    ),
    Case(
        "unknown_model",
        "lm_eval --model moxy --tasks moxe_embedded_rolling",
        2,
        ("moxy",),
    ),
]
