"""The torch that the layers need: a version that is too old is refused when they are imported.

In torch 2.9 and older, torch.compile cannot trace the layers, and an array takes thirty times as
long to reach the engine, which has only ``__dlpack__`` to ask there.
"""

from __future__ import annotations

import re

OLDEST = (2, 10)


def check(version: str) -> None:
    """Refuse a torch older than `OLDEST`.

    Raises:
        ImportError: names the version found, the one needed, and what to do.
    """
    found = re.match(r"(\d+)\.(\d+)", version)  # also of 2.10.0a0+…, as some vendors name theirs
    if found is not None and (int(found[1]), int(found[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"fastrnn needs torch {oldest} or newer for its layers and for torch tensors, found "
            f"torch {version}. Upgrade torch (pip install --upgrade 'torch>={oldest}'); on NumPy "
            "arrays, fastrnn.functional and fastrnn.Stream work without any torch"
        )
