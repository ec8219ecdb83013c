"""Per-sample gradients for Opacus, from all arguments and results of a layer or a cell.

Opacus registers two hooks on a module. One stores the positional inputs of each call; the other
computes, in backward, the per-sample gradients from these inputs and the gradient of the first
output. This works for modules with one input and one output. For fastrnn's layers it would lose the
gradients of h_n, c_n and the states, and fail for hx and lengths. So a layer or a cell replaces
Opacus' hooks by `_Calls`, which receives every argument and every gradient, and passes the
per-sample gradients to Opacus. This module does not import Opacus.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch.nn import Module


def forward_hook(hook: Any) -> _Calls | None:
    """The replacement of a forward hook of Opacus; None for any other hook."""
    return _Calls(hook) if _is_of_opacus(hook, "capture_activations_hook") else None


def backward_hook(module: Module, hook: Any) -> RemovableHandle | None:
    """Attach a backward hook of Opacus to the replaced forward hook; None for any other hook."""
    if not _is_of_opacus(getattr(hook, "func", None), "capture_backprops_hook"):
        return None
    owner = hook.func.__self__
    for calls in module._forward_hooks.values():
        if isinstance(calls, _Calls) and calls.capture_inputs.__self__ is owner:
            calls.capture_gradients = hook
            # It is removed with the forward hook, so this handle has nothing to remove.
            return RemovableHandle(OrderedDict())
    return None


def _is_of_opacus(hook: Any, name: str) -> bool:
    if getattr(hook, "__name__", None) != name:
        return False
    classes = type(getattr(hook, "__self__", None)).__mro__
    return any(cls.__module__.partition(".")[0] == "opacus" for cls in classes)


class _Calls:
    """The forward hook: it stores every call of the module until its backward.

    Arguments:
        capture_inputs: Opacus' forward hook.
    """

    def __init__(self, capture_inputs: Any) -> None:
        self.capture_inputs = capture_inputs
        self.capture_gradients: Any = None

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        call = _Call(module, args, kwargs)
        # From the tensor that it stores, Opacus only reads the number of samples.
        samples = torch.ones(call.batch, 1, device=call.device)
        kept = len(getattr(module, "activations", ()))
        self.capture_inputs(module, (self._laid_out(samples),), result)
        if len(getattr(module, "activations", ())) == kept:  # eval, no gradient, or disabled hooks
            return None
        _check_draws(module)
        packed = result[0] if isinstance(result[0], PackedSequence) else None
        parts = result if packed is None else (packed.data, *result[1:])
        leaves, tree = pytree.tree_flatten(parts)
        places = [i for i, y in enumerate(leaves) if isinstance(y, Tensor) and y.requires_grad]
        seen = _Seen.apply(  # type: ignore[no-untyped-call]
            partial(self._backward, module, call, places, samples), *(leaves[i] for i in places)
        )
        for i, y in zip(places, seen, strict=True):
            leaves[i] = y
        parts = pytree.tree_unflatten(leaves, tree)
        return parts if packed is None else (packed._replace(data=parts[0]), *parts[1:])

    def _laid_out(self, samples: Tensor) -> Tensor:
        """(B, 1), Opacus' layout of batches, or (1, B) if Opacus expects time first."""
        return samples if self.capture_gradients.keywords["batch_first"] else samples.t()

    def _backward(
        self,
        module: Any,
        call: _Call,
        places: list[int],
        samples: Tensor,
        gradients: tuple[Tensor | None, ...],
    ) -> None:
        cotangents = {i: d for i, d in zip(places, gradients, strict=True) if d is not None}
        found = call.gradients(cotangents)

        def of_samples(parameters: list[Tensor], _: Tensor, factors: Tensor) -> list[Any]:
            # The factors of the loss's reduction, which Opacus multiplies into the gradients.
            shaped = {n: factors.reshape(-1, *(1,) * (d.dim() - 1)) for n, d in found.items()}
            names = [name for name, _ in module.named_parameters()]
            return [found[n] * shaped[n].to(found[n]) if n in found else None for n in names]

        own = vars(module)
        kept = own.get("ft_compute_sample_grad")
        own["ft_compute_sample_grad"] = of_samples
        try:
            self.capture_gradients(module, (), (self._laid_out(samples),))
        finally:
            del own["ft_compute_sample_grad"]
            if kept is not None:
                own["ft_compute_sample_grad"] = kept


def _check_draws(module: Any) -> None:
    if not module.training:
        return
    own = module._options
    draws = {"zoneout": own.zoneout_h > 0 or own.zoneout_c > 0}
    if hasattr(module, "num_layers"):  # a layer, not a cell
        draws["dropout"] = module._drops()
        draws["recurrent_dropout"] = module._recurrent_dropout() > 0
    drawn = [f"{name}={getattr(module, name)}" for name, drawing in draws.items() if drawing]
    if not drawn:
        return
    raise RuntimeError(
        "per-sample gradients for Opacus compute a layer a second time, and then "
        f"{type(module).__name__} with {', '.join(drawn)} would draw other masks: set these to 0; "
        "in place of dropout put torch.nn.Dropout between layers of num_layers=1"
    )


