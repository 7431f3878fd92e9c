"""Sphinx's configuration: `tox run -e docs` builds the pages."""

import re
import shutil
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "moxe_plugin"
author = "The moxe_plugin engineers"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
]

exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# One page a module; that of a module which is gone must go, too.
shutil.rmtree(Path(__file__).parent / "api" / "generated", ignore_errors=True)
autosummary_generate = True
autosummary_ignore_module_all = False
templates_path = ["templates"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Overridden methods of torch and fairseq2 are documented there.
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}

html_theme = "furo"
html_title = "moxe_plugin"

# Two modules may each have a class of one name; the nearest one is linked.
suppress_warnings = ["ref.python"]

# Browsers draw MathML themselves: the pages load nothing from elsewhere.
html_math_renderer = "mathml"


def setup(app: Any) -> None:
    """Add the renderer of equations.

    :param app: Sphinx.
    """
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))


def _visit_inline(writer: Any, node: Any) -> None:
    writer.body.append(convert(node.astext()))

    raise SkipNode


def _visit_block(writer: Any, node: Any) -> None:
    number = re.search(r"\\tag\{(.*?)\}", node.astext())
    formula = re.sub(r"\\tag\{.*?\}", "", node.astext())

    if number is not None:
        formula += rf"\qquad ({number[1]})"

    writer.body.append(f"<div>{convert(formula, display='block')}</div>")

    raise SkipNode
