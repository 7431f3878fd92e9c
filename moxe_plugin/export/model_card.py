"""Writes the model card: the README of a folder for transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import yaml

from moxe_plugin.export.facts import Facts

_ABOUT: Final = {
    "moxe": (
        "MoxE",
        "a Mixture of xLSTM Experts with entropy-aware routing "
        "([arXiv 2505.01459](https://arxiv.org/abs/2505.01459))",
    ),
    "xlstm": (
        "xLSTM",
        "a stack of xLSTM blocks "
        "([arXiv 2405.04517](https://arxiv.org/abs/2405.04517))",
    ),
    "gemma2": ("Gemma 2", "a dense transformer with the architecture of Gemma 2"),
    "qwen_moe": (
        "Qwen-MoE",
        "a transformer of experts with the architecture of Qwen1.5-MoE",
    ),
}

_NATIVE: Final = ("gemma2", "qwen_moe")
"""The families that transformers has itself."""


def render_model_card(facts: Facts, *, license_id: str) -> str:
    """Render a model card.

    :param facts: What is known of the model.
    :param license_id: The licence of the weights.

    :returns: Markdown with the front matter that the Hugging Face Hub reads.
    """
    lines = [
        *_front_matter(facts, license_id),
        *_what_it_is(facts),
        *_training(facts),
        *_results(facts),
        *_loading(facts),
        *_license(license_id),
    ]

    return "\n".join(lines) + "\n"


def _front_matter(facts: Facts, license_id: str) -> Iterator[str]:
    values = {
        "library_name": "transformers",
        "license": license_id,
        "pipeline_tag": "text-generation",
        "tags": [facts.family, "moxe_plugin"],
    }

    yield "---"
    yield yaml.safe_dump(values, sort_keys=True).rstrip()
    yield "---"


def _what_it_is(facts: Facts) -> Iterator[str]:
    name, about = _ABOUT[facts.family]

    # Of an asset it is not known who trained it.
    origin = "trained" if facts.recipe_config else "converted"
    origin += " with moxe_plugin on fairseq2"

    yield f"\n# {name}, {facts.num_parameters:,} parameters\n"
    yield (
        f"This is {about}, {origin}. It only continues text. It was made for research: "
        "see the results below before you use it.\n"
    )
    yield from _table(
        ("configuration", "value"),
        [
            ("family", facts.family),
            ("type of the parameters", facts.dtype),
            *facts.model_config.items(),
        ],
    )


def _training(facts: Facts) -> Iterator[str]:
    yield "\n## Training\n"

    rows = [*_training_facts(facts), *_code_facts(facts)]

    yield from _table(("what", "value"), rows)

    if facts.recipe_config:
        yield "\nThe whole recipe is `recipe.yaml` in this folder."
    else:
        yield "\nThe recipe of the training is not recorded."


def _training_facts(facts: Facts) -> Iterator[tuple[str, Any]]:
    yield "source", facts.source

    if facts.step is not None:
        yield "step", facts.step

    if facts.num_tokens is not None:
        yield "target tokens", f"{facts.num_tokens:,}"

    for name, *keys in (
        ("started from", "pretrained", "source"),
        ("data", "dataset", "name"),
        ("data, directory", "dataset", "path"),
        ("tokenizer", "tokenizer", "name"),
        ("tokenizer, directory", "tokenizer", "path"),
        ("sequence length", "dataset", "seq_len"),
        ("batch size, per process", "dataset", "batch_size"),
        ("optimizer", "optimizer", "name"),
        ("learning rate", "optimizer", "config", "lr"),
        ("learning rate schedule", "lr_scheduler", "name"),
        ("mixed precision", "trainer", "mixed_precision", "mode"),
        ("seed", "common", "seed"),
    ):
        value = _find(facts.recipe_config, keys)
        if value is not None:
            yield name, value


def _find(values: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None

    return values


def _code_facts(facts: Facts) -> Iterator[tuple[str, Any]]:
    if facts.record is not None:
        environment = facts.record.environment
        code, hardware = environment.code, environment.hardware

        commit = "" if code.commit is None else f", commit {code.commit}"
        dirty = ", with uncommitted changes" if code.dirty else ""

        yield "record", facts.record.name
        yield "code of the training", f"moxe_plugin {code.version}{commit}{dirty}"
        yield "hardware", f"{hardware.model} ({hardware.device})"
        yield "digest of the training tokens", environment.data.train_sha256

        yield from environment.versions.items()

    yield "code of the export", f"moxe_plugin {version('moxe-plugin')}"


def _results(facts: Facts) -> Iterator[str]:
    yield "\n## Results\n"

    if not facts.scores:
        yield "None are recorded."
        return

    rows = [(s.task, s.metric, f"{s.value:.4g}") for s in facts.scores]

    yield from _table(("task", "metric", "value"), rows)


def _loading(facts: Facts) -> Iterator[str]:
    is_native = facts.family in _NATIVE

    yield "\n## How to load it\n"

    if is_native:
        yield "transformers loads it by itself.\n"
    else:
        yield "The package moxe_plugin must be installed: this folder holds no code.\n"

    yield "```python"
    if not is_native:
        yield "import moxe_plugin.hf  # tells transformers of the model"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield "model = AutoModelForCausalLM.from_pretrained(FOLDER)"
    yield "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"
    yield "```\n"
    yield (
        "The tokenizer adds no special tokens by itself. In lm-evaluation-harness, "
        "`--model hf --model_args pretrained=FOLDER` and `--model moxe --model_args "
        "checkpoint=FOLDER` (the latter with moxe_plugin) give the same scores."
    )


def _license(license_id: str) -> Iterator[str]:
    yield "\n## Licence\n"
    yield (
        f"The weights: {license_id}. The code, moxe_plugin: apache-2.0. The training "
        "data has licences of its own."
    )


def _table(header: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"

    for row in rows:
        cells = (str(cell).replace("|", "\\|") for cell in row)

        yield f"| {' | '.join(cells)} |"
