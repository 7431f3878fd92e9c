"""Wrong inputs of the commands of `moxe`."""

from __future__ import annotations

from typing import Final

from tests.wrong_inputs.case import Case

COMMAND_CASES: Final = [
    Case("unknown_command", "moxe banch", 2, ("invalid choice: 'banch'", "bench")),
    Case("no_command", "moxe", 2, ("required", "COMMAND")),
]

BENCH_CASES: Final = [
    Case(
        "unknown_suite",
        "moxe bench quikstart --out $out",
        2,
        ("`quikstart` is not a known suite", "Known suites:", "quickstart"),
    ),
    Case(
        "suite_missing",
        "moxe bench $bad/nothing.yaml --out $out",
        2,
        ("nothing.yaml' cannot be read",),
    ),
    Case(
        "suite_no_mapping",
        "moxe bench $bad/list.yaml --out $out",
        2,
        ("list.yaml: must be a mapping",),
    ),
    Case(
        "suite_no_yaml",
        "moxe bench $bad/broken.yaml --out $out",
        2,
        ("broken.yaml: not valid YAML",),
    ),
    Case(
        "suite_no_utf8",
        "moxe bench $bad/latin1.yaml --out $out",
        2,
        ("latin1.yaml", "UTF-8"),
    ),
    Case(
        "suite_with_code",
        "moxe bench $bad/code.yaml --out $out",
        2,
        ("code.yaml: not valid YAML", "python/object/apply:os.system"),
    ),
    Case(
        "suite_unknown_key",
        "moxe bench $bad/unknown_key.yaml --out $out",
        2,
        ("`sistems` is not a known key", "systems"),
    ),
    Case(
        "suite_keys_missing",
        "moxe bench $bad/no_keys.yaml --out $out",
        2,
        ("no_keys.yaml", "`seeds`"),
    ),
    Case(
        "suite_system_outside",
        "moxe bench $bad/outside.yaml --dry-run --out $out",
        2,
        ("`name`", "../outside"),
    ),
    Case(
        "unknown_system",
        "moxe bench quickstart --dry-run --only mox --out $out",
        2,
        ("`mox` is not a system of `quickstart`", "Known systems:", "moxe"),
    ),
    Case(
        "seed_no_number",
        "moxe bench quickstart --dry-run --seeds one --out $out",
        2,
        ("--seeds", "'one'"),
    ),
    Case(
        "seed_negative",
        "moxe bench quickstart --dry-run --seeds -1 --out $out",
        2,
        ("--seeds: `seeds` must be greater than or equal to 0", "-1"),
    ),
    Case(
        "jobs_0",
        "moxe bench quickstart --dry-run --jobs 0 --out $out",
        2,
        ("--jobs", "greater than or equal to 1, but is 0"),
    ),
    Case(
        "bench_out_is_a_file",
        "moxe bench quickstart --dry-run --out $bad/blank.txt",
        2,
        ("`--out` and `--work` must be directories", "blank.txt"),
    ),
]

TABLES_CASES: Final = [
    Case(
        "results_missing",
        "moxe tables --results $bad/nothing",
        2,
        ("nothing` is no directory", "--results"),
    ),
    Case(
        "results_is_a_file",
        "moxe tables --results $bad/blank.txt",
        2,
        ("blank.txt` is no directory", "--results"),
    ),
    Case(
        "no_runs",
        "moxe tables --results $bad/foreign",
        2,
        ("there is no readable run",),
    ),
    Case(
        "run_missing",
        "moxe tables $bad/nothing --results $out",
        2,
        ("environment.json is missing", "there is no readable run"),
    ),
]

