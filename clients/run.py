"""Run real packages with torch's recurrent layers and with fastrnn's, and write the results.

    python clients/run.py                      every package (make clients)
    python clients/run.py darts_rnn encodec    these scripts; prints, and leaves the page as it is

Each requirements-GROUP.txt is a group of packages that can be installed together; its second line
names its scripts. A group has a virtual environment, build/clients-GROUP, which is kept until its
requirements change. Each script runs in a process of its own. Exit code 1 if one fails.

CLIENTS_PREFIX is a command that runs each script, for example `taskset -c 0`. The Python that runs
this needs pip and what builds fastrnn (scikit-build-core, pybind11, ninja).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import venv
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build"
PAGE = ROOT / "docs" / "tried-with.md"
TORCH = "2.13.0"
TIMEOUT = 900  # seconds of one script


class Group:
    """Packages that can be installed together, and the scripts that run them."""

    def __init__(self, requirements: Path) -> None:
        self.requirements = requirements
        self.name = requirements.stem.partition("-")[2]
        self.resolved = requirements.with_name(f"constraints-{self.name}.txt")
        self.scripts = re.findall(r"^# scripts: (.*)$", requirements.read_text(), re.MULTILINE)
        self.scripts = self.scripts[0].split()
        self.folder = BUILD / f"clients-{self.name}"
        self.python = self.folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    def install(self, wheel: Path) -> None:
        """Make the environment, torch first, unless it is there; then install the wheel."""
        stamp = self.folder / "requirements.txt"
        wanted = f"torch=={TORCH}\n{self.requirements.read_text()}{self.resolved.read_text()}"
        if not stamp.exists() or stamp.read_text() != wanted:
            print(f"installing {self.folder.relative_to(ROOT)}", flush=True)
            if not self.has_torch():  # one that is there stays, for example a build without CUDA
                venv.create(self.folder, with_pip=True)
                self.pip("install", f"torch=={TORCH}")
            seen = self.run("import torch; print(torch.__version__)")
            constraints = self.folder / "constraints.txt"
            constraints.write_text(f"torch=={seen}\n{self.resolved.read_text()}")
            self.pip("install", "-r", str(self.requirements), "-c", str(constraints))
            self.remove_extension_of_torchaudio()
            stamp.write_text(wanted)
        self.pip("install", str(wheel))
        self.pip("install", "--force-reinstall", "--no-deps", str(wheel))

    def has_torch(self) -> bool:
        return self.python.exists() and self.run("import torch; print(torch.__version__)") != ""

    def remove_extension_of_torchaudio(self) -> None:
        """PyPI's is linked to CUDA, and fails beside a torch without; its Python works alone."""
        if self.run("import torchaudio; print('loads')") != "loads":
            for library in self.folder.glob("**/site-packages/torchaudio/lib/*.so"):
                library.unlink()

    def pip(self, *arguments: str) -> None:
        subprocess.run([self.python, "-m", "pip", *arguments, "--quiet"], check=True)

    def run(self, code: str) -> str:
        command = [self.python, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def build_wheel() -> Path:
    """A wheel of this checkout, with compiled files of its own."""
    folder = BUILD / "clients-wheel"
    for old in folder.glob("*.whl"):
        old.unlink()
    options = [f"--config-settings=build-dir={folder}/build", f"--wheel-dir={folder}"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, *options, str(ROOT)], check=True, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_script(group: Group, script: str) -> list[dict[str, Any]]:
    """The results that a script printed; one with the key `error` if it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [str(group.python.absolute()), str(HERE / f"{script}.py")]
    scratch = BUILD / "clients-scratch"  # packages write logs and checkpoints where they run
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            [*os.environ.get("CLIENTS_PREFIX", "").split(), *command],
            capture_output=True, text=True, check=False,
            timeout=TIMEOUT, env=environment, cwd=scratch,
        )  # fmt: skip
        failed, lines, errors = done.returncode != 0, done.stdout.splitlines(), done.stderr
    except subprocess.TimeoutExpired:
        failed, lines, errors = True, [], f"took more than {TIMEOUT} s"
    results = [json.loads(line) for line in lines if line.startswith('{"package"')]
    if failed or not results:
        last = (errors.strip().splitlines() or ["it printed no result"])[-1]
        results.append({"script": script, "error": last})
    return [{"script": script, **result} for result in results]


def ratio(result: dict[str, Any], name: str) -> float | None:
    times = result.get(name)
    return times and times["torch_ms"] / times["fastrnn_ms"]


def row(result: dict[str, Any]) -> str:
    passes = [result[name] for name in ("inference", "training") if name in result]
    speeds = [ratio(result, name) for name in ("inference", "training")]
    loads = "both ways" if result["state_dict"] else "imported"
    cells = [
        f"{result['package']} {result['version']}",
        f"{result['what']} (`{result['script']}.py`)",
        f"{result['switch']}: {result['lines']}",
        f"{max(p['difference'] for p in passes):.1e}",
        loads,
        *("–" if speed is None else f"{speed:.2f}" for speed in speeds),
    ]
    return f"| {' | '.join(cells)} |"


def page(results: list[dict[str, Any]]) -> str:
    """The page for docs/, from the results of all scripts: page.md with the table filled in."""
    good = [r for r in results if "error" not in r]
    bad = [f"- `{r['script']}.py` failed: {r['error']}" for r in results if "error" in r]
    rows = map(row, sorted(good, key=lambda r: (r["package"].lower(), r["lines"])))
    return (
        (HERE / "page.md")
        .read_text(encoding="utf-8")
        .format(
            rows="\n".join(rows),
            failures="\n".join(["", *bad]) if bad else "",
            means=means(good),
            machine=machine(),
            torch=TORCH,
            day=date.today().isoformat(),
        )
    )


def means(results: list[dict[str, Any]]) -> str:
    """Of the packages that have torch's layers, switched with one line."""
    compared = [r for r in results if r["lines"] == 1 and not r["own_layers"]]
    found = {}
    for name in ("inference", "training"):
        found[name] = [s for s in (ratio(r, name) for r in compared) if s]
    return "; ".join(
        f"{name} {statistics.geometric_mean(speeds):.2f}, least {min(speeds):.2f}"
        for name, speeds in found.items()
        if speeds
    )


def machine() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"model name\s*: (.*)", text)[1].strip()
    except (OSError, TypeError):
        import platform

        return platform.processor() or platform.machine()


def main() -> int:
    groups = [Group(path) for path in sorted(HERE.glob("requirements-*.txt"))]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scripts", nargs="*", help="scripts to run; default: all")
    parser.add_argument("--wheel", type=Path, help="a wheel of fastrnn, instead of building one")
    parser.add_argument("--install-only", action="store_true", help="make the environments")
    options = parser.parse_args()
    known = [script for group in groups for script in group.scripts]
    unknown = [script for script in options.scripts if script not in known]
    if unknown:
        parser.error(f"no such script: {', '.join(unknown)}; there are {', '.join(known)}")
    wheel = (options.wheel or build_wheel()).absolute()
    results: list[dict[str, Any]] = []
    for group in groups:
        scripts = [s for s in group.scripts if not options.scripts or s in options.scripts]
        if scripts:
            group.install(wheel)
        for script in [] if options.install_only else scripts:
            print(f"{script} …", flush=True)
            results += run_script(group, script)
            print(results[-1].get("error") or row(results[-1]), flush=True)
    if results and not options.scripts:
        PAGE.write_text(page(results), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
