"""`program.py NAME…` imports packages in this order, uses each, and prints what the process then
holds as JSON: check.py and test_openmp.py run it. `fastrnn` is an LSTM forward and backward.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def run_fastrnn() -> str:
    import numpy as np

    from fastrnn import functional

    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 16, 128))
    weights = [rng.normal(size=shape) / 12 for shape in [(512, 128), (512, 128), 512, 512]]
    output, hx_n, saved = functional.lstm(x, None, weights, return_saved=True)
    gradients = functional.lstm_backward(np.ones(output.shape), None, saved)
    arrays = [output, *hx_n, gradients[0], *gradients[2]]
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()


def run_torch() -> None:
    torch: Any = importlib.import_module("torch")
    (torch.ones(500, 500) @ torch.ones(500, 500) + 1).sum()
    if "fastrnn" in sys.modules:
        fastrnn = importlib.import_module("fastrnn")
        torch.manual_seed(0)
        theirs = torch.nn.LSTM(64, 128)
        ours = fastrnn.convert(theirs)
        x = torch.randn(20, 16, 64)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def run_sklearn() -> None:
    import numpy as np

    loss: Any = importlib.import_module("sklearn.ensemble").HistGradientBoostingRegressor
    x = np.random.default_rng(0).normal(size=(1000, 4))
    loss(max_iter=2).fit(x, x[:, 0])


def run_scipy() -> None:
    import numpy as np

    importlib.import_module("scipy.linalg").lu_factor(np.eye(100))


RUN = {"torch": run_torch, "sklearn": run_sklearn, "scipy": run_scipy}


def loaded_runtimes() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp")))


def main(names: list[str]) -> None:
    known: dict[str, Any] = {"results": []}
    for name in names:
        if name == "fastrnn":
            known["results"].append(run_fastrnn())
        else:
            RUN[name]()
    if "fastrnn" in names:
        known["results"].append(run_fastrnn())  # beside all that was imported
        fastrnn = importlib.import_module("fastrnn")
        engine = importlib.import_module("fastrnn._C")
        known |= {"openmp": os.path.realpath(engine.openmp_file()), "version": fastrnn.__version__}
        known["threads"] = engine.max_threads()
    known["runtimes"] = loaded_runtimes()
    known["tasks"] = len(os.listdir("/proc/self/task"))  # noqa: PTH208 - names alone
    known["numpy"] = importlib.import_module("numpy").__version__
    print(json.dumps(known))


if __name__ == "__main__":
    main(sys.argv[1:])
