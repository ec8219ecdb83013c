"""Formulas as MathML, made when the site is built: a browser needs neither a script nor a network.

math-core converts LaTeX into MathML. The font, STIX Two Math, comes with the package ziamath and
becomes a file of the site, because many systems have no font for mathematics.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from math_core import LatexToMathML

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FONT = "STIXTwoMath-Regular.ttf"
LATEX = LatexToMathML()


def mathml(node: nodes.Node, display: bool) -> str:
    return LATEX.convert_with_local_state(node.astext(), displaystyle=display)


def visit_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node, display=False))
    raise nodes.SkipNode


def visit_displaymath(writer: Any, node: nodes.math_block) -> None:
    """A block that scrolls by itself where it is wider than the page."""
    writer.body.append(f'<div class="formula" tabindex="0">{mathml(node, display=True)}</div>\n')
    raise nodes.SkipNode


def copy_font(app: Sphinx) -> None:
    package = find_spec("ziamath")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the site's font needs ziamath: pip install '.[docs]'")
    target = Path(app.outdir, "_static")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(package.origin).parent / "fonts" / FONT, target)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("builder-inited", copy_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
