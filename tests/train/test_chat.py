"""Talks with models of all families."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.generation.sampling import SamplingSequenceGenerator, TopKSampler
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout
from fairseq2.recipe.error import RecipeError
from fairseq2.utils.validation import ValidationError
from torch import Tensor

from moxe_plugin.data.turns import TurnEncoder
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.train.chat.conversation import Answer, Conversation, Exchange
from moxe_plugin.train.chat.task import ChatTask
from moxe_plugin.train.launch import load_preset, run_recipe
from tests.common import BOS_IDX, EOS_IDX, ByteTokenizer
from tests.models.families import FAMILIES, RECURRENT_FAMILIES, create_model

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

all_families = pytest.mark.parametrize("family", FAMILIES)

_TOKENIZER = ByteTokenizer()

_MAX_GEN_LEN = 7

_TEXTS = ["Who is it?", "é", "And then?"]


def _create_model(family: str) -> AuxLossCausalLM:
    model = create_model(family).eval()

    # The initial weights tell few tokens apart.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    return model


def _create_generator(model: CausalLM, max_gen_len: int) -> SamplingSequenceGenerator:
    return SamplingSequenceGenerator(
        model,
        _TOKENIZER.vocab_info,
        TopKSampler(1),
        max_gen_len=max_gen_len,
        prefill_chunk_size=4,
    )


def _converse(
    model: AuxLossCausalLM,
    *,
    context_len: int | None = None,
    max_gen_len: int = _MAX_GEN_LEN,
    on_forget: Callable[[], None] = lambda: None,
) -> Conversation:
    return Conversation(
        model,
        _TOKENIZER,
        TurnEncoder(_TOKENIZER, "instruction"),
        _create_generator,
        max_gen_len=max_gen_len,
        context_len=context_len,
        on_forget=on_forget,
    )


def _ignore(_: str) -> None:
    pass


def _write_context(history: Sequence[Exchange], text: str) -> list[int]:
    """Write what the model must have read, by the definition of the format."""
    tokens = []

    for exchange in history:
        tokens += [BOS_IDX, *exchange.text.encode(), *exchange.tokens, EOS_IDX]

    return [*tokens, BOS_IDX, *text.encode()]


def _complete(model: AuxLossCausalLM, context: list[int], max_gen_len: int) -> Tensor:
    """Complete a context at once, with fairseq2 alone."""
    seqs = torch.tensor([context])

    output = _create_generator(model, max_gen_len)(seqs, BatchLayout.of(seqs))

    return output.hypotheses[0][0].seq


@all_families
def test_answers_are_those_of_a_generator_that_reads_everything(family: str) -> None:
    model = _create_model(family)
    conversation = _converse(model)
    decode = _TOKENIZER.create_decoder(skip_special_tokens=True)

    for text in _TEXTS:
        expected = _complete(
            model, _write_context(conversation.history, text), _MAX_GEN_LEN
        )

        pieces: list[str] = []
        answer = conversation.answer(text, pieces.append)

        assert conversation.history[-1].tokens == expected[:-1].tolist()
        assert answer.text == "".join(pieces) == decode(expected)
        assert answer.num_tokens == len(expected) - 1
        assert answer.ended_by == ("eos" if len(expected) < _MAX_GEN_LEN else "length")


@all_families
def test_nothing_is_read_twice(family: str) -> None:
    model = _create_model(family)
    conversation = _converse(model)

    num_read = 0

    def count(_: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal num_read
        num_read += args[0].size(1)

    model.register_forward_pre_hook(count)

    for text in _TEXTS:
        context = _write_context(conversation.history, text)

        conversation.answer(text, _ignore)

        assert conversation.num_read_tokens == num_read
        # All but the token that the generator would have read next
        num_generated = len(conversation.history[-1].tokens)
        assert num_read in (
            len(context) + num_generated - 1,
            len(context) + num_generated,
        )


@all_families
def test_reset_begins_anew(family: str) -> None:
    model = _create_model(family)
    conversation = _converse(model)

    first = conversation.answer(_TEXTS[0], _ignore)
    conversation.answer(_TEXTS[1], _ignore)
    conversation.reset()

    assert conversation.num_read_tokens == 0
    assert conversation.answer(_TEXTS[0], _ignore) == first


@all_families
def test_interrupted_answer_is_remembered_as_far_as_it_went(family: str) -> None:
    model = _create_model(family)
    conversation = _converse(model)

    num_pieces = 0

    def interrupt(_: str) -> None:
        nonlocal num_pieces
        num_pieces += 1
        if num_pieces == 3:
            conversation.interrupt()

    full = _complete(
        model, _write_context(conversation.history, _TEXTS[0]), _MAX_GEN_LEN
    )
    assert len(full) > 4

    answer = conversation.answer(_TEXTS[0], interrupt)

    assert answer.ended_by == "interrupt"
    assert conversation.history[-1].tokens == full[:3].tolist()

    expected = _complete(
        model, _write_context(conversation.history, _TEXTS[1]), _MAX_GEN_LEN
    )
    conversation.answer(_TEXTS[1], _ignore)

    assert conversation.history[-1].tokens == expected[:-1].tolist()


@all_families
def test_state_that_broke_off_within_a_token_is_read_again(family: str) -> None:
    model = _create_model(family)
    conversation = _converse(model)
    conversation.answer(_TEXTS[0], _ignore)

    # Some layers have seen the token, others have not.
    def break_off(*_: Any) -> None:
        raise KeyboardInterrupt

    unchecked: Any = model
    stack = unchecked.hf.model if hasattr(model, "hf") else unchecked.decoder
    handle = stack.layers[-1].register_forward_pre_hook(break_off)

    with pytest.raises(KeyboardInterrupt):
        conversation.answer(_TEXTS[1], _ignore)

    handle.remove()

    expected = _complete(
        model, _write_context(conversation.history, _TEXTS[2]), _MAX_GEN_LEN
    )
    conversation.answer(_TEXTS[2], _ignore)

    assert [e.text for e in conversation.history] == [_TEXTS[0], _TEXTS[2]]
    assert conversation.history[-1].tokens == expected[:-1].tolist()


@all_families
def test_full_context_drops_the_oldest_turns(family: str) -> None:
    model = _create_model(family)

    forgotten = []
    conversation = _converse(
        model, context_len=40, on_forget=lambda: forgotten.append(True)
    )

    texts = [f"Question {number}." for number in range(8)]

    for text in texts:
        conversation.answer(text, _ignore)

        # What is left is all that the answer depends on.
        *earlier, last = conversation.history
        expected = _complete(model, _write_context(earlier, text), _MAX_GEN_LEN)

        assert last.tokens == expected[:-1].tolist()
        assert conversation.num_read_tokens <= 40

    assert len(conversation.history) < len(texts)
    assert forgotten == [True]


def test_text_without_room_for_an_answer_is_refused() -> None:
    conversation = _converse(_create_model("gemma2"), context_len=40)
    conversation.answer("Hello", _ignore)

    with pytest.raises(ValueError, match=r"at most 39 tokens, .* but has 41"):
        conversation.answer("a" * 40, _ignore)

    with pytest.raises(ValueError, match="must not be empty"):
        conversation.answer("", _ignore)

    # The conversation goes on, and an answer may be shorter than asked.
    answer = conversation.answer("a" * 35, _ignore)

    assert answer.num_tokens <= 3
    assert answer.ended_by == "length"


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_recurrent_state_goes_beyond_the_length_of_training(family: str) -> None:
    model = _create_model(family)
    conversation = _converse(model)

    while conversation.num_read_tokens <= 2 * model.max_seq_len:
        conversation.answer("Tell me more.", _ignore)

    assert len(conversation.history) > 3


class _Terminal(io.StringIO):
    """Looks like a terminal."""

    def isatty(self) -> bool:
        return True


def _create_task(
    source: io.StringIO, sink: io.StringIO, *, writes_json: bool = False
) -> ChatTask:
    return ChatTask(
        _converse(_create_model("moxe"), max_gen_len=12),
        source,
        sink,
        io.StringIO(),
        greeting="Hello",
        trained_len=30,
        writes_json=writes_json,
        seed=1,
    )


def _answer(texts: Sequence[str]) -> list[Answer]:
    torch.manual_seed(2)
    conversation = _converse(_create_model("moxe"), max_gen_len=12)

    return [conversation.answer(text, _ignore) for text in texts]


def test_lines_of_a_pipe_are_turns() -> None:
    first, second = _answer(_TEXTS[:2])

    torch.manual_seed(2)
    sink = io.StringIO()
    source = io.StringIO(
        f"{_TEXTS[0]}\n\n  {_TEXTS[1]} \n/reset\n{_TEXTS[0]}\n/exit\nnever read\n"
    )

    _create_task(source, sink).run()

    assert sink.getvalue() == "\n".join([first.text, second.text, first.text, ""])


def test_answers_to_a_pipe_may_be_json() -> None:
    answers = _answer(_TEXTS[:2])

    torch.manual_seed(2)
    sink = io.StringIO()

    _create_task(io.StringIO("\n".join(_TEXTS[:2])), sink, writes_json=True).run()

    records = [json.loads(line) for line in sink.getvalue().split("\n")[:-1]]

    assert [r["prompt"] for r in records] == _TEXTS[:2]
    assert [r["text"] for r in records] == [a.text for a in answers]
    assert [r["num_tokens"] for r in records] == [a.num_tokens for a in answers]
    assert all(r["ended_by"] in ("eos", "length") for r in records)


def test_refused_turn_of_a_pipe_is_an_error() -> None:
    torch.manual_seed(2)

    task = ChatTask(
        _converse(_create_model("gemma2"), context_len=40),
        io.StringIO("Hi\n" + "a" * 80),
        io.StringIO(),
        io.StringIO(),
        greeting="",
        trained_len=40,
        writes_json=False,
        seed=1,
    )

    with pytest.raises(RecipeError, match="Turn 2: The text must have at most 39"):
        task.run()


def test_terminal_survives_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    (full,) = _answer(_TEXTS[:1])

    class Sink(_Terminal):
        def write(self, text: str) -> int:
            if text and len(answered) == 1 and not text.isspace():
                answered.append(text)
                # As the terminal does upon Ctrl-C
                signal.raise_signal(signal.SIGINT)

            return super().write(text)

    answered: list[str] = []

    def lines() -> Iterator[str]:
        # Ctrl-C at the prompt
        yield ""
        answered.append("")
        yield _TEXTS[0]
        yield _TEXTS[1]

    source = lines()

    def ask(prompt: str) -> str:
        assert prompt == "> "

        line = next(source, None)
        if line is None:
            raise EOFError
        if line == "":
            raise KeyboardInterrupt

        return line

    monkeypatch.setattr("builtins.input", ask)

    torch.manual_seed(2)
    sink = Sink()
    task = _create_task(_Terminal(), sink)
    handler = signal.getsignal(signal.SIGINT)

    task.run()

    assert signal.getsignal(signal.SIGINT) is handler
    assert task.step_nr == 2

    greeting, _, first, *_ = sink.getvalue().split("\n")

    assert greeting == "Hello"
    assert full.text.startswith(first)
    assert 0 < len(first) < len(full.text)

    # Ctrl-D leaves the shell's prompt on a line of its own.
    assert sink.getvalue().endswith("\n")


def test_answers_do_not_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Escaping:
        num_read_tokens = 0

        def answer(self, _: str, on_piece: Callable[[str], None]) -> Answer:
            on_piece("a\x1b[2J\tb\n")

            return Answer(text="", num_tokens=1, ended_by="eos")

        def interrupt(self) -> None:
            raise AssertionError

    lines = iter(["Hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))

    conversation: Any = Escaping()
    sink = _Terminal()

    ChatTask(
        conversation,
        _Terminal(),
        sink,
        io.StringIO(),
        greeting="",
        trained_len=9,
        writes_json=False,
        seed=1,
    ).run()

    assert sink.getvalue() == "\na\N{SYMBOL FOR ESCAPE}[2J\tb\n\n"


def _run_chat(
    source: Path, output_dir: Path, overrides: dict[str, object] | None = None
) -> None:
    config = load_preset(
        None,
        {
            "pretrained.source": str(source),
            "seq_generator.config.max_gen_len": 6,
            "seq_generator.config.sampler": {"name": "top_k", "config": {"k": 1}},
            "common.torch.num_threads": 1,
            **(overrides or {}),
        },
        recipe="lm/chat",
    )

    run_recipe("lm/chat", config, output_dir, quiet=True)


def test_recipe_answers_as_generate_completes(
    pretrained_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = ["The double of 3 is", "The square"]

    monkeypatch.setattr("sys.stdin", io.StringIO("\n/reset\n".join(prompts)))

    _run_chat(pretrained_dir, tmp_path / "chat")

    out = capsys.readouterr().out

    generate_config = load_preset(
        "generate/greedy",
        {
            "pretrained.source": str(pretrained_dir),
            "prompts": prompts,
            "batch_size": 1,
            "seq_generator.config.max_gen_len": 6,
            "common.torch.num_threads": 1,
        },
        recipe="lm/generate",
    )
    run_recipe("lm/generate", generate_config, tmp_path / "generate", quiet=True)

    def read_texts(file: Path) -> list[str]:
        return [json.loads(line)["text"] for line in file.read_text().splitlines()]

    texts = read_texts(tmp_path / "generate" / "output" / "rank_0.jsonl")

    assert out == "".join(f"{text}\n" for text in texts)
    assert read_texts(tmp_path / "chat" / "output" / "chat.jsonl") == texts


def test_recipe_refuses_beam_search(pretrained_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="must be 'sampling' to chat"):
        _run_chat(
            pretrained_dir,
            tmp_path,
            {"seq_generator": {"name": "beam_search", "config": {"beam_size": 2}}},
        )
