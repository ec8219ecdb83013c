"""Record the norms of the states' gradients over the steps of recurrent layers.

While a flow is open, the layers of its model use the composed route (`composed.py`), which passes
each new state to a callback. A hook on the state then receives its whole gradient during backward.
Hooks on the layers tell which layer a state belongs to. When no flow is open, there are no hooks.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._checks import check_model
from ..calls import composed
from ..layers.cell import RecurrentCell
from ..layers.layer import RecurrentLayer
from ..layers.surface import is_a

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.nn import Module

VANISHING, EXPLODING = 1e-3, 1e3  # vanishing: the ratio is below; exploding: it is above


class Summary(NamedTuple):
    """The summary of one curve of norms."""

    steps: int
    first: float  # the norm at the first step
    last: float  # the norm at the last step
    entering: float  # the norm of the gradient of the layer's outputs (of its last call)
    ratio: float  # the norm at the step where backward ends, divided by entering
    verdict: str  # "vanishing", "exploding", "steady" or "no gradient"


def gradient_flow(model: Module) -> GradientFlow:
    """Record the norm of the gradient of each recurrent layer's states, step by step.

    It shows why a model does not learn long-range dependencies: over the steps of backpropagation
    through time the gradient vanishes or explodes (Pascanu et al. 2013). For each step t it records
    the Frobenius norm of the whole gradient ∂loss/∂h_t, for an LSTM also of ∂loss/∂c_t. The whole
    gradient is the sum of the contributions of the output, of the layer above and of step t+1; the
    norm is over all rows of the batch and all layers of the stack.

    The forward pass must run inside the ``with`` block. Backward may run after the block, except
    with ``torch.utils.checkpoint``, which runs forward again. Inside the block layers and cells run
    in plain torch operations, so that each state has its gradient. The results are the same up to
    rounding, with the same dropout masks, but the calls are slower, and compiled models run without
    compilation. Outside the block nothing changes. If a layer or cell is called several times
    before one backward, the curves of its calls are concatenated. Calls without a gradient and
    calls under ``torch.func`` are not recorded.

    Arguments:
        model: a module that contains fastrnn's layers or cells, or one of them. Layers of torch.nn
            are not recorded; `convert` converts them.

    Returns:
        A context manager:

        - ``flow.norms``: the norms of the last backward pass, ``{name: norms}``, norms float64
          (T,). A name consists of the layer's path in the model (for the model itself its class
          name), ``.h`` or ``.c``, and ``_reverse`` for the backward direction.
        - ``flow.passes``: the norms of every backward pass, in order.
        - ``flow.summary``: for each name the norm at the first and at the last step, and the norm
          of the gradient that entered the layer through its outputs; the ratio of the norm at the
          step where backward ends (the first step; in reverse the last) to the norm that entered;
          and the verdict: vanishing (ratio below 1/1000), exploding (above 1000) or steady.
        - ``flow.table()``: the summary as text.
        - ``flow.plot(path)``: a plot of the norms, written to a file.
        - ``flow.log(writer, step)``: the summary and the plot for TensorBoard.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: the model contains no layer or cell of fastrnn.

    >>> import torch, fastrnn
    >>> layer = fastrnn.RNN(3, 4)
    >>> with fastrnn.gradient_flow(layer) as flow:
    ...     layer(torch.randn(100, 2, 3))[0][-1].sum().backward()
    >>> flow.norms["RNN.h"].shape, flow.summary["RNN.h"].verdict
    (torch.Size([100]), 'vanishing')
    """
    check_model(model)
    return GradientFlow(model)


class GradientFlow:
    """The context manager that `gradient_flow` returns."""

    def __init__(self, model: Module) -> None:
        self._names: dict[Module, str] = {
            module: path or type(module).__name__
            for path, module in model.named_modules()
            if is_a(module, RecurrentLayer, RecurrentCell)
        }
        if not self._names:
            raise ValueError(
                "model must contain a recurrent layer or cell of fastrnn (fastrnn.convert converts "
                f"torch.nn's), got {type(model).__name__} without one"
            )
        self._open: ExitStack | None = None
        self._calls = 0
        self._passes: list[dict[_Call, _Seen]] = []
        self._task = -1  # the id of the backward pass of the last entry

    def __enter__(self) -> GradientFlow:
        if self._open is not None:
            raise RuntimeError(
                "this gradient_flow is open already: call fastrnn.gradient_flow again for a "
                "second with block"
            )
        self._open = ExitStack()
        for module in self._names:
            before = module.register_forward_pre_hook(_Hook(self._before))
            after = module.register_forward_hook(_Hook(self._after), always_call=True)
            self._open.callback(before.remove)
            self._open.callback(after.remove)
        # Compiled code would not run the hooks.
        self._open.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None
        self._unwatch()

    # ---- recording ----------------------------------------------------------------------------

    def _before(self, module: Module, args: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return
        if torch.is_grad_enabled():
            self._calls += 1
            call = _Call(self, self._names[module], self._calls)
            composed.watchers.set((*composed.watchers.get(), call))

    def _after(self, module: Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            for call in self._unwatch():
                call.leave(output)

    def _unwatch(self) -> list[_Call]:
        watchers = composed.watchers.get()
        own = [w for w in watchers if isinstance(w, _Call) and w.flow is self]
        composed.watchers.set(tuple(w for w in watchers if w not in own))
        return own

    def _this_pass(self) -> dict[_Call, _Seen]:
        """The gradients recorded in the current backward pass."""
        task = torch._C._current_graph_task_id()
        if not self._passes or task != self._task:
            self._passes.append({})
            self._task = task
        return self._passes[-1]

    # ---- results ------------------------------------------------------------------------------

    @property
    def passes(self) -> list[dict[str, Tensor]]:
        """The norms of every backward pass so far."""
        return [_curves(seen) for seen in self._passes]

    @property
    def norms(self) -> dict[str, Tensor]:
        """The norms of the last backward pass; empty if there was none."""
        return _curves(self._passes[-1]) if self._passes else {}

    @property
    def summary(self) -> dict[str, Summary]:
        """The summary of the last backward pass."""
        if not self._passes:
            return {}
        entering = _entering(self._passes[-1])
        return {
            name: _summary(name, norms, entering.get(name.rpartition(".")[0], 0.0))
            for name, norms in self.norms.items()
        }

    def table(self) -> str:
        """The summary as a plain-text table, with one line for each layer, state and direction."""
        rows = [["state", "steps", "first step", "last step", "entering", "ratio", "verdict"]]
        for name, found in self._recorded().items():
            numbers = [f"{x:.2e}" for x in found[1:5]]
            rows.append([name, str(found.steps), *numbers, found.verdict])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *middle, verdict in rows:
            cells = [text.rjust(width) for text, width in zip(middle, widths[1:], strict=False)]
            lines.append("  ".join([name.ljust(widths[0]), *cells, verdict]))
        return "\n".join(lines)

    def figure(self) -> Figure:
        """A matplotlib figure of the norms over the steps, on a logarithmic scale."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plotting a gradient flow needs matplotlib: pip install matplotlib",
                name=error.name,
            ) from error
        self._recorded()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, norms in self.norms.items():
            seen = norms.where(norms > 0, math.nan)  # a logarithmic scale has no zero
            marker = "." if len(norms) <= 30 else None
            style = "--" if name.endswith("_reverse") else "-"
            axes.plot(seen.numpy(), style, marker=marker, label=name)
        axes.set(yscale="log", xlabel="step", ylabel="norm of the gradient", title="Gradient flow")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a plot of the norms over the steps: PNG, or the format of the path's suffix."""
        self.figure().savefig(path, dpi=130)

    def log(self, writer: Any, step: int | None = None, *, figure: bool = True) -> None:
        """Write the last backward pass to TensorBoard.

        Arguments:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or an object with ``add_scalar``
                and ``add_figure``.
            step: the global step.
            figure: whether to also write the plot, which takes a tenth of a second.
        """
        for name, found in self._recorded().items():
            for quantity in ("first", "last", "entering", "ratio"):
                value = getattr(found, quantity)
                writer.add_scalar(f"gradient_flow/{name}/{quantity}", value, step)
        if figure:
            writer.add_figure("gradient_flow", self.figure(), step)

    def _recorded(self) -> dict[str, Summary]:
        found = self.summary
        if not found:
            raise RuntimeError(
                "no gradient has been recorded: run the model inside the with block, then call "
                "backward"
            )
        return found


