"""Sphinx configuration: the pages of this folder, the docstrings, and what is made at build time (see pages.py).

sphinx-build -W --keep-going docs docs/_build
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pages  # noqa: E402

import lowrank  # noqa: E402

project, author, copyright = "lowrank", "the lowrank developers", "2026, the lowrank developers"
version = release = lowrank.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results"]
suppress_warnings = ["config.cache"]

numpydoc_show_class_members = False
numpydoc_xref_param_type = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes and dtypes
default_role = "literal"
smartquotes = False  # which would make one dash of the two of an option

html_theme = "furo"
html_title = f"lowrank {version}"


def setup(app):
    app.connect("builder-inited", lambda _: pages.write(HERE))