class _Seen(torch.autograd.Function):
    """The identity; its backward passes the gradients of all outputs of a call to ``show``."""

    @staticmethod
    def forward(ctx: Any, show: Callable[[Any], None], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.show = show
        ctx.set_materialize_grads(False)
        return tuple(y.view_as(y) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.show(gradients)
        return (None, *gradients)


class _Axes(NamedTuple):
    """The axis of the samples in the arguments and results of a call."""

    arguments: dict[str, int]
    result: tuple[int, ...]  # for output, h_n, c_n, states.h, states.c, as far as they exist


def _axes(module: Any, input: Tensor, packed: bool) -> _Axes | None:
    """The axes; None if the call has one sample, without an axis for it."""
    if not isinstance(getattr(module, "num_layers", None), int):
        return None if input.dim() == 1 else _Axes({"input": 0, "hx": 0}, (0, 0))
    if input.dim() == 2:
        return None
    rows = 0 if module.batch_first and not packed else 1
    finals = (1, 1) if module._cell == "LSTM" else (1,)
    return _Axes({"input": rows, "hx": 1, "lengths": 0, "reset": rows}, (rows, *finals, 2, 2))


class _Call:
    """One call: its detached arguments, and everything needed to compute it again."""

    def __init__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given = {name: x for name, x in bound.items() if x is not None}
        self.module = module
        self.options = {"return_states": True} if given.pop("return_states", False) else {}
        self.packed: PackedSequence | None = None
        if isinstance(given["input"], PackedSequence):
            self.packed = given["input"]
            given["input"], given["lengths"] = pad_packed_sequence(given["input"])
        elif "lengths" in given:
            given["lengths"] = torch.as_tensor(given["lengths"])
        detached = partial(pytree.tree_map_only, Tensor, Tensor.detach)
        self.given: dict[str, Any] = detached(given)
        input = self.given["input"]
        self.device = input.device
        self.axes = _axes(module, input, self.packed is not None)
        self.batch = 1 if self.axes is None else int(input.shape[self.axes.arguments["input"]])
        self.autocast = None
        if torch.is_autocast_enabled(input.device.type):
            self.autocast = torch.get_autocast_dtype(input.device.type)

    def gradients(self, cotangents: dict[int, Tensor]) -> dict[str, Tensor]:
        """The per-sample gradients, (B, …), of every parameter that requires a gradient.

        Arguments:
            cotangents: the gradients of the call's results, by their index in `_Axes.result`.
        """
        wanted = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        if self.batch == 0 or not cotangents:
            return {name: p.new_zeros(self.batch, *p.shape) for name, p in wanted.items()}
        bare, places = _without_hooks(self.module), list(cotangents)

        def of_one(given: dict[str, Any], gradients: list[Tensor]) -> dict[str, Tensor]:
            """The gradients of one sample, without an axis for it."""

            def outputs(parameters: dict[str, Tensor]) -> list[Tensor]:
                again = torch.func.functional_call(bare, parameters, (), given | self.options)
                leaves = pytree.tree_leaves(again)
                return [leaves[i] for i in places]

            pull = torch.func.vjp(outputs, wanted)[1]
            found: dict[str, Tensor] = pull(gradients)[0]
            return found

        with self._under_autocast():
            if self.axes is None:
                found = of_one(self.given, list(cotangents.values()))
                return {name: d.unsqueeze(0) for name, d in found.items()}
            axes = self.axes.arguments
            mapped = torch.func.vmap(
                of_one,
                in_dims=(
                    {n: pytree.tree_map(lambda _, n=n: axes[n], x) for n, x in self.given.items()},
                    [self.axes.result[i] for i in places],
                ),
            )
            of_all: dict[str, Tensor] = mapped(
                self.given, [self._padded(i, d) for i, d in cotangents.items()]
            )
            return of_all

    def _under_autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def _padded(self, place: int, gradient: Tensor) -> Tensor:
        """A gradient with packed rows, (N, ·) or (L, N, ·), as (T, B, ·) or (L, T, B, ·)."""
        if self.packed is None or (self.axes and self.axes.result[place] == 1 and place > 0):
            return gradient

        def padded(rows: Tensor) -> Tensor:
            assert self.packed is not None
            return pad_packed_sequence(self.packed._replace(data=rows))[0]

        return padded(gradient) if place == 0 else torch.stack([padded(d) for d in gradient])


def _without_hooks(module: Module) -> Module:
    """A copy of the module with the same tensors and without hooks."""
    bare = type(module).__new__(type(module))
    own = vars(bare)
    own.update(vars(module))
    for name, value in vars(module).items():
        if name.endswith("hooks") and isinstance(value, dict):
            own[name] = OrderedDict()
    own["_parameters"] = dict(module._parameters)
    return bare
