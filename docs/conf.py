"""The documentation site: MyST pages, furo's theme, the API from the docstrings."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "fastrnn"
author = "The fastrnn authors"
project_copyright = "The fastrnn authors"
release = installed_version("fastrnn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fastrnn {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# fastrnn.functional says once, under this heading, what its functions share.
napoleon_custom_sections = [("Arguments of every function", "params_style")]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
