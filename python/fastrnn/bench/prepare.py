"""A case prepared by a provider, and the preparation of a torch module.

A provider prepares a case once (copies weights, builds sessions, binds memory) and returns a
`Prepared`, of which only `run` is timed. Inference runs under `torch.inference_mode`; training is
forward and backward with gradients to the input, the states and all weights.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastrnn.bench.cases import Case, Pass
    from fastrnn.bench.data import Data


class UnsupportedError(Exception):
    """The provider cannot compute the case; the message says why."""


class MissingPeerError(Exception):
    """The peer is not installed; the message says how to install it."""


@dataclass
class Prepared:
    """A case ready to run."""

    run: Callable[[int], Any]  # computes with input number i
    results: Callable[[], dict[str, Tensor]]  # computes with input 0 and returns named results
    kernel: str = ""  # the route that ran
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around every block


class Provider(Protocol):
    name: ClassVar[str]
    version: str

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        """Raises UnsupportedError if the provider does not support the case or the pass."""


def require_package(package: str, install: str) -> None:
    """Raise MissingPeerError with the install command if `package` cannot be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingPeerError(f"{package} is not installed; to install it: {install}")


def make_layer(library: Any, case: Case, data: Data, **options: Any) -> torch.nn.Module:
    """The library's layer for the case, with the case's weights."""
    if case.cell == "RNN":
        options["nonlinearity"] = case.nonlinearity
    heads = (
        1 if library.__name__ == "fastrnn" else case.heads
    )  # torch's layer computes a single head
    layer: torch.nn.Module = getattr(library, case.cell)(
        case.I,
        case.H // heads,
        num_layers=case.layers,
        bidirectional=case.bidirectional,
        device=data.d_output.device,
        dtype=data.d_output.dtype,
        **options,
    )
    parameters = list(layer.parameters())
    # For the modules of by_hand, and for an ensemble, the surrounding module holds the weights.
    if [p.shape for p in parameters] == [w.shape for w in data.weights]:
        with torch.no_grad():
            for parameter, weight in zip(parameters, data.weights, strict=True):
                parameter.copy_(weight)
    return layer


STATES = ("h", "c", "n", "m")  # the names of a state's tensors; only an sLSTM has all


def prepare_layer(
    layer: torch.nn.Module,
    data: Data,
    pass_: Pass,
    call: dict[str, Tensor],
    parameters: Sequence[tuple[str, Tensor]] | None = None,
    *,
    compiled: bool = False,
) -> Prepared:
    """Prepare a torch module with the call of torch.nn's layers for one pass.

    `call` contains additional keyword arguments. By default the parameters are the module's own;
    their names are also the names of the results. `compiled`: call the module through
    ``torch.compile`` with its defaults.
    """
    training = pass_ == "training"
    layer.train(training).requires_grad_(training)
    if parameters is None:
        parameters = list(layer.named_parameters())
    states = [h.detach().requires_grad_(training) for h in data.hx]
    inputs = [x.detach().requires_grad_(training) for x in data.inputs]
    hx = states[0] if len(states) == 1 else tuple(states) or None
    shared = [*states, *(p for _, p in parameters)]
    called: Callable[..., Any] = torch.compile(layer) if compiled else layer

    def infer(i: int) -> Any:
        return called(inputs[i], hx, **call)

    def train(i: int) -> Sequence[Tensor]:
        output, _ = called(inputs[i], hx, **call)
        return torch.autograd.grad(output, [inputs[i], *shared], data.d_output)

    def outputs() -> dict[str, Tensor]:
        output, hx_n = infer(0)
        last = hx_n if isinstance(hx_n, tuple) else (hx_n,)
        finals = zip((f"{name}_n" for name in STATES), last, strict=False)
        return {"output": output, **dict(finals)}

    def inferred() -> dict[str, Tensor]:
        with torch.inference_mode():
            return outputs()

    def trained() -> dict[str, Tensor]:
        found = outputs()
        names = ["d_input", *(f"d_{name}0" for name, _ in zip(STATES, states, strict=False))]
        names += [f"d_{name}" for name, _ in parameters]
        output, *last = found.values()
        starts = [torch.ones_like(x) for x in last]
        if data.hx:
            starts = [h.expand_as(x) for h, x in zip(data.hx, last, strict=True)]
        wanted = [inputs[0], *shared]
        # Gradients from the output alone, as timed, and also from the output and the final states.
        with_last = torch.autograd.grad([output, *last], wanted, [data.d_output, *starts])
        return {
            **{name: x.detach() for name, x in found.items()},
            **dict(zip(names, train(0), strict=True)),
            **{f"{n} with d_h_n": d for n, d in zip(names, with_last, strict=True)},
        }

    if training:
        return Prepared(train, trained)
    return Prepared(infer, inferred, context=torch.inference_mode)
