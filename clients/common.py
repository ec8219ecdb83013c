"""What every script here shares: a package run with torch's layers and with fastrnn's, compared.

A script says how to build its model in both ways and what to run. `compare` runs both from the same
weights, checks that the numbers are equal and that each loads the other's state_dict, times both in
turn, and prints one line of JSON, which run.py collects.
"""

from __future__ import annotations

import json
import logging
import os
import random
import warnings
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench.prepare import Prepared
from fastrnn.bench.timing import HostClock, measure
from fastrnn.layers.cell import RecurrentCell
from fastrnn.layers.layer import RecurrentLayer
from fastrnn.layers.surface import is_a

if TYPE_CHECKING:
    from collections.abc import Callable

# Of timing, for inference and training each.
SECONDS = float(os.environ.get("CLIENTS_SECONDS", "6"))
OURS = (RecurrentLayer, RecurrentCell)
TORCHS = (nn.modules.rnn.RNNBase, nn.modules.rnn.RNNCellBase)  # bound before anything is patched

QUIET = {  # for a Trainer of Lightning
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

warnings.filterwarnings("ignore")  # of the packages, about themselves
logging.disable(logging.WARNING)


def compare(
    package: str,
    what: str,
    theirs: Callable[[], Any],
    ours: Callable[[], Any],
    *,
    switch: tuple[str, int] = ("`fastrnn.convert(model)`", 1),
    infer: Callable[[Any], Any] | None = None,
    train: Callable[[Any], Any] | None = None,
    module: Callable[[Any], nn.Module] = lambda model: model,
    own_layers: bool = False,
    state_dict: bool = True,
    tolerance: float = 1e-5,
) -> None:
    """Run a package with both kinds of layers, check and time them, and print the result.

    Arguments:
        package: the name of the installed distribution.
        what: what is run, for the table.
        theirs, ours: build the model with torch's layers and with fastrnn's. Both are called with
            the same seeds, `theirs` first.
        switch: what a user writes to switch, and how many lines that is, for the table.
        infer: runs a model without gradients and returns its numbers.
        train: trains a model. If it returns a loss with a gradient, that and the gradients of all
            parameters are compared. Otherwise the package itself has trained the model, and what
            `train` returns and the trained parameters are compared.
        module: the torch module inside what `theirs` and `ours` return.
        own_layers: the package has recurrent layers of its own in place of torch's.
        state_dict: the weights have the same names and layouts in both models.
        tolerance: the largest difference allowed, as a fraction of the largest value in the tensor.

    Raises:
        AssertionError: numbers differ by more than the tolerance, a state_dict does not load, or a
            model has layers of the wrong kind.
    """
    torch.set_num_threads(1)
    fastrnn.unpatch_torch()
    models = [seeded(theirs), seeded(ours)]
    modules = [module(model) for model in models]
    kinds = [(count(m, *TORCHS), count(m, *OURS)) for m in modules]
    result: dict[str, Any] = {"package": package, "version": version(package), "what": what}
    result |= {"switch": switch[0], "lines": switch[1], "layers": kinds[1][1]}
    expected = (0, 0) if own_layers else kinds[1][::-1]
    assert kinds[0] == expected, f"layers (torch's, fastrnn's): {kinds[0]}, not {expected}"
    assert kinds[1][0] == 0, "a recurrent layer is still torch's"
    assert kinds[1][1] > 0, "there is no recurrent layer"
    result |= {"state_dict": state_dict, "own_layers": own_layers}
    if state_dict:
        load_each_other(*modules)
    passes = {name: run for name, run in {"inference": infer, "training": train}.items() if run}
    calls = {
        name: [partial(one_pass, name, run, model, module, state_dict) for model in models]
        for name, run in passes.items()
    }
    before = weights_of(modules[1])
    for name, both in calls.items():
        apart = difference(*(numbers(seeded(call)) for call in both))
        assert apart <= tolerance, f"{name} differs by {apart:.1e}, more than {tolerance:g}"
        result[name] = {"difference": apart}
    if train and state_dict:
        assert learns(module(models[1]), before), "a recurrent layer does not learn"
    for name, both in calls.items():  # now, because training goes on from call to call
        result[name] |= timed(*both)
    print(json.dumps(result), flush=True)


def seeded(run: Callable[[], Any]) -> Any:
    """The result of a call that starts from fixed seeds."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the packages draw from this generator)
    torch.manual_seed(0)
    return run()


def count(module: nn.Module, *classes: type) -> int:
    return sum(is_a(m, *classes) for m in module.modules())


def weights_of(module: nn.Module) -> list[list[Tensor]]:
    """A copy of the weights of each of fastrnn's layers."""
    layers = [m for m in module.modules() if is_a(m, *OURS)]
    return [[p.detach().clone() for p in layer.parameters()] for layer in layers]


def learns(module: nn.Module, before: list[list[Tensor]]) -> bool:
    """Whether each of fastrnn's layers has a gradient that is not zero, or other weights."""
    layers = [m for m in module.modules() if is_a(m, *OURS)]
    return all(
        any((p.grad is not None and p.grad.any()) or not torch.equal(p, old) for p, old in pairs)
        for pairs in (
            zip(m.parameters(), w, strict=True) for m, w in zip(layers, before, strict=True)
        )
    )


def load_each_other(theirs: nn.Module, ours: nn.Module) -> None:
    """Load each state_dict into the other module, strictly; afterwards the weights are equal."""
    for one, other in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0)
        other.load_state_dict(one.state_dict(), strict=True)
        for name, value in one.state_dict().items():
            assert not isinstance(value, Tensor) or torch.equal(value, other.state_dict()[name])


def one_pass(
    name: str,
    run: Callable[[Any], Any],
    model: Any,
    module: Callable[[Any], nn.Module],
    weights: bool,
) -> Any:
    """The numbers of one pass of `compare`; with `weights` also gradients or weights, by name."""
    if name == "inference":
        with torch.no_grad():
            return run(model)
    module(model).zero_grad()
    result = run(model)
    parameters = dict(sorted(module(model).named_parameters())) if weights else {}
    if isinstance(result, Tensor) and result.requires_grad:
        result.backward()
        return result, {name: p.grad for name, p in parameters.items()}
    return result, parameters


def numbers(value: Any) -> list[Tensor]:
    """The arrays, tensors and floats inside a result, in order."""
    if isinstance(value, Tensor):
        return [value.detach().clone().double()]
    if isinstance(value, (np.ndarray, np.number, float)):
        return [torch.as_tensor(np.array(value, dtype=np.float64))]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in numbers(part)] if isinstance(value, (list, tuple)) else []


def difference(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The largest difference, as a fraction of the largest value in its tensor."""
    assert [x.shape for x in theirs] == [x.shape for x in ours], "the shapes differ"
    assert sum(x.numel() for x in theirs), "there is nothing to compare"
    assert all(x.isfinite().all() for x in theirs), "torch's numbers are not finite"
    scales = [x.abs().max().item() for x in theirs if x.numel()]
    apart = [(a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True) if a.numel()]
    least = 1e-3 * max(scales)  # so that what is zero but for rounding counts as zero
    return max(d / max(s, least, 1e-30) for d, s in zip(apart, scales, strict=True))


def timed(theirs: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, float]:
    """The median milliseconds of both, which run in turn."""
    both = {"torch_ms": theirs, "fastrnn_ms": ours}
    prepared = {name: Prepared(lambda _, run=run: run(), dict) for name, run in both.items()}
    times = measure(prepared, HostClock(), 1, SECONDS)
    return {name: round(time.median, 4) for name, time in times.items()}
