"""Recurrent layers and cells that stand in for torch.nn's.

The layers RNN, LSTM and GRU take ``torch.nn``'s arguments in ``torch.nn``'s order, and options
that torch does not have by keyword. T stands for steps, B for batch, I for input size, H for
hidden size, P for projection size, L for layers and D for directions (1 or 2); O is P with a
projection and H without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .layers.cells import GRUCell, LSTMCell, RNNCell
from .layers.layer import COMMON_OPTIONS, Device, RecurrentLayer
from .layers.quantized import QuantizedGRU, QuantizedLSTM, QuantizedRNN
from .layers.surface import LSTMSurface

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor
    from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "QuantizedGRU",
    "QuantizedLSTM",
    "QuantizedRNN",
    "RNNCell",
]

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
        layer_norm: whether W_ih·x_t and W_hh·h_{t-1} are normalised, each over all its H
            values, to γ∘norm(·) + b; norm(a) is (a - mean) / sqrt(variance + 1e-5) (Ba et al.
            2016).
        heads: how many blocks W_hh has on its diagonal: head k holds the units k·H/heads and on
            and sees its own part of h_{t-1} alone. Divides H.
        recurrent_dropout: the probability of a zero in what W_hh sees of h_{t-1} while training:
            one mask for each sequence, layer and direction (Gal & Ghahramani 2016).
        zoneout: the probability that a unit of h keeps its old value at a step while training; in
            ``eval()`` the expectation p·old + (1 - p)·new is taken (Krueger et al. 2017).
        learn_initial_state: whether there is a parameter ``h_0``, which stands where hx is None and
            after a reset.
        grad_clip: a limit; at every step of the backward pass the whole gradient of h_t, from
            the output and from the step after, is clamped to ±grad_clip (Graves 2013).
        recompute: whether the backward pass computes the gates again instead of keeping them: equal
            gradients, less memory.

    Attributes:
        weight_ih_l0: W_ih of layer 0, (H, I); of a later layer k, ``weight_ih_l{k}``, (H, D·H).
        weight_hh_l0: W_hh, (H, H); with several heads (heads, H/heads, H/heads).
        bias_ih_l0: b_ih, (H,), with ``bias=True``.
        bias_hh_l0: b_hh, (H,), with ``bias=True``.
        norm_ih_l0, norm_hh_l0: γ of W_ih·x_t and of W_hh·h_{t-1}, (H,), with ``layer_norm``.
        h_0: (L·D, 1, H), with ``learn_initial_state``.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"RNN_SIGMOID"`` or ``"RNN_IDENTITY"``.

    The names of the backward direction end in ``_reverse``.

    Raises:
        ValueError: a size, the dropout, the nonlinearity or another option is out of its range.
        TypeError: a size is no int, bias or batch_first no bool, or an option of another type.

    >>> import torch
    >>> layer = RNN(3, 4, nonlinearity="sigmoid", batch_first=True)
    >>> output, h_n = layer(torch.randn(2, 5, 3))
    >>> output.shape, h_n.shape
    (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """

    _cell = "RNN"
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
        *,
        layer_norm: bool = False,
        heads: int = 1,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        grad_clip: float | None = None,
        recompute: bool = False,
    ) -> None:
        _refuse_projection(proj_size)
        if nonlinearity not in tuple(_NONLINEARITIES):  # what cannot be hashed is none of them
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. "
                "Select from 'tanh', 'relu', 'sigmoid' or 'identity'."
            )
        self.nonlinearity = nonlinearity
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
            layer_norm=layer_norm,
            heads=heads,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            learn_initial_state=learn_initial_state,
            grad_clip=grad_clip,
            recompute=recompute,
        )

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
            hx: initial states, (L·D, B, H), beside one sequence (L·D, H). None: zeros,
                or the learned states.
            lengths: integers (B,), each 0…T: how many steps of each sequence count. Output past
                a length is 0, ``h_n`` is the last state that counts, the backward direction
                starts there, and padding gets no gradient.
            reset: bool (T, B), with ``batch_first`` (B, T), beside one sequence (T,). True: a new
                episode begins at this step, with a state of zeros or the learned one; in both
                directions no state and no gradient crosses into another episode.
            return_states: whether to return the states of every layer at every step too.

        Returns:
            ``output, h_n``, with ``return_states`` ``output, h_n, states``. The output is the last
            layer's states, in the layout of input, of size D·H. h_n: the final states, in the
            layout of hx. ``states.h``: (L, T, B, D·H), beside one sequence (L, T, D·H), beside a
            PackedSequence (L, N, D·H) where N counts the steps of all its sequences.

        Raises:
            ValueError: the input is neither 2-D nor 3-D or of another dtype than the weights, or
                lengths or reset do not fit the input.
            RuntimeError: sizes, dtypes or devices do not fit, or T is 0.
            TypeError: lengths are no integers, or reset is no bool tensor.
        """
        output, hx_n, states = self._run(input, hx, lengths, reset, return_states)
        if hx_n is None:  # torch.fx traces the call
            return output  # type: ignore[no-any-return]
        return (output, hx_n[0], states) if return_states else (output, hx_n[0])


class LSTM(LSTMSurface, RecurrentLayer):
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
        peephole: whether the gates see the cell state: a_i += w_ci∘c_{t-1}, a_f += w_cf∘c_{t-1},
            a_o += w_co∘c_t (Gers & Schmidhuber 2000).
        layer_norm: whether W_ih·x_t and W_hh·h_{t-1} are normalised, each over all its 4·H values,
            to γ∘norm(·) + b, and h_t = o∘act(γ_c∘norm(c_t) + β_c); norm(a) is (a - mean) /
            sqrt(variance + 1e-5) (Ba et al. 2016).
        heads: how many blocks W_hh has on its diagonal: head k holds the units k·H/heads and on
            and sees its own part of h_{t-1} alone. Divides H and P.
        recurrent_dropout: the probability of a zero in what W_hh sees of h_{t-1} while training:
            one mask for each sequence, layer and direction (Gal & Ghahramani 2016).
        zoneout: the probability that a unit keeps its old value at a step while training, of both
            states or of (h, c); in ``eval()`` the expectation p·old + (1 - p)·new is taken.
            h_t comes from c_t as it was before zoneout (Krueger et al. 2017).
        learn_initial_state: whether there are parameters ``h_0`` and ``c_0``, which stand where hx
            is None and after a reset.
        forget_bias: the value that the forget gate's part of ``bias_ih`` starts with; None: it is
            drawn like the others.
        grad_clip: a limit; at every step of the backward pass the whole gradients of h_t and of
            c_t, from the output and from the step after, are clamped to ±grad_clip (Graves 2013).
        recompute: whether the backward pass computes the gates again instead of keeping them: equal
            gradients, less memory.

    Attributes:
        weight_ih_l0: W_ih of layer 0, (4·H, I); of a later layer k, ``weight_ih_l{k}``,
            (4·H, D·O).
        weight_hh_l0: W_hh, (4·H, O); with several heads (heads, 4·H/heads, O/heads).
        bias_ih_l0: b_ih, (4·H,), with ``bias=True``.
        bias_hh_l0: b_hh, (4·H,), with ``bias=True``.
        weight_hr_l0: W_hr, (P, H), with ``proj_size``.
        weight_ci_l0, weight_cf_l0, weight_co_l0: w_ci, w_cf, w_co, (H,), with ``peephole``.
        norm_ih_l0, norm_hh_l0: γ of W_ih·x_t and of W_hh·h_{t-1}, (4·H,), with ``layer_norm``.
        norm_c_l0, norm_c_bias_l0: γ_c and β_c, (H,), with ``layer_norm``.
        h_0, c_0: (L·D, 1, O) and (L·D, 1, H), with ``learn_initial_state``.

    The names of the backward direction end in ``_reverse``. Gates stand in the order i, f, g, o.

    Raises:
        ValueError: a size, the dropout, an activation or another option is out of its range.
        TypeError: a size is no int, bias or batch_first no bool, or an option of another type.

    >>> import torch
    >>> layer = LSTM(3, 4, num_layers=2, bidirectional=True)
    >>> output, (h_n, c_n) = layer(torch.randn(5, 2, 3), lengths=[5, 3])
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([5, 2, 8]), torch.Size([4, 2, 4]), torch.Size([4, 2, 4]))
    """

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
        peephole: bool = False,
        layer_norm: bool = False,
        heads: int = 1,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        learn_initial_state: bool = False,
        forget_bias: float | None = None,
        grad_clip: float | None = None,
        recompute: bool = False,
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
            peephole=peephole,
            layer_norm=layer_norm,
            heads=heads,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            learn_initial_state=learn_initial_state,
            forget_bias=forget_bias,
            grad_clip=grad_clip,
            recompute=recompute,
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
                one sequence (L·D, O) and (L·D, H). None: zeros, or the learned states.
            lengths: integers (B,), each 0…T: how many steps of each sequence count. Output past
                a length is 0, ``h_n`` and ``c_n`` are the last states that count, the backward
                direction starts there, and padding gets no gradient.
            reset: bool (T, B), with ``batch_first`` (B, T), beside one sequence (T,). True: a new
                episode begins at this step, with states of zeros or the learned ones; in both
                directions no state and no gradient crosses into another episode.
            return_states: whether to return the states of every layer at every step too.

        Returns:
            ``output, (h_n, c_n)``, with ``return_states`` ``output, (h_n, c_n), states``. The
            output is the last layer's h_t, in the layout of input, of size D·O. h_n and c_n: the
            final states, in the layout of hx. ``states.h`` and ``states.c``: (L, T, B, D·O) and
            (L, T, B, D·H), beside one sequence without B, beside a PackedSequence (L, N, ·)
            where N counts the steps of all its sequences.

        Raises:
            ValueError: the input is neither 2-D nor 3-D or of another dtype than the weights, or
                lengths or reset do not fit the input.
            RuntimeError: sizes, dtypes or devices do not fit, hx does not hold two tensors, or T
                is 0.
            TypeError: hx is one tensor, lengths are no integers, or reset is no bool tensor.
        """
        output, hx_n, states = self._run(input, hx, lengths, reset, return_states)
        if hx_n is None:  # torch.fx traces the call
            return output  # type: ignore[no-any-return]
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
        layer_norm: whether W_ih·x_t and W_hh·h_{t-1} are normalised, each over all its 3·H
            values, to γ∘norm(·) + b; norm(a) is (a - mean) / sqrt(variance + 1e-5) (Ba et al.
            2016). With ``reset_after=False`` r and z of W_hh·h_{t-1} are normalised
            together, n by itself.
        heads: how many blocks W_hh has on its diagonal: head k holds the units k·H/heads and on
            and sees its own part of h_{t-1} alone. Divides H.
        recurrent_dropout: the probability of a zero in what W_hh sees of h_{t-1} while training:
            one mask for each sequence, layer and direction (Gal & Ghahramani 2016).
        zoneout: the probability that a unit of h keeps its old value at a step while training; in
            ``eval()`` the expectation p·old + (1 - p)·new is taken (Krueger et al. 2017).
        learn_initial_state: whether there is a parameter ``h_0``, which stands where hx is None and
            after a reset.
        grad_clip: a limit; at every step of the backward pass the whole gradient of h_t, from
            the output and from the step after, is clamped to ±grad_clip (Graves 2013).
        recompute: whether the backward pass computes the gates again instead of keeping them: equal
            gradients, less memory.

    Attributes:
        weight_ih_l0: W_ih of layer 0, (3·H, I); of a later layer k, ``weight_ih_l{k}``,
            (3·H, D·H).
        weight_hh_l0: W_hh, (3·H, H); with several heads (heads, 3·H/heads, H/heads).
        bias_ih_l0: b_ih, (3·H,), with ``bias=True``.
        bias_hh_l0: b_hh, (3·H,), with ``bias=True``.
        norm_ih_l0, norm_hh_l0: γ of W_ih·x_t and of W_hh·h_{t-1}, (3·H,), with ``layer_norm``.
        h_0: (L·D, 1, H), with ``learn_initial_state``.

    The names of the backward direction end in ``_reverse``. Gates stand in the order r, z, n.

    Raises:
        ValueError: a size, the dropout, an activation or another option is out of its range.
        TypeError: a size is no int, bias or batch_first no bool, or an option of another type.

    >>> import torch
    >>> layer = GRU(3, 4, reset_after=False)
    >>> output, h_n, states = layer(torch.randn(5, 2, 3), return_states=True)
    >>> states.h.shape
    torch.Size([1, 5, 2, 4])
    """

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
        layer_norm: bool = False,
        heads: int = 1,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        grad_clip: float | None = None,
        recompute: bool = False,
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
            layer_norm=layer_norm,
            heads=heads,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            learn_initial_state=learn_initial_state,
            grad_clip=grad_clip,
            recompute=recompute,
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
            hx: initial states, (L·D, B, H), beside one sequence (L·D, H). None: zeros,
                or the learned states.
            lengths: integers (B,), each 0…T: how many steps of each sequence count. Output past
                a length is 0, ``h_n`` is the last state that counts, the backward direction
                starts there, and padding gets no gradient.
            reset: bool (T, B), with ``batch_first`` (B, T), beside one sequence (T,). True: a new
                episode begins at this step, with a state of zeros or the learned one; in both
                directions no state and no gradient crosses into another episode.
            return_states: whether to return the states of every layer at every step too.

        Returns:
            ``output, h_n``, with ``return_states`` ``output, h_n, states``. The output is the last
            layer's states, in the layout of input, of size D·H. h_n: the final states, in the
            layout of hx. ``states.h``: (L, T, B, D·H), beside one sequence (L, T, D·H), beside a
            PackedSequence (L, N, D·H) where N counts the steps of all its sequences.

        Raises:
            ValueError: the input is neither 2-D nor 3-D or of another dtype than the weights, or
                lengths or reset do not fit the input.
            RuntimeError: sizes, dtypes or devices do not fit, or T is 0.
            TypeError: lengths are no integers, or reset is no bool tensor.
        """
        output, hx_n, states = self._run(input, hx, lengths, reset, return_states)
        if hx_n is None:  # torch.fx traces the call
            return output  # type: ignore[no-any-return]
        return (output, hx_n[0], states) if return_states else (output, hx_n[0])
