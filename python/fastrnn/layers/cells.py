"""The cells: one step of a layer of one layer and one direction.

Two of the layers' options are not here. ``recurrent_dropout`` draws one mask for a whole sequence,
and a cell does not know where a sequence begins: its caller multiplies h by a mask of his own.
``recompute`` spares what a layer keeps of all its steps; a cell keeps one step, in the graph of its
caller, who has torch.utils.checkpoint for that.
"""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import torch  # noqa: TC002, tools read the annotations
from torch import Tensor  # noqa: TC002

from .._options import GATES, Activation, Options
from .cell import COMMON_OPTIONS, RecurrentCell
from .layer import Device  # noqa: TC001


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

    _cell = "RNN"
    own_options: ClassVar[dict[str, Any]] = COMMON_OPTIONS
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
        self.nonlinearity = nonlinearity
        super().__init__(
            input_size,
            hidden_size,
            bias,
            GATES["RNN"],
            device,
            dtype,
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
        return {"activation": self.nonlinearity, **super()._maths()}

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
            self._prepare()
        h: Tensor = self._run(input, hx)[0]
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

    _cell = "LSTM"
    own_options: ClassVar[dict[str, Any]] = {
        "activation": "tanh",
        "gate_activation": "sigmoid",
        "peephole": False,
        **COMMON_OPTIONS,
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
            GATES["LSTM"],
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
        h, c = self._run(input, hx)
        return h if c is None else (h, c)  # None: torch.fx traces the call


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

    _cell = "GRU"
    own_options: ClassVar[dict[str, Any]] = {
        "activation": "tanh",
        "gate_activation": "sigmoid",
        "reset_after": True,
        **COMMON_OPTIONS,
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
            GATES["GRU"],
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
        h: Tensor = self._run(input, hx)[0]
        return h