DATA_CASES: Final = [
    Case(
        "data_file_missing",
        "moxe data build $out --tokenizer $tokenizer --files $bad/nothing.txt",
        1,
        ("nothing.txt does not exist",),
    ),
    Case(
        "data_file_no_utf8",
        "moxe data build $out --tokenizer $tokenizer --files $bad/latin1.txt",
        1,
        ("latin1.txt:1 is not UTF-8", "iconv"),
    ),
    Case(
        "data_line_no_json",
        "moxe data build $out --tokenizer $tokenizer --files $bad/documents.jsonl",
        1,
        ("documents.jsonl:2 is not JSON",),
    ),
    Case(
        "data_text_no_text",
        "moxe data build $out --tokenizer $tokenizer --files $bad/numbers.jsonl",
        1,
        ("`text` must be a text", "int"),
    ),
    Case(
        "data_column_missing",
        "moxe data build $out --tokenizer $tokenizer --text-column body "
        "--files $bad/numbers.jsonl",
        1,
        ("has no `body`", "text"),
    ),
    Case(
        "data_empty",
        "moxe data build $out --tokenizer $tokenizer --files $bad/blank.txt",
        1,
        ("no document",),
    ),
    Case(
        "data_unknown_suffix",
        "moxe data build $out --tokenizer $tokenizer --files $bad/list.yaml",
        1,
        ("must be of a known kind", ".jsonl"),
    ),
    Case(
        "data_output_exists",
        "moxe data build $bad/foreign --tokenizer $tokenizer --files $bad/long.txt",
        2,
        ("already exists", "--overwrite"),
    ),
    Case(
        "data_overwrite_foreign",
        "moxe data build $bad/foreign --tokenizer $tokenizer --files $bad/long.txt "
        "--overwrite",
        2,
        ("foreign is not a directory of token shards", "Choose another one"),
    ),
    Case(
        "data_tokenizer_missing",
        "moxe data build $out --tokenizer $bad/nothing --files $bad/long.txt",
        1,
        ("nothing does not exist",),
    ),
    Case(
        "data_tokenizer_damaged",
        "moxe data build $out --tokenizer $bad/damaged_tokenizer --files $bad/long.txt",
        1,
        ("is not a valid Hugging Face tokenizer",),
    ),
    Case(
        "data_fraction_negative",
        "moxe data build $out --tokenizer $tokenizer --files $bad/long.txt "
        "--valid-fraction -0.5",
        2,
        ("`--valid-fraction`", "must not be negative"),
    ),
    Case(
        "data_max_tokens_0",
        "moxe data build $out --tokenizer $tokenizer --files $bad/long.txt "
        "--max-tokens 0",
        2,
        ("`--max-tokens` must be positive, but is 0",),
    ),
    Case(
        "tokenizer_vocabulary_too_small",
        "moxe data tokenizer --files $bad/long.txt --vocab-size 10 --output $out",
        2,
        ("vocab", "10"),
    ),
    Case(
        "info_of_no_shards",
        "moxe data info $bad/foreign",
        1,
        ("foreign is not a directory of token shards", "`moxe data build`"),
    ),
    Case(
        "info_of_damaged_shards",
        "moxe data info $bad/flipped --verify",
        1,
        ("is damaged: its sha256 differs",),
    ),
]

EXPORT_CASES: Final = [
    Case(
        "export_checkpoint_missing",
        "moxe export $bad/nothing $out",
        2,
        ("`checkpoint` must be an existing directory or a known asset",),
    ),
    Case(
        "export_into_foreign_folder",
        "moxe export $run $bad/foreign",
        2,
        ("must be empty", "foreign"),
    ),
    Case(
        "export_into_a_file",
        "moxe export $run $bad/blank.txt",
        2,
        ("must be empty", "blank.txt"),
    ),
    Case(
        "export_below_a_file",
        "moxe export $run $bad/blank.txt/out",
        2,
        ("`out_dir` must be below a directory", "blank.txt' is a file"),
    ),
    Case(
        "export_step_missing",
        "moxe export $run $out --step 5",
        2,
        ("has no checkpoint of step 5. Its steps: 4, 8",),
    ),
    Case(
        "export_record_missing",
        "moxe export $run $out --record $bad/foreign",
        2,
        ("must be the record of a run", "environment.json"),
    ),
    Case(
        "export_tokenizer_missing",
        "moxe export $run $out --tokenizer $bad/nothing",
        2,
        ("`tokenizer` must be an existing directory or a known asset",),
    ),
]

