"""What the README, the site and the docstrings show is run, as a reader would run it."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch", reason="the examples show torch")

import fastrnn

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, the line it starts on."""

    language: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 2)
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def commands(page: Path) -> list[str]:
    """The command lines that a page shows, without comments."""
    lines = "\n".join(block.text for block in blocks(page, "sh")).splitlines()
    return [line for line in (re.sub(r"\s+#.*|^#.*", "", line).strip() for line in lines) if line]


def parameters(of: dict[Path, list[str]]) -> list[object]:
    return [
        pytest.param(item, id=f"{page.relative_to(ROOT)}: {item}")
        for page, items in of.items()
        for item in items
    ]


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]
COMMANDS = {page: commands(page) for page in PAGES}
MAKE = {page: [c for c in shown if c.startswith("make ")] for page, shown in COMMANDS.items()}
OURS = {page: [c for c in shown if c.startswith("fastrnn ")] for page, shown in COMMANDS.items()}


def module_names() -> list[str]:
    return ["fastrnn", *(m.name for m in pkgutil.walk_packages(fastrnn.__path__, "fastrnn."))]


def docstring_examples() -> list[object]:
    """Every docstring of the package that holds an example, as a test of its own."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = {
        test.name: test
        for name in module_names()
        if not name.endswith(("._C", ".__main__"))
        for test in finder.find(importlib.import_module(name))
        if test.examples
    }
    return [pytest.param(test, id=name) for name, test in sorted(examples.items())]


def run_blocks(page: Path) -> None:
    """The page's Python, from top to bottom, in one namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        tree = ast.parse(block.text, filename=str(page))
        ast.increment_lineno(tree, block.line - 1)  # a failure points into the page
        exec(compile(tree, str(page), "exec"), namespace)


# Of torch's exporter to ONNX, about itself.
ignores_exporter = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


@ignores_exporter
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_the_plan_that_a_page_shows_is_what_explain_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where it changes: put what the page prints into the file."""
    run_blocks(ROOT / "docs" / "own-cell.md")
    shown = (ROOT / "docs" / "own-cell-plan.txt").read_text(encoding="utf-8")
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("command", parameters(MAKE))
def test_a_page_names_make_targets_that_exist(command: str) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = [word for word in shlex.split(command)[1:] if "=" not in word]
    assert set(shown) <= set(targets)


@pytest.mark.parametrize("command", parameters(OURS))
def test_a_page_shows_command_lines_that_parse(command: str) -> None:
    """With --help at the end every option before it is read, and nothing is measured."""
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "fastrnn.cli", *arguments, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@ignores_exporter
@pytest.mark.parametrize("example", docstring_examples())
def test_a_docstring_example_runs(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failed = runner.run(example, out=report.append).failed
    assert not failed, "".join(report)


@pytest.mark.parametrize("name", sorted(set(fastrnn.__all__) - {"__version__"}))
def test_a_public_name_is_documented(name: str) -> None:
    assert (getattr(fastrnn, name).__doc__ or "").strip()


def test_the_pages_of_results_are_what_the_results_give() -> None:
    """`make benchmark-docs` would change nothing; of pictures, that they are there."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "pages.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
