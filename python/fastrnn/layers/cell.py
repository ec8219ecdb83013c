"""`RecurrentCell`, the base of the cells: parameters, one step, pickles."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _C, _checks
from .._engine import NO_EXTRAS, Prepared
from .._options import (
    Cell,
    Options,
    Shape,
    check_bool,
    check_forget_bias,
    check_heads,
    make_options,
)
from ..calls import torch_route
from ..calls.call import cell_by_torch, recurrent
from . import autocast, onnx_export, random_masks, torch_tools
from .layer import COMMON_OPTIONS as OF_LAYERS
from .layer import OUTSIDE_THE_STEP, Device, initialize, restore_own_options
from .surface import DERIVED, Recognising, state_of

if TYPE_CHECKING:
    from typing_extensions import Self

COMMON_OPTIONS = {
    name: default
    for name, default in OF_LAYERS.items()
    if name not in ("recurrent_dropout", "recompute")
}


class RecurrentCell(torch_tools.SeenByTools, metaclass=Recognising):
    """The base of RNNCell, LSTMCell and GRUCell; it takes the arguments of torch.nn's RNNCellBase.

    A class of the user's right over it gets its weights from here and brings a forward of its own.
    """

    __constants__: ClassVar[list[str]] = ["input_size", "hidden_size", "bias"]

    _cell: ClassVar[Cell]
    # The options torch.nn does not have, each with the value that is torch.nn's behaviour.
    own_options: ClassVar[dict[str, Any]] = {}

    input_size: int
    hidden_size: int
    bias: bool
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    _weight_shapes: dict[str, Shape]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        num_chunks: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **own_options: Any,
    ) -> None:
        super().__init__()
        _checks.check_integers(input_size=input_size, hidden_size=hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        # Attributes too, for who reads them; a user's class may give these another meaning.
        self._own: dict[str, Any] = own_options
        for name, value in own_options.items():
            setattr(self, name, value)
        self._describe()
        check_heads(self._own.get("heads", 1), hidden_size=hidden_size)
        check_bool("learn_initial_state", self._own.get("learn_initial_state", False))
        check_forget_bias(self._own.get("forget_bias"), bool(bias))
        if not self._weight_shapes:
            rows = num_chunks * hidden_size
            self._weight_shapes = {
                "weight_ih": (rows, input_size),
                "weight_hh": (rows, hidden_size),
            }
            self._weight_shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (rows,))
        for name, shape in {**self._weight_shapes, **self._learned_shapes()}.items():
            if name.startswith("bias") and not bias:
                self.register_parameter(name, None)
            else:
                weight = Parameter(torch.empty([*map(int, shape)], device=device, dtype=dtype))
                self.register_parameter(name, weight)
        self.reset_parameters()

    def _describe(self) -> None:
        """Derive the options and the shapes of all weights, biases too, from the attributes."""
        self._options: Options | None = None
        self._prepared: Prepared | None = None
        self._weight_shapes = {}
        if not hasattr(type(self), "_cell"):  # a class of the user's right over this one
            return
        self._options = self._make_options()
        own = {name: self._own[name] for name in ("layer_norm", "heads")}
        whole = make_options(self._cell, peephole=self._own.get("peephole", False), **own)
        self._weight_shapes = whole.weight_shapes(self.input_size, self.hidden_size)
        self._prepare()

    def _prepare(self) -> None:
        """Bring the options into the engine's form; None where torch.nn refuses to run them."""
        self._prepared = None
        if self._options is not None:
            self._prepared = Prepared(self._options, self._flat_weights_names, cell=True)

    def _make_options(self) -> Options | None:
        return make_options(self._cell, bias=bool(self.bias), **self._maths())

    def _maths(self) -> dict[str, Any]:
        """The options that change the maths of a step."""
        return {n: v for n, v in self._own.items() if n not in OUTSIDE_THE_STEP}

    def _learned_shapes(self) -> dict[str, Shape]:
        """The parameters that `learn_initial_state` asks for."""
        if not self._own.get("learn_initial_state"):
            return {}
        names = ("h_0", "c_0") if self._cell == "LSTM" else ("h_0",)
        return dict.fromkeys(names, (1, self.hidden_size))

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√H, 1/√H), in the order of ``parameters()``.

        But gains of layer norm start at 1, ``norm_c_bias`` and learned initial states at 0, and the
        forget gate's part of ``bias_ih`` at ``forget_bias`` where one is given.
        """
        initialize(self)

    def extra_repr(self) -> str:
        """torch.nn's line, then the options torch.nn does not have, where they are on."""
        shown = [str(self.input_size), str(self.hidden_size)]
        if self.bias is not True:
            shown.append(f"bias={self.bias}")
        defaults = self.own_options
        if "nonlinearity" in self.__dict__:
            defaults = {"nonlinearity": "tanh", **defaults}
        for name, default in defaults.items():
            value = self._own[name] if name in self._own else getattr(self, name)
            if value != default:
                shown.append(f"{name}={value}")
        return ", ".join(shown)

    @property
    def _flat_weights_names(self) -> tuple[str, ...]:
        return self._names(bool(self.bias))

    def _names(self, bias: bool) -> tuple[str, ...]:
        """The names of the weights, in order."""
        return tuple(n for n in self._weight_shapes if bias or not n.startswith("bias"))

    def _thaw(self) -> None:
        if self._prepared is not None:
            self._prepared.frozen = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._thaw()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """As torch.nn's; training thaws a frozen cell."""
        if mode:
            self._thaw()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return state_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled cell, also one from before an own option existed."""
        own = {name: value for name, value in state.items() if name not in DERIVED}
        super().__setstate__(own)  # type: ignore[no-untyped-call]
        restore_own_options(self, state)
        self._describe()

    def _trains(self) -> bool:
        """Whether the cell is in training mode; it may have lost the attribute, as torch.nn's."""
        return getattr(self, "training", False)

    def _run(self, input: Tensor, given: Any) -> tuple[Any, ...]:
        """One step: the new states, each (B, H) or, for an unbatched input, (H,).

        Of a call that torch.fx traces, its proxy and, for an LSTM, None. ``given``: hx as the
        caller gave it.
        """
        learned = given is None and self._own["learn_initial_state"]
        own = self._prepared
        if own is not None and not learned and not torch.compiler.is_dynamo_compiling():
            by_cells = own.by_cells and (own.gradient_by_cells or not torch.is_grad_enabled())
            if by_cells and self.hidden_size:
                found: tuple[Any, ...] | None = _C.layer(
                    own,
                    own.engine,
                    own.frozen,
                    self._parameters,
                    own.names,
                    input,
                    given,
                    False,
                    True,
                )
                if found is not None:
                    return found
        x: Any = input
        batch = isinstance(x, Tensor) and x.dim() == 2
        hx = torch_tools.states_of(self._cell, given, "lstm_cell", *((2, 3) if batch else ()))
        if torch_tools.is_traced(input, hx):
            traced = torch_tools.call_whole(self, input, hx)
            return (traced, None) if self._cell == "LSTM" else (traced,)
        _checks.check_tensor("input", input)
        _checks.check_states(hx)
        _checks.check_cell_input(f"{self._cell}Cell", input, hx or ())
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
            hx = None if hx is None else tuple(state.unsqueeze(0) for state in hx)
        _checks.check_cell_sizes(input, hx or (), self.input_size, self.hidden_size, unbatched)
        if self._options is None:
            raise RuntimeError(f"Unknown nonlinearity: {getattr(self, 'nonlinearity', None)}")
        if learned:
            hx = self._learned_states(input.shape[0])
        hx_n = self._call(self._options, input, hx)
        return tuple(state.squeeze(0) for state in hx_n) if unbatched else hx_n

    def _learned_states(self, batch: int) -> tuple[Tensor, ...]:
        """h_0 and c_0 of this moment, once they fit, for every row."""
        shapes = self._learned_shapes()
        states = tuple(getattr(self, name) for name in shapes)
        _checks.check_weight_shapes(states, tuple(shapes), tuple(shapes.values()))
        return tuple(state.expand(batch, -1) for state in states)

    def _call(
        self, options: Options, input: Tensor, hx: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        """Call the engine, under autocast in the dtype that autocast asks for."""
        weights, options = self._weights(options)
        if self.hidden_size and cell_by_torch(options, input, hx, weights):
            if autocast.requested(input) is None:
                _checks.check_cell_companions(input, hx or (), weights, self._names(options.bias))
            return torch_route.cell(options, input, hx, weights)
        half = autocast.requested(input)
        wide = None
        if half is not None:
            wide = autocast.result_dtype(self._cell, half, input, hx, fused=False)
            input = autocast.cast(input, half)
            hx = None if hx is None else tuple(autocast.cast(state, half) for state in hx)
            weights = [autocast.cast(weight, half) for weight in weights]
        _checks.check_cell_companions(input, hx or (), weights, self._names(options.bias))
        if self.hidden_size == 0:
            hx_n = _of_no_units(input, hx, weights, options)
            return hx_n if wide is None else tuple(state.to(wide) for state in hx_n)
        if hx is not None:
            hx = tuple(state.unsqueeze(0) for state in hx)
        frozen = None if half is not None or self._prepared is None else self._prepared.frozen
        input, extras = input.unsqueeze(0), NO_EXTRAS
        if self._trains():
            extras = random_masks.draw(
                options, input, input.shape[1], self.hidden_size, dropout=0.0
            )
        run = onnx_export.route(recurrent)
        hx_n = run(options, input, hx, weights, extras=extras, frozen=frozen)[1]
        hx_n = tuple(torch_tools.without_first_axis(state) for state in hx_n)
        return hx_n if wide is None else tuple(state.to(wide) for state in hx_n)

    def _weights(self, options: Options) -> tuple[list[Tensor], Options]:
        """The weights of this moment, checked, and the options that go with them."""
        parameters: dict[str, Any] = self._parameters
        try:
            weights = [parameters[name] for name in self._weight_shapes]
        except KeyError:  # parametrized, weight norm, a replica: not a registered parameter
            weights = [getattr(self, name) for name in self._weight_shapes]
        bias_ih, bias_hh = weights[2:4]
        bias = bias_ih is not None or bias_hh is not None
        if bias != options.bias:
            options = dataclasses.replace(options, bias=bias)
        if not bias:
            del weights[2:4]
        elif bias_ih is None:  # where one bias was taken away, zeros stand for it
            weights[2] = torch.zeros_like(bias_hh)
        elif bias_hh is None:
            weights[3] = torch.zeros_like(bias_ih)
        names = self._names(bias)
        _checks.check_weight_shapes(weights, names, [self._weight_shapes[n] for n in names])
        return weights, options


def _of_no_units(
    input: Tensor, hx: tuple[Tensor, ...] | None, weights: list[Tensor], options: Options
) -> tuple[Tensor, ...]:
    """The new states (B, 0) of a cell without hidden units, with a graph back to its arguments."""
    weight_ih, weight_hh = weights[:2]
    bias_ih, bias_hh = weights[2:4] if options.bias else (None, None)
    zeros = input.new_zeros(input.shape[0], 0)
    h, *c = hx or (zeros, zeros)
    new = torch.nn.functional.linear(input, weight_ih, bias_ih)
    new = new + torch.nn.functional.linear(h, weight_hh.reshape(0, 0), bias_hh)
    return (new, new + c[0]) if options.cell == "LSTM" else (new,)
