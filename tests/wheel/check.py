"""Installs the wheels of a folder into clean environments and prints a table: `check.py dist`.

Each row is one process, which imports packages in the given order and runs fastrnn after each. It
holds as many OpenMP runtimes as the same imports without fastrnn, and one at least; the engine uses
one of them; its results on two threads are those on one thread, to the bit.

`no libgomp` hides the system's own file from the process (a mount namespace with an empty file over
it), as in a container that has none. That needs Linux and the rights to mount.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# The oldest NumPy that has wheels for a Python; at least what pyproject.toml asks for.
OLDEST_NUMPY = {
    "3.10": "1.23.0",
    "3.11": "1.23.2",
    "3.12": "1.26.0",
    "3.13": "2.1.0",
    "3.14": "2.3.2",
}
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """Packages beside fastrnn, and the orders in which processes import them."""

    packages: tuple[str, ...]
    orders: tuple[tuple[str, ...], ...]


ALONE = (("fastrnn",),)
SCIENCE = tuple(
    tuple(order.split())
    for order in ("fastrnn sklearn scipy", "sklearn scipy fastrnn", "scipy fastrnn sklearn")
)
LEARNING = tuple(
    tuple(order.split())
    for order in (
        "fastrnn torch",
        "torch fastrnn",
        "fastrnn sklearn scipy torch",
        "sklearn scipy torch fastrnn",
        "sklearn fastrnn torch",
        "torch scipy sklearn fastrnn",
    )
)


class CheckError(Exception):
    """A row is not as it should be."""


def environments(python: str, torch: str | None) -> list[Environment]:
    found = [
        Environment((f"numpy=={OLDEST_NUMPY[python]}",), ALONE),
        Environment(("numpy",), ALONE),
        Environment(("numpy", "scikit-learn", "scipy"), SCIENCE),
    ]
    if torch:
        found.append(Environment(("numpy", torch, "scikit-learn", "scipy"), LEARNING))
    return found


def command(*words: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [str(word) for word in words], check=False, capture_output=True, text=True, **options
    )
    if done.returncode != 0:
        raise CheckError(
            f"{' '.join(map(str, words))}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def system_runtime() -> Path | None:
    """The file of the system's libgomp, by the loader's own list."""
    listing = subprocess.run(["ldconfig", "-p"], check=False, capture_output=True, text=True).stdout
    found = re.search(r"libgomp\.so\.1 .*x86-64.* => (\S+)", listing) or re.search(
        r"libgomp\.so\.1 .* => (\S+)", listing
    )
    return Path(found.group(1)).resolve() if found else None


def run(python: Path, order: tuple[str, ...], threads: int, hidden: Path | None = None) -> Any:
    # Away from the source tree, so that the installed package is what is imported.
    words: list[str | Path] = [python, "-I", HERE / "program.py", *order]
    if hidden:
        script = 'mount --bind /dev/null "$0" && exec "$@"'
        words = ["unshare", "--mount", "sh", "-c", script, hidden, *words]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return json.loads(command(*words, env=env, cwd=tempfile.gettempdir()).splitlines()[-1])


def short(file: str) -> str:
    """A runtime's file, by the package that brought it."""
    path = Path(file)
    for part in path.parts:
        if part in ("torch", "scikit_learn.libs", "fastrnn.libs"):
            return part.removesuffix(".libs").replace("_", "-") + "'s"
    return "the system's"


def check_row(python: Path, order: tuple[str, ...], hidden: Path | None) -> list[str]:
    """One row of the table. Raises CheckError where something is not as it should be."""
    others = tuple(name for name in order if name != "fastrnn")
    mine = run(python, order, 2, hidden)
    before = run(python, others, 2, hidden)["runtimes"] if others else []
    single = run(python, order, 1, hidden)
    if mine["openmp"] not in mine["runtimes"]:
        raise CheckError(f"the engine uses {mine['openmp']}, not a loaded one: {mine}")
    if len(mine["runtimes"]) != max(1, len(before)):
        raise CheckError(f"{mine['runtimes']}, without fastrnn {before}")
    if len({*mine["results"], *single["results"]}) != 1:
        raise CheckError("other results on two threads than on one")
    if mine["tasks"] < 2 or mine["threads"] != 2:
        raise CheckError(f"two threads were asked for, {mine['threads']} used: {mine}")
    count = len(mine["runtimes"])
    beside = "" if count == 1 else f" ({len(before)} without fastrnn)"
    return [mine["numpy"], " ".join(order), f"{count}{beside}", short(mine["openmp"]), "the same"]


def check_wheel(wheel: Path, interpreter: str, options: argparse.Namespace) -> int:
    """Checks one wheel in all environments; the number of rows that failed."""
    version = command(
        interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"
    ).strip()
    wants_torch = version in options.torch_for.split()
    hidden = system_runtime() if options.hide else None
    failed = 0
    for environment in environments(version, options.torch if wants_torch else None):
        folder = Path(tempfile.mkdtemp(prefix="wheel-check-"))
        try:
            command(interpreter, "-m", "venv", folder)
            python = folder / "bin" / "python"
            names = " ".join(environment.packages)
            install = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
            command(*install, wheel, *environment.packages)
            for order in environment.orders:
                for file in [None, hidden] if hidden else [None]:
                    try:
                        row = check_row(python, order, file)
                    except CheckError as error:
                        failed += 1
                        row = ["?", " ".join(order), f"FAILED: {error}", "", ""]
                    system = (
                        "no libgomp" if file else "libgomp" if system_runtime() else "no libgomp"
                    )
                    print("|", " | ".join([version, system, *row]), "|", flush=True)
        except CheckError as error:
            failed += 1
            print(f"| {version} | could not install {names}: {error} |", flush=True)
        finally:
            shutil.rmtree(folder)
    return failed


def can_hide() -> bool:
    words = ["unshare", "--mount", "sh", "-c", "mount --bind /dev/null /dev/null"]
    return bool(shutil.which("unshare")) and subprocess.run(words, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("wheels", type=Path, help="the folder of the wheels")
    parser.add_argument(
        "--interpreters",
        nargs="+",
        help="the Pythons, as commands (default: pythonX.Y of each wheel)",
    )
    parser.add_argument("--torch", default=TORCH, help=f"the requirement (default {TORCH})")
    parser.add_argument(
        "--torch-for",
        default="3.11",
        help="the Pythons with which torch is checked, as '3.11 3.12'",
    )
    options = parser.parse_args()
    options.hide = can_hide()
    if not options.hide:
        print("the system's libgomp cannot be hidden here: no rows without it", file=sys.stderr)
    wheels = sorted(options.wheels.glob("fastrnn-*.whl"))
    if not wheels:
        print(f"no wheels in {options.wheels}: make wheel", file=sys.stderr)
        return 1
    given = {
        command(name, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])").strip(): name
        for name in options.interpreters or ()
    }
    columns = (
        "Python, system, NumPy, imports in order, runtimes in the process, used, bits by threads"
    )
    print("|", columns.replace(", ", " | "), "|\n|" + "---|" * 7)
    failed = 0
    for wheel in wheels:
        tag = wheel.name.split("-")[2]
        name = given.get(tag) or (f"python{tag[2]}.{tag[3:]}" if not given else None)
        if name and shutil.which(name):
            failed += check_wheel(wheel, name, options)
        else:
            print(f"| {tag} | no interpreter for {wheel.name} |")
    sizes = ", ".join(f"{w.name} {w.stat().st_size / 1e6:.2f} MB" for w in wheels)
    print(
        f"\n{sizes}\n{failed} rows failed"
        if failed
        else f"\n{sizes}\nall rows are as they should be"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
