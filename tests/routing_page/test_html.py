"""Tests of moxe_plugin/routing_page/html.py that need no browser."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from typing_extensions import override

from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.routing_page.html import render_page
from moxe_plugin.routing_page.view import create_view
from tests.routing_page.conftest import HOSTILE_TEXT, Read


class _Page(HTMLParser):
    """Collects tags, and the content of `style`, `script` and `#text`."""

    def __init__(self, html: str) -> None:
        super().__init__()

        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, str] = {}
        self._key = ""

        self.feed(html)
        self.close()

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

        if tag in ("style", "script"):
            self._key = dict(attrs).get("id") or tag
        elif dict(attrs).get("id") == "text":
            self._key = "text"

    @override
    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script", "div"):
            self._key = ""

    @override
    def handle_data(self, data: str) -> None:
        self.content[self._key] = self.content.get(self._key, "") + data


def _data(page: _Page) -> Any:
    return json.loads(page.content["data"])


def test_the_page_needs_nothing_else_and_allows_nothing_else(read: Read) -> None:
    page = _Page(render_page(read(HOSTILE_TEXT)))

    tags = {tag for tag, _ in page.tags}
    assert not tags & {"img", "iframe", "object", "base", "a"}

    sources = [
        attrs[k] for _, attrs in page.tags for k in ("src", "href") if k in attrs
    ]
    assert sources == ["data:,"]
    assert not re.search(r"url\(|@import", page.content["style"])

    (policy,) = (
        attrs["content"]
        for _, attrs in page.tags
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None

    for kind in ("style", "script"):
        digest = b64encode(hashlib.sha256(page.content[kind].encode()).digest())
        assert f"{kind}-src 'sha256-{digest.decode()}';" in policy

    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy

    # An attribute of a tag would need 'unsafe-inline'.
    assert not any("style" in attrs for _, attrs in page.tags)


def test_the_text_is_shown_as_it_is(read: Read) -> None:
    page = _Page(render_page(read(HOSTILE_TEXT)))

    shown = HOSTILE_TEXT
    for char in "\u2028\x00\r\u202e":
        shown = shown.replace(char, f"U+{ord(char):04X}")

    assert page.content["text"] == shown
    assert "49" not in page.content["text"]


def test_the_data_are_those_of_the_trace(read: Read) -> None:
    view = read("some text")
    page = _Page(render_page(view, layer_idx=1))
    data = _data(page)

    assert data["layer"] == 1
    assert data["ids"] == list(b"some text")
    assert data["nll"] == pytest.approx(view.trace.nll_nats.tolist(), abs=5.1e-5)
    assert data["experts"] == ["mLSTM 0", "mLSTM 1", "sLSTM 2", "sLSTM 3"]

    for shown, layer in zip(data["layers"], view.trace.layers, strict=True):
        assert layer.difficulty is not None
        assert shown["experts"] == layer.expert_indices.tolist()
        assert shown["difficulty"] == pytest.approx(
            layer.difficulty.tolist(), abs=5.1e-5
        )

        for key, tensor in (
            ("probs", layer.router_probs),
            ("unbiased", layer.unbiased_probs),
            ("weights", layer.expert_weights),
        ):
            flat = [value for row in shown[key] for value in row]
            assert flat == pytest.approx(tensor.flatten().tolist(), abs=5.1e-5)


def test_marks_and_colours_are_there_without_the_script(read: Read) -> None:
    view = read("some text")
    page = _Page(render_page(view, layer_idx=1))

    tokens = [attrs for _, attrs in page.tags if "data-i" in attrs]

    assert [t["data-mark"] for t in tokens] == view.marks(view.trace.layers[1])
    assert len({t["data-step"] for t in tokens}) > 2


def test_a_page_without_difficulty_or_groups_says_so(read: Read) -> None:
    html = render_page(read("some text", "tiny_ffn"))

    assert "predicts no difficulty" in html
    assert "form no groups" in html
    assert "mean difficulty</th>" not in html
    assert "mLSTM experts only" not in html

    assert _data(_Page(html))["numMlstm"] is None


def test_a_split_character_leaves_a_sign(read: Read) -> None:
    page = _Page(render_page(read("é")))

    assert page.content["text"] == "é"
    assert [a.get("class") for t, a in page.tags if t == "i"] == ["part"]


def test_the_same_view_gives_the_same_page(read: Read) -> None:
    assert render_page(read("some text")) == render_page(read("some text"))


def test_names_are_no_code(load_byte_model: Callable[[str], LoadedModel]) -> None:
    view = create_view(
        load_byte_model("tiny"),
        "a text",
        max_tokens=9,
        title=HOSTILE_TEXT,
        source=HOSTILE_TEXT,
    )

    plain = _Page(render_page(replace(view, title="a", source="b")))
    page = _Page(render_page(view))

    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
