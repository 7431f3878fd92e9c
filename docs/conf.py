"""Sphinx's configuration: `tox run -e docs` builds the pages."""

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

# One page a module, made anew by every build.
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
