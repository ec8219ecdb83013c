"""The cells: one step of a layer of one layer and one direction.

Two of the layers' options are not here. ``recurrent_dropout`` draws one mask for a whole sequence,
and a cell does not know where a sequence begins: its caller multiplies h by a mask of his own.
``recompute`` spares what a layer keeps of all its steps; a cell keeps one step, in the graph of its
caller, who has torch.utils.checkpoint for that.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from . import _autocast, _checks, _inference, _masks
from ._engine import NO_EXTRAS
from ._layer import COMMON_OPTIONS, OUTSIDE_THE_STEP, Device, initialize
from ._options import (
    Activation,
    Cell,
    Options,
    Shape,
    check_bool,
    check_forget_bias,
    check_heads,
    make_options,
)
from .functional import recurrent

_COMMON_OPTIONS = {
    name: default
    for name, default in COMMON_OPTIONS.items()
    if name not in ("recurrent_dropout", "recompute")
}


class RecurrentCell(Module):
    """The base of RNNCell, LSTMCell and GRUCell; not made to be used by itself."""

    __constants__: ClassVar[list[str]] = ["input_size", "hidden_size", "bias"]

    cell: ClassVar[Cell]
    # The options torch.nn does not have, each with the value that is torch.nn's behaviour.
    own_options: ClassVar[dict[str, Any]] = _COMMON_OPTIONS

    input_size: int
    hidden_size: int
    bias: bool
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    heads: int
    learn_initial_state: bool
    forget_bias: float | None = None  # of an LSTM it may be another

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Device,
        dtype: torch.dtype | None,
        **own_options: Any,
    ) -> None:
        super().__init__()
        _checks.check_integers(input_size=input_size, hidden_size=hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        for name, value in own_options.items():
            setattr(self, name, value)
        self._describe()
        check_heads(self.heads, hidden_size=hidden_size)
        check_bool("learn_initial_state", self.learn_initial_state)
        check_forget_bias(self.forget_bias, bool(bias))
        for name, shape in {**self._weight_shapes, **self._learned_shapes()}.items():
            if name.startswith("bias") and not bias:
                self.register_parameter(name, None)
            else:
                weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name, weight)
        self.reset_parameters()

    def _describe(self) -> None:
        """Derive the options and the shapes of all weights, biases too, from the attributes."""
        self._options = self._make_options()
        own = {name: getattr(self, name) for name in ("layer_norm", "heads")}
        whole = make_options(self.cell, peephole=getattr(self, "peephole", False), **own)
        shapes = whole.weight_shapes(self.input_size, self.hidden_size)
        self._weight_shapes: dict[str, Shape] = shapes

    def _make_options(self) -> Options | None:
        return make_options(self.cell, bias=bool(self.bias), **self._maths())

    def _maths(self) -> dict[str, Any]:
        """The options that change the maths of a step."""
        return {n: getattr(self, n) for n in self.own_options if n not in OUTSIDE_THE_STEP}

    def _learned_shapes(self) -> dict[str, Shape]:
        """The parameters that `learn_initial_state` asks for."""
        if not self.learn_initial_state:
            return {}
        names = ("h_0", "c_0") if self.cell == "LSTM" else ("h_0",)
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
        for name, default in self.own_options.items():
            value = getattr(self, name)
            if value != default:
                shown.append(f"{name}={value}")
        return ", ".join(shown)

    @property
    def _flat_weights_names(self) -> tuple[str, ...]:
        return self._names(bool(self.bias))

    def _names(self, bias: bool) -> tuple[str, ...]:
        """The names of the weights, in order."""
        return tuple(n for n in self._weight_shapes if bias or not n.startswith("bias"))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _inference.forget(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return _inference.state_without(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled cell, also one from before an own option existed."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, default in self.own_options.items():
            if name not in self.__dict__:
                setattr(self, name, default)
        self._describe()

    def _draws(self) -> bool:
        """Whether the call draws anything at random."""
        own = self._options
        return self.training and own is not None and (own.zoneout_h > 0 or own.zoneout_c > 0)

    def _run(self, input: Tensor, hx: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """One step: the new states, each (B, H) or, for an unbatched input, (H,)."""
        learned = hx is None and self.learn_initial_state
        if self._options is not None and not learned and not self._draws():
            found = _inference.run(self, input, hx, False, True)
            if found is not None:
                return found
        _checks.check_tensor("input", input)
        _checks.check_states(hx)
        _checks.check_cell_input(type(self).__name__, input, hx or ())
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
            hx = None if hx is None else tuple(state.unsqueeze(0) for state in hx)
        _checks.check_cell_sizes(input, hx or (), self.input_size, self.hidden_size)
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
        half = _autocast.requested(input)
        wide = None
        if half is not None:
            wide = _autocast.result_dtype(self.cell, half, input, hx, fused=False)
            input = _autocast.cast(input, half)
            hx = None if hx is None else tuple(_autocast.cast(state, half) for state in hx)
            weights = [_autocast.cast(weight, half) for weight in weights]
        _checks.check_cell_companions(input, hx or (), weights, self._names(options.bias))
        if hx is not None:
            hx = tuple(state.unsqueeze(0) for state in hx)
        cache = None  # of weights that autocast has just made there is nothing to keep
        if half is None and not torch.compiler.is_compiling():
            cache = _inference.prepared(self).cache
        input, extras = input.unsqueeze(0), NO_EXTRAS
        if self.training:
            extras = _masks.draw(options, input, input.shape[1], self.hidden_size, dropout=0.0)
        hx_n = recurrent(options, input, hx, weights, extras=extras, cache=cache)[1]
        # No views, which torch refuses to detach_(); nothing else sees the memory of hx_n.
        hx_n = tuple(torch.ops.aten._unsafe_view.default(state, state.shape[1:]) for state in hx_n)
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


class RNNCell(RecurrentCell):
    """One step of an Elman RNN: h' = act(W_ih·x + b_ih + W_hh·h + b_hh).

    Stands in for ``torch.nn.RNNCell``: the same arguments, parameters and results.

    Arguments:
        input_size: I, the size of x.
        hidden_size: H, the size of h.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        device: where the parameters are made.
        dtype: the dtype of the parameters.
        layer_norm: whether W_ih·x and W_hh·h are normalised, each over all its H values, to
            γ∘norm(·) + b (Ba et al. 2016).
        heads: how many blocks W_hh has on its diagonal, one for H/heads units of every gate.
        zoneout: the probability that a unit of the state keeps its old value while training; in
            ``eval()`` the expectation is taken (Krueger et al. 2017).
        learn_initial_state: whether the state where hx is None is a parameter, not zeros.
        grad_clip: a limit; the whole gradient of h' is clamped to ±grad_clip (Graves 2013).

    Attributes:
        weight_ih: (H, I).
        weight_hh: (H, H), with several heads (heads, H/heads, H/heads).
        bias_ih: (H,), None where ``bias=False``.
        bias_hh: (H,), None where ``bias=False``.
        norm_ih, norm_hh: γ of both sides, (H,), with ``layer_norm``.
        h_0: (1, H), with ``learn_initial_state``.

    Raises:
        ValueError: an option is out of its range.
        TypeError: an option is of another type.

    >>> import torch
    >>> cell = RNNCell(3, 4)
    >>> h = torch.zeros(2, 4)
    >>> for x in torch.randn(5, 2, 3):
    ...     h = cell(x, h)
    >>> h.shape
    torch.Size([2, 4])
    """

    __module__ = "fastrnn.nn"
    __constants__: ClassVar[list[str]] = ["input_size", "hidden_size", "bias", "nonlinearity"]

    cell = "RNN"
    own_options: ClassVar[dict[str, Any]] = {"nonlinearity": "tanh", **_COMMON_OPTIONS}
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        heads: int = 1,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        grad_clip: float | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            nonlinearity=nonlinearity,
            layer_norm=layer_norm,
            heads=heads,
            zoneout=zoneout,
            learn_initial_state=learn_initial_state,
            grad_clip=grad_clip,
        )

    def _make_options(self) -> Options | None:
        if self.nonlinearity not in get_args(Activation):
            return None  # torch constructs such a cell and refuses to run it
        return super()._make_options()

    def _maths(self) -> dict[str, Any]:
        own = super()._maths()
        own["activation"] = own.pop("nonlinearity")
        return own

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Arguments:
            input: x, (B, I), or (I,) for a single row.
            hx: h, (B, H), or (H,) beside a single row. None: zeros, or the learned state.

        Returns:
            h', in the shape of h.

        Raises:
            ValueError: input or hx is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices do not fit, or the nonlinearity is unknown.
        """
        if self._options is None or self._options.activation != self.nonlinearity:
            self._options = self._make_options()
        (h,) = self._run(input, None if hx is None else (hx,))
        return h


