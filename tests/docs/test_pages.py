"""The pages as files: their links, and how their commands are found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import pages
from tests.docs.pages import ROOT, list_pages, read_blocks

_LINK = re.compile(
    r"\]\((?!https?:|#)([^)#]+)[^)]*\)|^\[[^]]+\]: (?!https?:)(\S+)$", re.M
)


@pytest.mark.parametrize("page", list_pages())
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    file = ROOT / page

    targets = [a or b for a, b in _LINK.findall(file.read_text(encoding="utf-8"))]

    assert [t for t in targets if not file.parent.joinpath(t).exists()] == []


def test_every_page_is_reached_from_the_first() -> None:
    index = ROOT.joinpath("docs", "index.md").read_text(encoding="utf-8")

    names = [page.removeprefix("docs/")[:-3] for page in list_pages()[1:]]

    assert [n for n in names if n != "index" and f"\n{n}\n" not in index] == []


def test_the_readme_is_short() -> None:
    text = ROOT.joinpath("README.md").read_text(encoding="utf-8")

    assert len(text.splitlines()) <= 120


def test_blocks_are_found_with_their_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)

    tmp_path.joinpath("page.md").write_text(
        "# Page\n\n```bash\nls\n```\n\n```json\n{}\n```\n\n"
        "```bash skip=gpu\nmoxe speed\n```\n```python\nprint()\n```\n"
    )

    blocks = read_blocks("page.md")

    assert [(b.place, b.mark) for b in blocks] == [
        ("page.md:3", None),
        ("page.md:11", "gpu"),
        ("page.md:14", None),
    ]
    assert blocks[2].code == "python - <<'END_OF_PYTHON'\nprint()\nEND_OF_PYTHON\n"


def test_a_mark_that_is_not_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)

    tmp_path.joinpath("page.md").write_text("```bash skip=lazy\nmoxe bench\n```\n")

    with pytest.raises(ValueError, match=r"page\.md:1: .* install, .* 'skip=lazy'"):
        read_blocks("page.md")
