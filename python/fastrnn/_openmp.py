"""The OpenMP runtimes that installed packages bring along: the engine uses one that the process has
or is about to have, so that there is one pool of threads (csrc/cpu/openmp.h chooses)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

# By package: the folder of its runtime, seen from the package's own.
FOLDERS = {"torch": "lib", "sklearn": "../scikit_learn.libs"}


def candidates() -> list[str]:
    """The runtimes that torch and scikit-learn load when they are imported, torch's first.

    Imports neither of them. Empty where neither is installed, or where they use the system's.
    """
    files = []
    for package, folder in FOLDERS.items():
        for location in _locations(package):
            found = (Path(location) / folder).glob("libgomp*.so*")
            files += sorted(str(file.resolve()) for file in found)
    return files


def _locations(package: str) -> list[str]:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # ValueError: something else stands in sys.modules
        return []
    return list(spec.submodule_search_locations or ()) if spec else []
