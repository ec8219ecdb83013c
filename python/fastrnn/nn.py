"""Recurrent layers and cells that stand in for torch.nn's.

The layers RNN, LSTM and GRU take ``torch.nn``'s arguments in ``torch.nn``'s order, and options
that torch does not have by keyword. T stands for steps, B for batch, I for input size, H for
hidden size, P for projection size, L for layers and D for directions (1 or 2); O is P with a
projection and H without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ._cells import GRUCell, LSTMCell, RNNCell
from ._layer import Device, RecurrentLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch.nn.utils.rnn import PackedSequence

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

_NONLINEARITIES = {
    "tanh": "RNN_TANH",
    "relu": "RNN_RELU",
    "sigmoid": "RNN_SIGMOID",
    "identity": "RNN_IDENTITY",
}


def _refuse_projection(proj_size: int | None) -> None:
    if proj_size:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class RNN(RecurrentLayer):
    """Layers of the Elman RNN: h_t = act(W_ih·x_t + b_ih + W_hh·h_{t-1} + b_hh).

    Stands in for ``torch.nn.RNN``: the same arguments, parameters and results, and one seed gives
    the same weights.

    Arguments:
        input_size: I, the size of x_t.
        hidden_size: H, the size of h_t.
        num_layers: L, how many layers stand on one another.
        nonlinearity: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        bias: whether there are biases b_ih and b_hh.
        batch_first: whether input and output are (B, T, ·) instead of (T, B, ·). States stay as
            they are.
        dropout: the probability of dropping a value between two layers while training.
        bidirectional: whether each layer also runs backwards in time.
        proj_size: not for an RNN; 0 or None.
        device: where the parameters are made.
        dtype: the dtype of the parameters.

    Attributes:
        weight_ih_l0: W_ih of layer 0, (H, I); of a later layer k, ``weight_ih_l{k}``, (H, D·H).
        weight_hh_l0: W_hh, (H, H).
        bias_ih_l0: b_ih, (H,), with ``bias=True``.
        bias_hh_l0: b_hh, (H,), with ``bias=True``.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"RNN_SIGMOID"`` or ``"RNN_IDENTITY"``.

    The names of the backward direction end in ``_reverse``.

    Raises:
        ValueError: a size, the dropout or the nonlinearity is out of its range.
        TypeError: a size is no int, or bias or batch_first no bool.

    >>> import torch
    >>> layer = RNN(3, 4, nonlinearity="sigmoid", batch_first=True)
    >>> output, h_n = layer(torch.randn(2, 5, 3))
    >>> output.shape, h_n.shape
    (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """

    cell = "RNN"
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse_projection(proj_size)
        if nonlinearity not in _NONLINEARITIES:
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. "
                "Select from 'tanh', 'relu', 'sigmoid' or 'identity'."
            )
        super().__init__(
            _NONLINEARITIES[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            nonlinearity=nonlinearity,
        )

    def _maths(self) -> dict[str, Any]:
        return {"activation": self.nonlinearity}

    def extra_repr(self) -> str:
        """torch.nn's line, then the nonlinearity where torch.nn does not have it."""
        line = super().extra_repr()
        if self.nonlinearity not in ("tanh", "relu"):
            line += f", nonlinearity={self.nonlinearity}"
        return line

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layers over a batch of sequences.

        Arguments:
            input: (T, B, I), with ``batch_first`` (B, T, I); one sequence (T, I); or a
                PackedSequence.
            hx: initial states, (L·D, B, H), beside one sequence (L·D, H). None: zeros.
            lengths: integers (B,), each 0…T: how many steps of each sequence count. Output past
                a length is 0, ``h_n`` is the last state that counts, the backward direction
                starts there, and padding gets no gradient.
            reset: bool (T, B), with ``batch_first`` (B, T), beside one sequence (T,). True: a new
                episode begins at this step, with a state of zeros; in both directions no state
                and no gradient crosses into another episode.
            return_states: whether to return the states of every layer at every step too.

        Returns:
            ``output, h_n``, with ``return_states`` ``output, h_n, states``. output: the last
            layer's states, in the layout of input, of size D·H. h_n: the final states, in the
            layout of hx. ``states.h``: (L, T, B, D·H), beside one sequence (L, T, D·H), beside a
            PackedSequence (L, N, D·H) where N counts the steps of all its sequences.

        Raises:
            ValueError: the input is neither 2-D nor 3-D or of another dtype than the weights, or
                lengths or reset do not fit the input.
            RuntimeError: sizes, dtypes or devices do not fit, or T is 0.
            TypeError: lengths are no integers, or reset is no bool tensor.
        """
        output, hx_n, states = self._run(
            input, None if hx is None else (hx,), lengths, reset, return_states
        )
        return (output, hx_n[0], states) if return_states else (output, hx_n[0])


class LSTM(RecurrentLayer):
    """Layers of the LSTM.

    With a_t = W_ih·x_t + b_ih + W_hh·h_{t-1} + b_hh, cut into a_i, a_f, a_g, a_o: i = σ(a_i),
    f = σ(a_f), g = act(a_g), o = σ(a_o); c_t = f∘c_{t-1} + i∘g and h_t = o∘act(c_t). With
    ``proj_size`` (Sak et al. 2014) h_t = W_hr·(o∘act(c_t)).

    Stands in for ``torch.nn.LSTM``: the same arguments, parameters and results, and one seed
    gives the same weights.

    Arguments:
        input_size: I, the size of x_t.
        hidden_size: H, the size of c_t and, without projection, of h_t.
        num_layers: L, how many layers stand on one another.
        bias: whether there are biases b_ih and b_hh.
        batch_first: whether input and output are (B, T, ·) instead of (T, B, ·). States stay as
            they are.
        dropout: the probability of dropping a value between two layers while training.
        bidirectional: whether each layer also runs backwards in time.
        proj_size: P, the size of the projected h_t, smaller than H; 0: no projection.
        device: where the parameters are made.
        dtype: the dtype of the parameters.
        activation: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        gate_activation: σ: ``"sigmoid"``, or ``"hardsigmoid"``, which is clip(x/6 + 1/2, 0, 1).

    Attributes:
        weight_ih_l0: W_ih of layer 0, (4·H, I); of a later layer k, ``weight_ih_l{k}``,
            (4·H, D·O).
        weight_hh_l0: W_hh, (4·H, O).
        bias_ih_l0: b_ih, (4·H,), with ``bias=True``.
        bias_hh_l0: b_hh, (4·H,), with ``bias=True``.
        weight_hr_l0: W_hr, (P, H), with ``proj_size``.

    The names of the backward direction end in ``_reverse``. Gates stand in the order i, f, g, o.

    Raises:
        ValueError: a size, the dropout or an activation is out of its range.
        TypeError: a size is no int, or bias or batch_first no bool.

    >>> import torch
    >>> layer = LSTM(3, 4, num_layers=2, bidirectional=True)
    >>> output, (h_n, c_n) = layer(torch.randn(5, 2, 3), lengths=[5, 3])
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([5, 2, 8]), torch.Size([4, 2, 4]), torch.Size([4, 2, 4]))
    """

    cell = "LSTM"
    own_options: ClassVar[dict[str, Any]] = {"activation": "tanh", "gate_activation": "sigmoid"}
    activation: str
    gate_activation: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            activation=activation,
            gate_activation=gate_activation,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layers over a batch of sequences.

        Arguments:
            input: (T, B, I), with ``batch_first`` (B, T, I); one sequence (T, I); or a
                PackedSequence.
            hx: initial states, a tuple or list of h_0 (L·D, B, O) and c_0 (L·D, B, H), beside
                one sequence (L·D, O) and (L·D, H). None: zeros.
            lengths: integers (B,), each 0…T: how many steps of each sequence count. Output past
                a length is 0, ``h_n`` and ``c_n`` are the last states that count, the backward
                direction starts there, and padding gets no gradient.
            reset: bool (T, B), with ``batch_first`` (B, T), beside one sequence (T,). True: a new
                episode begins at this step, with states of zeros; in both directions no state
                and no gradient crosses into another episode.
            return_states: whether to return the states of every layer at every step too.

        Returns:
            ``output, (h_n, c_n)``, with ``return_states`` ``output, (h_n, c_n), states``. output:
            the last layer's h_t, in the layout of input, of size D·O. h_n and c_n: the final
            states, in the layout of hx. ``states.h`` and ``states.c``: (L, T, B, D·O) and
            (L, T, B, D·H), beside one sequence without B, beside a PackedSequence (L, N, ·)
            where N counts the steps of all its sequences.

        Raises:
            ValueError: the input is neither 2-D nor 3-D or of another dtype than the weights, or
                lengths or reset do not fit the input.
            RuntimeError: sizes, dtypes or devices do not fit, hx does not hold two tensors, or T
                is 0.
            TypeError: hx is one tensor, lengths are no integers, or reset is no bool tensor.
        """
        if isinstance(hx, Tensor) and hx.dim() == 4:
            raise TypeError("hx must be a tuple or list of two tensors (h_0, c_0), got one Tensor")
        states_0 = None if hx is None else (hx[0], hx[1])
        if hx is not None and len(hx) > 2:
            raise RuntimeError("lstm expects two hidden states")
        output, hx_n, states = self._run(input, states_0, lengths, reset, return_states)
        return (output, hx_n, states) if return_states else (output, hx_n)


