"""The cells: one step of a layer of one layer and one direction."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from . import _autocast, _checks, _inference
from ._layer import GATES, Device
from ._options import Activation, Cell, Options
from .functional import recurrent

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class RecurrentCell(Module):
    """The base of RNNCell, LSTMCell and GRUCell; not made to be used by itself."""

    __constants__: ClassVar[list[str]] = ["input_size", "hidden_size", "bias"]

    cell: ClassVar[Cell]
    # The options torch.nn does not have, each with the value that is torch.nn's behaviour.
    own_options: ClassVar[dict[str, Any]] = {}

    input_size: int
    hidden_size: int
    bias: bool
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

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
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        for name, value in own_options.items():
            setattr(self, name, value)
        for name, shape in zip(_NAMES, self._weight_shapes(), strict=True):
            if name.startswith("bias") and not bias:
                self.register_parameter(name, None)
            else:
                weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name, weight)
        self._options = self._make_options()
        self.reset_parameters()

    def _make_options(self) -> Options | None:
        own = {name: getattr(self, name) for name in self.own_options}
        return Options(self.cell, bias=bool(self.bias), **own)

    def _weight_shapes(self) -> tuple[tuple[int, ...], ...]:
        gates = GATES[self.cell] * self.hidden_size
        return (gates, self.input_size), (gates, self.hidden_size), (gates,), (gates,)

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√H, 1/√H), in the order of ``parameters()``."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

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
        return _NAMES if self.bias else _NAMES[:2]

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
        self._options = self._make_options()

    def _run(self, input: Tensor, hx: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """One step: the new states, each (B, H) or, for an unbatched input, (H,)."""
        if self._options is not None:
            found = _inference.run(self, input, hx, False, True)
            if found is not None:
                return found
        _checks.check_cell_input(type(self).__name__, input, hx or ())
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
            hx = None if hx is None else tuple(state.unsqueeze(0) for state in hx)
        _checks.check_cell_sizes(input, hx or (), self.input_size, self.hidden_size)
        if self._options is None:
            raise RuntimeError(f"Unknown nonlinearity: {getattr(self, 'nonlinearity', None)}")
        weights, options = self._weights(self._options)
        half = _autocast.requested(input)
        wide = None
        if half is not None:
            wide = _autocast.result_dtype(self.cell, half, input, hx, fused=False)
            input = _autocast.cast(input, half)
            hx = None if hx is None else tuple(_autocast.cast(state, half) for state in hx)
            weights = [_autocast.cast(weight, half) for weight in weights]
        _checks.check_cell_companions(input, hx or (), weights, _NAMES)
        if hx is not None:
            hx = tuple(state.unsqueeze(0) for state in hx)
        cache = None  # of weights that autocast has just made there is nothing to keep
        if half is None and not torch.compiler.is_compiling():
            cache = _inference.prepared(self).cache
        hx_n = recurrent(options, input.unsqueeze(0), hx, weights, cache=cache)[1]
        hx_n = tuple(state.squeeze(0) for state in hx_n)
        if wide is not None:
            hx_n = tuple(state.to(wide) for state in hx_n)
        return tuple(state.squeeze(0) for state in hx_n) if unbatched else hx_n

    def _weights(self, options: Options) -> tuple[list[Tensor], Options]:
        """The weights of this moment, checked, and the options that go with them."""
        parameters: dict[str, Any] = self._parameters
        try:
            weights = [parameters[name] for name in _NAMES]
        except KeyError:  # parametrized, weight norm, a replica: not a registered parameter
            weights = [getattr(self, name) for name in _NAMES]
        bias_ih, bias_hh = weights[2:]
        bias = bias_ih is not None or bias_hh is not None
        if bias != options.bias:
            options = dataclasses.replace(options, bias=bias)
        if not bias:
            weights = weights[:2]
        elif bias_ih is None:  # where one bias was taken away, zeros stand for it
            weights[2] = torch.zeros_like(bias_hh)
        elif bias_hh is None:
            weights[3] = torch.zeros_like(bias_ih)
        shapes = self._weight_shapes()[: len(weights)]
        _checks.check_weight_shapes(weights, _NAMES[: len(weights)], shapes)
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

    Attributes:
        weight_ih: (H, I).
        weight_hh: (H, H).
        bias_ih: (H,), None where ``bias=False``.
        bias_hh: (H,), None where ``bias=False``.

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
    own_options: ClassVar[dict[str, Any]] = {"nonlinearity": "tanh"}
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, nonlinearity=nonlinearity)

    def _make_options(self) -> Options | None:
        if self.nonlinearity not in get_args(Activation):
            return None  # torch constructs such a cell and refuses to run it
        return Options("RNN", bias=bool(self.bias), activation=self.nonlinearity)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Arguments:
            input: x, (B, I), or (I,) for a single row.
            hx: h, (B, H), or (H,) beside a single row. None: zeros.

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

    Attributes:
        weight_ih: (4·H, I).
        weight_hh: (4·H, H).
        bias_ih: (4·H,), None where ``bias=False``.
        bias_hh: (4·H,), None where ``bias=False``.

    Raises:
        ValueError: activation or gate_activation is none of the above.

    >>> import torch
    >>> cell = LSTMCell(3, 4)
    >>> h, c = cell(torch.randn(2, 3))
    >>> h, c = cell(torch.randn(2, 3), (h, c))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    __module__ = "fastrnn.nn"

    cell = "LSTM"
    own_options: ClassVar[dict[str, Any]] = {"activation": "tanh", "gate_activation": "sigmoid"}
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
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            activation=activation,
            gate_activation=gate_activation,
        )

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one step.

        Arguments:
            input: x, (B, I), or (I,) for a single row.
            hx: h and c, a tuple or list of two tensors (B, H), or (H,) beside a single row.
                None: zeros.

        Returns:
            h' and c', in the shape of h.

        Raises:
            ValueError: input, h or c is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices do not fit, or hx does not hold two tensors.
            TypeError: hx is one tensor beside a batch.
        """
        if isinstance(hx, Tensor) and input.dim() == 2 and hx.dim() in (2, 3):
            raise TypeError("hx must be a tuple or list of two tensors (h_0, c_0), got one Tensor")
        if hx is not None and len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        h, c = self._run(input, None if hx is None else (hx[0], hx[1]))
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

    Attributes:
        weight_ih: (3·H, I).
        weight_hh: (3·H, H).
        bias_ih: (3·H,), None where ``bias=False``.
        bias_hh: (3·H,), None where ``bias=False``.

    Raises:
        ValueError: activation or gate_activation is none of the above.

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
        )

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Arguments:
            input: x, (B, I), or (I,) for a single row.
            hx: h, (B, H), or (H,) beside a single row. None: zeros.

        Returns:
            The new state, in the shape of h.

        Raises:
            ValueError: input or hx is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices do not fit.
        """
        (h,) = self._run(input, None if hx is None else (hx,))
        return h
