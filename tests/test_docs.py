"""What the README, the site and the docstrings show is run, as a reader would run it."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch", reason="the examples show torch")

import torch

import fastrnn

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
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
LANGUAGES = ("python", "sh")  # what runs; other text is included from a file
RUNNERS = ("python", "torchrun")
MAKE = {page: [c for c in shown if c.startswith("make ")] for page, shown in COMMANDS.items()}
OURS = {page: [c for c in shown if c.startswith("fastrnn ")] for page, shown in COMMANDS.items()}
SCRIPTS = {page: [c for c in shown if c.split()[0] in RUNNERS] for page, shown in COMMANDS.items()}


def module_names() -> list[str]:
    """The package's modules; not the library without Python that lies beside them in a wheel."""
    names = [m.name for m in pkgutil.walk_packages(fastrnn.__path__, "fastrnn.")]
    return ["fastrnn", *(name for name in names if not name.startswith("fastrnn.lib"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_only_blocks_that_run(page: Path) -> None:
    """A block of another language, or none, would be shown but never tried."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    shown = {fence for fence in fences[::2] if not fence.startswith("{")}
    assert shown <= set(LANGUAGES)


@pytest.mark.parametrize("command", parameters(SCRIPTS))
def test_a_page_names_scripts_that_exist(command: str) -> None:
    named = [word for word in shlex.split(command) if word.endswith(".py")]
    assert named
    assert all((ROOT / name).exists() for name in named)


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


def attributes(of: object) -> set[str]:
    """The public attributes that torch.nn.Module does not have, reverse and later layers aside."""
    return {n for n in dir(of) if not n.startswith("_")} - set(dir(torch.nn.Module()))


def public_attributes() -> dict[str, set[str]]:
    every = {"layer_norm": True, "learn_initial_state": True}
    peepholes: dict[str, Any] = {"peephole": True, **every}
    objects: dict[str, object] = {
        "RNN": fastrnn.RNN(3, 4, **every),
        "LSTM": fastrnn.LSTM(3, 4, proj_size=2, **peepholes),
        "GRU": fastrnn.GRU(3, 4, **every),
        "RNNCell": fastrnn.RNNCell(3, 4),
        "LSTMCell": fastrnn.LSTMCell(3, 4),
        "GRUCell": fastrnn.GRUCell(3, 4),
        "Recurrent": fastrnn.Recurrent(torch.nn.GRUCell(3, 4)),
        "Stream": fastrnn.Stream(fastrnn.LSTM(3, 4)),
        "Tensor": fastrnn.Tensor,
        "gradient_flow": fastrnn.gradient_flow(fastrnn.LSTM(3, 4)),
    }
    return {"fastrnn": set(fastrnn.__all__), "functional": set(fastrnn.functional.__all__)} | {
        name: attributes(of) for name, of in objects.items()
    }


@pytest.mark.parametrize(("of", "names"), public_attributes().items(), ids=public_attributes())
def test_the_api_page_has_every_public_name(of: str, names: set[str]) -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    assert names - set(re.findall(r"\w+", code)) == set()


def messages() -> list[object]:
    """The messages that the page about errors quotes, but for those of Python and of torch."""
    rows = re.findall(r"^\| `(.+?)` ?(\(.*?\))?[^|]*\| (.*?) \|", TROUBLES, re.MULTILINE)
    return [message for message, _, means in rows if not re.match("Python|torch's own", means)]


TROUBLES = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
TROUBLES = TROUBLES[: TROUBLES.index("## Not an error")]


@functools.cache
def texts_of_the_package() -> str:
    """Every string of the package's Python, with … for what is formatted in, and its C++."""
    found = []
    for path in Path(fastrnn.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "csrc").rglob("*.cpp")]
    return "\n".join([*found, *sources])


@pytest.mark.parametrize("message", messages())
def test_a_message_that_the_page_quotes_is_one_of_the_package(message: str) -> None:
    text = texts_of_the_package()
    for part in message.split("…"):
        assert part.strip(" :()") in text


def test_the_gallery_shows_what_the_examples_make() -> None:
    """`make gallery` writes these files: one small picture and what it printed for each."""
    made = re.search(
        r"^GALLERY := (.*?)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL
    )
    assert made is not None
    pictures = set(re.findall(r"\w+\.(?:svg|png)", made[1]))
    names = {Path(picture).stem for picture in pictures}
    there = {path.name for path in (DOCS / "gallery").iterdir()}
    assert there == pictures | {f"{name}.txt" for name in names}
    without = {"common", "inductor"}  # these make no picture
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} - without == names
    for picture in pictures:
        assert (DOCS / "gallery" / picture).stat().st_size < 150_000
    for name in names:
        assert (DOCS / "gallery" / f"{name}.txt").read_text().endswith("ok\n")
        assert f"](gallery/{name}." in (DOCS / "gallery.md").read_text()


def test_the_pages_of_results_are_what_the_results_give() -> None:
    """`make benchmark-docs` would change nothing; of pictures, that they are there."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "pages.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