class GRU(RecurrentLayer):
    """Layers of the GRU.

    With x' = W_ih·x_t + b_ih and h' = W_hh·h_{t-1} + b_hh, each cut in three: r = σ(x'_r + h'_r),
    z = σ(x'_z + h'_z), n = act(x'_n + r∘h'_n), and h_t = (1 - z)∘n + z∘h_{t-1}. With
    ``reset_after=False`` (Cho et al. 2014) n = act(x'_n + W_hn·(r∘h_{t-1}) + b_hn).

    Stands in for ``torch.nn.GRU``: the same arguments, parameters and results, and one seed gives
    the same weights.

    Arguments:
        input_size: I, the size of x_t.
        hidden_size: H, the size of h_t.
        num_layers: L, how many layers stand on one another.
        bias: whether there are biases b_ih and b_hh.
        batch_first: whether input and output are (B, T, ·) instead of (T, B, ·). States stay as
            they are.
        dropout: the probability of dropping a value between two layers while training.
        bidirectional: whether each layer also runs backwards in time.
        proj_size: not for a GRU; 0 or None.
        device: where the parameters are made.
        dtype: the dtype of the parameters.
        activation: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        gate_activation: σ: ``"sigmoid"``, or ``"hardsigmoid"``, which is clip(x/6 + 1/2, 0, 1).
        reset_after: whether the reset gate acts after the matrix product.

    Attributes:
        weight_ih_l0: W_ih of layer 0, (3·H, I); of a later layer k, ``weight_ih_l{k}``,
            (3·H, D·H).
        weight_hh_l0: W_hh, (3·H, H).
        bias_ih_l0: b_ih, (3·H,), with ``bias=True``.
        bias_hh_l0: b_hh, (3·H,), with ``bias=True``.

    The names of the backward direction end in ``_reverse``. Gates stand in the order r, z, n.

    Raises:
        ValueError: a size, the dropout or an activation is out of its range.
        TypeError: a size is no int, or bias or batch_first no bool.

    >>> import torch
    >>> layer = GRU(3, 4, reset_after=False)
    >>> output, h_n, states = layer(torch.randn(5, 2, 3), return_states=True)
    >>> states.h.shape
    torch.Size([1, 5, 2, 4])
    """

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
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        reset_after: bool = True,
    ) -> None:
        _refuse_projection(proj_size)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            activation=activation,
            gate_activation=gate_activation,
            reset_after=reset_after,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layers over a batch of sequences.

        Arguments:
            input: (T, B, I), with ``batch_first`` (B, T, I); one sequence (T, I); or a
                PackedSequence.
            hx: initial states, (L·D, B, H), beside one sequence (L·D, H). None: zeros.
            lengths: integers (B,), each 0…T: how many steps of each sequence count. Output past
                a length is 0, ``h_n`` is the last state that counts, the backward direction
                starts there, and padding gets no gradient.
            reset: bool (T, B), with ``batch_first`` (B, T), beside one sequence (T,). True: a new
                episode begins at this step, with a state of zeros; in both directions no state
                and no gradient crosses into another episode.
            return_states: whether to return the states of every layer at every step too.

        Returns:
            ``output, h_n``, with ``return_states`` ``output, h_n, states``. output: the last
            layer's states, in the layout of input, of size D·H. h_n: the final states, in the
            layout of hx. ``states.h``: (L, T, B, D·H), beside one sequence (L, T, D·H), beside a
            PackedSequence (L, N, D·H) where N counts the steps of all its sequences.

        Raises:
            ValueError: the input is neither 2-D nor 3-D or of another dtype than the weights, or
                lengths or reset do not fit the input.
            RuntimeError: sizes, dtypes or devices do not fit, or T is 0.
            TypeError: lengths are no integers, or reset is no bool tensor.
        """
        output, hx_n, states = self._run(
            input, None if hx is None else (hx,), lengths, reset, return_states
        )
        return (output, hx_n[0], states) if return_states else (output, hx_n[0])
