"""Tests of moxe_plugin/routing_page/terminal.py."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from moxe_plugin.routing_page.colours import scale_steps, step_of
from moxe_plugin.routing_page.terminal import print_view
from tests.routing_page.conftest import HOSTILE_TEXT, Read


def _print(read: Read, text: str, arch: str = "tiny", *, layer: int = 0) -> str:
    stream = StringIO()
    print_view(read(text, arch), layer, Console(file=stream, width=60))

    return stream.getvalue()


def test_plain_output_has_marks_and_steps_below_the_text(read: Read) -> None:
    text = "a text"
    view = read(text)
    layer = view.trace.layers[1]
    colouring = view.colourings()[0]

    lines = _print(read, text, layer=1).splitlines()
    begin = lines.index(text)

    # One byte, one token, one column.
    signs = {"m": "m", "s": "s", "ms": "+"}
    assert lines[begin + 1] == "".join(signs[m] for m in view.marks(layer))
    assert lines[begin + 2] == "".join(
        str(step_of(v, colouring.low, colouring.high))
        for v in colouring.values[1].tolist()
    )

    assert lines[0] == "a/tiny, step 7, layer 1 of 2 (from 0)"
    assert "predicted difficulty" in lines[1] + lines[2]
    assert f"mean loss {view.trace.nll_nats.mean():.4f} nats per token" in lines


def test_every_layer_has_a_line(read: Read) -> None:
    view = read("a text")
    lines = _print(read, "a text").splitlines()

    for idx, layer in enumerate(view.trace.layers):
        summary = view.summarize(layer)
        assert any(
            line.split()[:2] == [str(idx), f"{summary.mlstm_share:.0%}"]
            for line in lines
        )


def test_a_terminal_shows_the_colours(read: Read) -> None:
    stream = StringIO()
    console = Console(
        file=stream, width=60, force_terminal=True, color_system="truecolor"
    )
    print_view(read("a text"), 0, console)

    backgrounds = [
        "48;2;{};{};{}".format(*(int(s.fill[i : i + 2], 16) for i in (1, 3, 5)))
        for s in scale_steps()
    ]
    assert sum(b in stream.getvalue() for b in backgrounds) >= 3
    assert "\x1b[" not in _print(read, "a text")


def test_signs_stand_below_wide_characters(read: Read) -> None:
    lines = _print(read, "日x").splitlines()
    begin = lines.index("日▫▫x")

    # Two columns, then one for each other token.
    assert lines[begin + 2][1] == " "
    assert len(lines[begin + 2]) == 5


def test_hostile_text_does_not_reach_the_terminal(read: Read) -> None:
    assert "⟨U+001B⟩[31m[red]" in _print(read, "\x1b[31m[red]").splitlines()

    output = _print(read, HOSTILE_TEXT)

    assert all(c.isprintable() or c == "\n" for c in output)


def test_without_groups_there_are_no_marks(read: Read) -> None:
    lines = _print(read, "a text", "tiny_ffn").splitlines()
    begin = lines.index("a text")

    assert lines[begin + 1].isdigit()
    assert not any("mLSTM" in line for line in lines)
