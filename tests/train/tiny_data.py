"""A tokenizer of 320 tokens, shards and instructions; a tiny model trained on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moxe_plugin.data.manifest import compute_sha256
from moxe_plugin.data.shard_writer import ShardWriter
from moxe_plugin.train.launch import load_preset, run_recipe

VOCAB_SIZE: Final = 320
"""As the ``tiny`` architectures have it."""

TWO_STEPS: Final[Mapping[str, object]] = {
    "lr_scheduler.config.num_warmup_steps": 1,
    "regime.num_steps": 2,
    "regime.validate_every_n_steps": 2,
    "regime.checkpoint_every_n_steps": None,
    "regime.publish_metrics_every_n_steps": 1,
    "common.torch.num_threads": 1,
    "common.metric_recorders.tensorboard.enabled": False,
}
"""The configuration keys of a training that ends after two steps, with a validation."""


@dataclass(frozen=True)
class TinyData:
    """Where the data is."""

    tokenizer_dir: Path
    tokens_dir: Path
    instructions_dir: Path

    @property
    def pretrain_overrides(self) -> dict[str, object]:
        """The configuration keys that make `lm pretrain` read it."""
        return {
            "tokenizer.name": None,
            "tokenizer.path": str(self.tokenizer_dir),
            "tokenizer.family": "moxe_hg",
            "dataset.path": str(self.tokens_dir),
            "dataset.seq_len": 16,
            "dataset.batch_size": 4,
            "dataset.max_num_valid_batches": 2,
            "model.config_overrides": {"pad_idx": 1},
        }

    @property
    def finetune_overrides(self) -> dict[str, object]:
        """The configuration keys that make `lm instruction_finetune` read it."""
        return {
            "dataset.path": str(self.instructions_dir),
            "dataset.seq_len": 32,
            "dataset.batch_size": 4,
            "dataset.max_num_valid_batches": 2,
        }


def make_tiny_data(path: Path) -> TinyData:
    """Write the data.

    :param path: An empty directory.

    :returns: Where it is.
    """
    data = TinyData(path / "tokenizer", path / "tokens", path / "instructions")

    tokenizer = train_tokenizer(data.tokenizer_dir)

    writer = ShardWriter(
        data.tokens_dir,
        tokenizer_name="tiny",
        tokenizer_sha256=compute_sha256(data.tokenizer_dir / "tokenizer.json"),
        vocab_size=VOCAB_SIZE,
        eos_idx=0,
        source="tests",
    )

    with writer:
        for split, begin in (("train", 0), ("valid", 300)):
            for text in map(_sentence, range(begin, begin + 100)):
                ids = tokenizer.encode(text).ids
                writer.add_document(split, ids, len(text.encode()))

    data.instructions_dir.mkdir()

    for split in ("train", "valid"):
        lines = [
            json.dumps({"src": f"Double {n}. ", "tgt": f"It is {2 * n}."})
            for n in range(40)
        ]
        file = data.instructions_dir / f"{split}.jsonl"
        # fairseq2's own reader wants the last line to end, too.
        file.write_text("\n".join([*lines, ""]), encoding="utf-8")

    return data


def _sentence(number: int) -> str:
    return f"The double of {number} is {2 * number}, and its square is {number**2}."


def train_tokenizer(path: Path) -> Tokenizer:
    """Train a byte-level tokenizer without a chat template.

    :param path: The directory to write it to.

    :returns: The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    tokenizer.train_from_iterator(map(_sentence, range(100)), trainer)

    hg_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )

    hg_tokenizer.save_pretrained(str(path))

    return tokenizer


def pretrain(
    data: TinyData,
    output_dir: Path,
    overrides: Mapping[str, object] | None = None,
    *,
    quiet: bool = True,
) -> None:
    """Train a tiny MoxE for 8 steps.

    :param data: The data.
    :param output_dir: The output directory.
    :param overrides: Further configuration values.
    :param quiet: Whether its log has only warnings.
    """
    config = load_preset(
        "smoke",
        {
            "regime.num_steps": 8,
            "regime.validate_every_n_steps": 4,
            "regime.checkpoint_every_n_steps": 4,
            "regime.publish_metrics_every_n_steps": 1,
            "common.torch.num_threads": 1,
            "common.metric_recorders.tensorboard.enabled": False,
            **data.pretrain_overrides,
            **(overrides or {}),
        },
    )

    run_recipe("lm/pretrain", config, output_dir, quiet=quiet)


def read_metrics(output_dir: Path, category: str) -> list[dict[str, Any]]:
    """Read the metrics that a run has recorded.

    :param output_dir: The output directory of the run.
    :param category: ``train`` or ``valid``.

    :returns: One dictionary per line.
    """
    text = output_dir.joinpath("metrics", f"{category}.jsonl").read_text()

    return [json.loads(line) for line in text.splitlines()]