class LSTMCell(RecurrentCell):
    """One step of an LSTM.

    With a = W_ih·x + b_ih + W_hh·h + b_hh, cut into a_i, a_f, a_g, a_o: i = σ(a_i), f = σ(a_f),
    g = act(a_g), o = σ(a_o); c' = f∘c + i∘g and h' = o∘act(c').

    Stands in for ``torch.nn.LSTMCell``: the same arguments, parameters and results.

    Arguments:
        input_size: I, the size of x.
        hidden_size: H, the size of h and c.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device: where the parameters are made.
        dtype: the dtype of the parameters.
        activation: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        gate_activation: σ: ``"sigmoid"``, or ``"hardsigmoid"``, which is clip(x/6 + 1/2, 0, 1).
        peephole: whether the gates see the cell state: a_i += w_ci∘c, a_f += w_cf∘c,
            a_o += w_co∘c' (Gers & Schmidhuber 2000).
        layer_norm: whether W_ih·x and W_hh·h are normalised, each over all its 4·H values, to
            γ∘norm(·) + b, and h' = o∘act(γ_c∘norm(c') + β_c) (Ba et al. 2016).
        heads: how many blocks W_hh has on its diagonal, one for H/heads units of every gate.
        zoneout: the probability that a unit keeps its old value while training, of both states or
            of (h, c); in ``eval()`` the expectation is taken (Krueger et al. 2017).
        learn_initial_state: whether the state where hx is None is a parameter, not zeros.
        forget_bias: the value that the forget gate's part of ``bias_ih`` starts with.
        grad_clip: a limit; the whole gradients of h' and of c' are clamped to ±grad_clip
            (Graves 2013).

    Attributes:
        weight_ih: (4·H, I).
        weight_hh: (4·H, H), with several heads (heads, 4·H/heads, H/heads).
        bias_ih: (4·H,), None where ``bias=False``.
        bias_hh: (4·H,), None where ``bias=False``.
        weight_ci, weight_cf, weight_co: (H,), with ``peephole``.
        norm_ih, norm_hh: γ of both sides, (4·H,), with ``layer_norm``.
        norm_c, norm_c_bias: γ_c and β_c, (H,), with ``layer_norm``.
        h_0, c_0: (1, H), with ``learn_initial_state``.

    Raises:
        ValueError: an option is none of the above or out of its range.
        TypeError: an option is of another type.

    >>> import torch
    >>> cell = LSTMCell(3, 4)
    >>> h, c = cell(torch.randn(2, 3))
    >>> h, c = cell(torch.randn(2, 3), (h, c))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    __module__ = "fastrnn.nn"

    cell = "LSTM"
    own_options: ClassVar[dict[str, Any]] = {
        "activation": "tanh",
        "gate_activation": "sigmoid",
        "peephole": False,
        **_COMMON_OPTIONS,
        "forget_bias": None,
    }
    activation: str
    gate_activation: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        peephole: bool = False,
        layer_norm: bool = False,
        heads: int = 1,
        zoneout: float | tuple[float, float] = 0.0,
        learn_initial_state: bool = False,
        forget_bias: float | None = None,
        grad_clip: float | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            activation=activation,
            gate_activation=gate_activation,
            peephole=peephole,
            layer_norm=layer_norm,
            heads=heads,
            zoneout=zoneout,
            learn_initial_state=learn_initial_state,
            forget_bias=forget_bias,
            grad_clip=grad_clip,
        )

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one step.

        Arguments:
            input: x, (B, I), or (I,) for a single row.
            hx: h and c, a tuple or list of two tensors (B, H), or (H,) beside a single row.
                None: zeros, or the learned states.

        Returns:
            h' and c', in the shape of h.

        Raises:
            ValueError: input, h or c is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices do not fit, or hx does not hold two tensors.
            TypeError: hx is one tensor beside a batch.
        """
        _checks.check_tensor("input", input)
        given: Any = hx
        if isinstance(given, Tensor) and input.dim() == 2 and given.dim() in (2, 3):
            raise TypeError("hx must be a tuple or list of two tensors (h_0, c_0), got one Tensor")
        h, c = self._run(input, _checks.state_pair(hx, "lstm_cell"))
        return h, c