INSPECT_CASES: Final = [
    Case(
        "inspect_checkpoint_missing",
        "moxe inspect $bad/nothing --text a --out $out",
        2,
        ("`checkpoint` must be an existing directory or a known asset",),
    ),
    Case(
        "inspect_no_text",
        "moxe inspect $run --out $out",
        2,
        ("--text", "--file", "required"),
    ),
    Case(
        "inspect_empty_text",
        "moxe inspect $run --text '' --out $out",
        2,
        ("`text` must have at least one character",),
    ),
    Case(
        "inspect_file_missing",
        "moxe inspect $run --file $bad/nothing.txt --out $out",
        2,
        ("nothing.txt",),
    ),
    Case(
        "inspect_file_no_utf8",
        "moxe inspect $run --file $bad/latin1.txt --out $out",
        2,
        ("latin1.txt` must be UTF-8", "byte 6"),
    ),
    Case(
        "inspect_layer_missing",
        "moxe inspect $run --text a --layer 7 --out $out",
        2,
        ("`--layer` must be between 0 and 1, but is 7",),
    ),
    Case(
        "inspect_max_tokens_0",
        "moxe inspect $run --text abc --max-tokens 0 --out $out",
        2,
        ("max", "tokens", "0"),
    ),
    Case(
        "inspect_out_is_a_file",
        "moxe inspect $run --text abc --out $bad/blank.txt",
        2,
        ("blank.txt",),
    ),
    Case(
        "inspect_another_family",
        "moxe inspect $bad/xlstm --text abc --out $out",
        2,
        ("xlstm",),
    ),
]

SYSTEMS_CASES: Final = [
    Case(
        "unknown_size",
        "moxe systems --size huge --out $out",
        2,
        ("`size` must be one of 340m,", "tiny, but is 'huge'"),
    ),
    Case(
        "context_0",
        "moxe systems --size tiny --context-len 0 --out $out",
        2,
        ("--context-len", "at least 1, but is '0'"),
    ),
    Case(
        "systems_out_is_a_file",
        "moxe systems --size tiny --out $bad/blank.txt",
        2,
        ("blank.txt",),
    ),
]

SPEED_CASES: Final = [
    Case(
        "unknown_speed_suite",
        "moxe speed --suite tabel1 --out $out",
        2,
        ("`suite` must be one of", "tabel1"),
    ),
    Case(
        "speed_unknown_size",
        "moxe speed --size huge --out $out",
        2,
        ("`size` must be one of", "'huge'"),
    ),
    Case("speed_batch_0", "moxe speed --batch 0", 2, ("--batch", "is '0'")),
    Case("speed_length_0", "moxe speed --length 0", 2, ("--length", "is '0'")),
    Case(
        "speed_bad_dtype",
        "moxe speed --dtype float7 --out $out",
        2,
        ("`dtype` must be one of", "'float7'"),
    ),
    Case(
        "speed_unknown_device",
        "moxe speed --device quantum --out $out",
        2,
        ("`device` must be cpu or cuda", "'quantum'"),
    ),
    Case(
        "speed_device_without_gpu",
        "moxe speed --device cuda --out $out",
        2,
        ("`device` must be on this machine", "'cpu'"),
    ),
    Case(
        "speed_too_many_threads",
        "moxe speed --threads 100000 --out $out",
        2,
        ("`threads` must be at most the number of cores", "100000"),
    ),
    Case(
        "speed_name_outside",
        "moxe speed --name ../a --out $out",
        2,
        ("`name` must be the name of a file", "'../a'"),
    ),
]

CLAIMS_CASES: Final = [
    Case(
        "claims_no_text",
        "moxe claims $run --out $out",
        2,
        ("`--text` must name the held-out text",),
    ),
    Case(
        "claims_text_missing",
        "moxe claims $run --text $bad/nothing.jsonl --out $out",
        2,
        ("nothing.jsonl does not exist",),
    ),
    Case(
        "claims_no_run",
        "moxe claims $bad/nothing --text $bad/long.txt --out $out",
        2,
        ("nothing",),
    ),
    Case(
        "claims_time_without_runs",
        "moxe claims --time --out $out",
        2,
        ("`--time` must come with the training outputs",),
    ),
    Case(
        "claims_nothing_measured",
        "moxe claims --out $out",
        2,
        ("measure",),
    ),
    Case(
        "claims_text_no_utf8",
        "moxe claims $run --text $bad/latin1.txt --out $out",
        2,
        ("latin1.txt:1 is not UTF-8",),
    ),
]

MOXE_CASES: Final = [
    *COMMAND_CASES,
    *BENCH_CASES,
    *TABLES_CASES,
    *DATA_CASES,
    *EXPORT_CASES,
    *INSPECT_CASES,
    *SYSTEMS_CASES,
    *SPEED_CASES,
    *CLAIMS_CASES,
]
