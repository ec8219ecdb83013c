"""The documentation site: MyST pages, furo's theme, the API from the docstrings."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "fastrnn"
author = "The fastrnn authors"
project_copyright = "The fastrnn authors"
release = installed_version("fastrnn")

extensions = ["mathml", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
exclude_patterns = ["_build", "gallery", "README.md"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "furo"
html_title = f"fastrnn {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# fastrnn.functional says once, under this heading, what its functions share.
napoleon_custom_sections = [("Arguments of every function", "params_style")]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