class _Hook:
    """A hook of a layer; a copied or pickled layer gets one that does nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> None:
        self.call(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*arguments: Any) -> None:
    pass


class _Seen:
    """The norms that one backward pass has recorded for one call."""

    def __init__(self) -> None:
        self.entering: list[Tensor] = []  # one norm for each output of the layer
        self.states: dict[tuple[str, int], list[Tensor]] = {}  # by kind and step, one per layer


class _Call:
    """One call of a layer: it receives the states in forward and their gradients in backward."""

    def __init__(self, flow: GradientFlow, name: str, number: int) -> None:
        self.flow = flow
        self.name = name
        self.number = number
        self.steps = 0
        self.kinds: dict[str, None] = {}

    def __call__(self, step: int, state: tuple[Tensor, ...], reverse: bool) -> None:
        self.steps = max(self.steps, step + 1)
        for kind, x in zip("hc", state, strict=False):
            if x.requires_grad:
                kind += "_reverse" if reverse else ""
                self.kinds[kind] = None
                x.register_hook(partial(self.see, kind, step))  # type: ignore[no-untyped-call]

    def leave(self, output: Any) -> None:
        """At the end of the call: record the gradient of its outputs."""
        if isinstance(output, torch.Tensor):
            if output.requires_grad:
                output.register_hook(self.see_entering)  # type: ignore[no-untyped-call]
        elif isinstance(output, tuple | list):
            for part in output:
                self.leave(part)

    def see(self, kind: str, step: int, gradient: Tensor) -> None:
        self.seen().states.setdefault((kind, step), []).append(_norm(gradient))

    def see_entering(self, gradient: Tensor) -> None:
        self.seen().entering.append(_norm(gradient))

    def seen(self) -> _Seen:
        return self.flow._this_pass().setdefault(self, _Seen())


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient.detach().abs(), dtype=torch.float64)
    return norm


def _curves(calls: dict[_Call, _Seen]) -> dict[str, Tensor]:
    """The norms of each layer and kind; the curves of several calls are concatenated."""
    curves: dict[str, list[Tensor]] = {}
    for call in sorted(calls, key=lambda call: call.number):
        for kind in call.kinds:
            curve = torch.zeros(call.steps, dtype=torch.float64)
            for step in range(call.steps):
                norms = calls[call].states.get((kind, step))
                if norms is not None:
                    curve[step] = torch.linalg.vector_norm(torch.stack(norms))
            curves.setdefault(f"{call.name}.{kind}", []).append(curve)
    return {name: torch.cat(parts) for name, parts in curves.items()}


def _entering(calls: dict[_Call, _Seen]) -> dict[str, float]:
    """The norm of the gradient that entered each layer, at its last call with such a gradient."""
    return {
        call.name: float(torch.linalg.vector_norm(torch.stack(calls[call].entering)))
        for call in sorted(calls, key=lambda call: call.number)
        if calls[call].entering
    }


def _summary(name: str, norms: Tensor, entering: float) -> Summary:
    far = norms[-1] if name.endswith("_reverse") else norms[0]
    ratio = float(far) / entering if entering else math.nan
    if not entering:
        verdict = "no gradient"
    elif ratio < VANISHING:
        verdict = "vanishing"
    elif ratio <= EXPLODING:
        verdict = "steady"
    else:  # also if the ratio is NaN, because both norms have overflowed
        verdict = "exploding"
    return Summary(len(norms), float(norms[0]), float(norms[-1]), entering, ratio, verdict)