class GRUCell(RecurrentCell):
    """One step of a GRU.

    With x' = W_ih·x + b_ih and h' = W_hh·h + b_hh, each cut in three: r = σ(x'_r + h'_r),
    z = σ(x'_z + h'_z), n = act(x'_n + r∘h'_n), and the new state is (1 - z)∘n + z∘h. With
    ``reset_after=False`` (Cho et al. 2014) n = act(x'_n + W_hn·(r∘h) + b_hn).

    Stands in for ``torch.nn.GRUCell``: the same arguments, parameters and results.

    Arguments:
        input_size: I, the size of x.
        hidden_size: H, the size of h.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device: where the parameters are made.
        dtype: the dtype of the parameters.
        activation: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        gate_activation: σ: ``"sigmoid"``, or ``"hardsigmoid"``, which is clip(x/6 + 1/2, 0, 1).
        reset_after: whether the reset gate acts after the matrix product.
        layer_norm: whether W_ih·x and W_hh·h are normalised, each over all its 3·H values, to
            γ∘norm(·) + b (Ba et al. 2016). With ``reset_after=False`` r and z of W_hh·h are
            normalised together, n by itself.
        heads: how many blocks W_hh has on its diagonal, one for H/heads units of every gate.
        zoneout: the probability that a unit of the state keeps its old value while training; in
            ``eval()`` the expectation is taken (Krueger et al. 2017).
        learn_initial_state: whether the state where hx is None is a parameter, not zeros.
        grad_clip: a limit; the whole gradient of the new state is clamped to ±grad_clip
            (Graves 2013).

    Attributes:
        weight_ih: (3·H, I).
        weight_hh: (3·H, H), with several heads (heads, 3·H/heads, H/heads).
        bias_ih: (3·H,), None where ``bias=False``.
        bias_hh: (3·H,), None where ``bias=False``.
        norm_ih, norm_hh: γ of both sides, (3·H,), with ``layer_norm``.
        h_0: (1, H), with ``learn_initial_state``.

    Raises:
        ValueError: an option is none of the above or out of its range.
        TypeError: an option is of another type.

    >>> import torch
    >>> cell = GRUCell(3, 4, reset_after=False)
    >>> cell(torch.randn(2, 3)).shape
    torch.Size([2, 4])
    """

    __module__ = "fastrnn.nn"

    cell = "GRU"
    own_options: ClassVar[dict[str, Any]] = {
        "activation": "tanh",
        "gate_activation": "sigmoid",
        "reset_after": True,
        **_COMMON_OPTIONS,
    }
    activation: str
    gate_activation: str
    reset_after: bool

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        reset_after: bool = True,
        layer_norm: bool = False,
        heads: int = 1,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        grad_clip: float | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            activation=activation,
            gate_activation=gate_activation,
            reset_after=reset_after,
            layer_norm=layer_norm,
            heads=heads,
            zoneout=zoneout,
            learn_initial_state=learn_initial_state,
            grad_clip=grad_clip,
        )

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Arguments:
            input: x, (B, I), or (I,) for a single row.
            hx: h, (B, H), or (H,) beside a single row. None: zeros, or the learned state.

        Returns:
            The new state, in the shape of h.

        Raises:
            ValueError: input or hx is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices do not fit.
        """
        (h,) = self._run(input, None if hx is None else (hx,))
        return h
