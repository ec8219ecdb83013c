"""Recurrent layers as functions, on the arrays of any library that speaks DLPack.

Torch tensors give torch tensors, with autograd. All other arrays (NumPy, CuPy, JAX) give
``fastrnn.Tensor``, and torch is not imported. The arrays of one call are all of torch, or none is.

T steps, B batch, I input size, H hidden size, L layers, D directions (1 or 2), G gates (RNN 1,
GRU 3, LSTM 4), O the size of h: ``proj_size``, or else H. `fastrnn.reference` has the formulas.

Arguments of every function:
    input: (T, B, I), with ``batch_first`` (B, T, I); float32, float64, bfloat16 or float16, of
        torch also complex. Any strides.
    weights: a list: for each layer, for each direction: ``weight_ih`` (G·H, I of the layer),
        ``weight_hh`` (G·H, O), with ``bias`` also ``bias_ih`` and ``bias_hh`` (G·H,), with
        ``proj_size`` also ``weight_hr`` (proj_size, H), with ``peephole`` also ``weight_ci``,
        ``weight_cf``, ``weight_co`` (H,), with ``layer_norm`` also ``norm_ih``, ``norm_hh`` (G·H,)
        and of an LSTM ``norm_c``, ``norm_c_bias`` (H,). The gates stand in the order i, f, g, o
        (LSTM) or r, z, n (GRU). With several heads ``weight_hh`` is (heads, G·H/heads, O/heads).
    num_layers, bidirectional, bias, batch_first, proj_size: as in ``torch.nn.LSTM``.
    lengths: integers (B,), 0 to T, in any order: the valid steps of each row. Past them the output
        is 0; the final state is the last valid one; the reverse direction starts there.
    reset: bool (T, B), with ``batch_first`` (B, T): where an episode starts, and zeros, or
        ``reset_hx``, take the place of the state from before, in both directions.
    layer_norm, heads, zoneout, grad_clip, recompute, of `lstm` also peephole: as in `fastrnn.LSTM`.
        Nothing is drawn here: without a mask zoneout takes the expectation.
    reset_hx: what a reset puts in place of the state: h (L·D, O), of an LSTM (h, c) with c
        (L·D, H); such as a learned initial state.
    dropout_mask: (L·D, B, O), of the dtype of the input: recurrent dropout, the factors of h on its
        way into ``weight_hh``, 0 or 1/(1 - p). No gradient is computed for it.
    zoneout_mask: bool, where the old value is kept: (L·D, T, B, O) of h, of an LSTM (h, c) with
        (L·D, T, B, H) of c, each may be None; time first, whatever ``batch_first``.
    return_states: also return `States`, h and c of every layer at every step.
    return_saved: also return what the function's ``_backward`` needs, as the last value. Gradients
        then come from there alone: what torch sees of the outputs is detached.

Every function raises TypeError or ValueError that names the argument, what it was and what was
expected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._engine import Extras, States
from ._options import Options, check_bool, check_integers, make_options
from .calls import arrays
from .calls.arguments import is_torch, make_extras

if TYPE_CHECKING:
    from .calls.call import recurrent

__all__ = [
    "States",
    "gru",
    "gru_backward",
    "lstm",
    "lstm_backward",
    "recurrent",
    "rnn",
    "rnn_backward",
]


def rnn(
    input: Any,
    hx: Any,
    weights: Any,
    *,
    num_layers: int = 1,
    nonlinearity: str = "tanh",
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    layer_norm: bool = False,
    heads: int = 1,
    zoneout: float = 0.0,
    grad_clip: float | None = None,
    recompute: bool = False,
    lengths: Any = None,
    reset: Any = None,
    reset_hx: Any = None,
    dropout_mask: Any = None,
    zoneout_mask: Any = None,
    return_states: bool = False,
    return_saved: bool = False,
) -> tuple[Any, ...]:
    """An Elman network: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) (Elman 1990).

    Arguments:
        hx: h0 (L·D, B, H), or None for zeros.
        nonlinearity: f: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        input, weights and the others: see `fastrnn.functional`.

    Returns:
        ``output`` (T, B, D·H), as ``batch_first`` says, and ``h_n`` (L·D, B, H); then what
        ``return_states`` and ``return_saved`` ask for.

    >>> import numpy as np
    >>> one = np.ones((1, 1))
    >>> output, h_n = rnn(np.ones((3, 1, 1)), None, [one, one], bias=False, nonlinearity="relu")
    >>> output.numpy().ravel()
    array([1., 2., 3.])
    """
    options = _options(
        "RNN",
        num_layers,
        bidirectional,
        bias,
        activation=nonlinearity,
        layer_norm=layer_norm,
        heads=heads,
        zoneout=zoneout,
        grad_clip=grad_clip,
        recompute=recompute,
    )
    extras = make_extras(options, reset_hx, dropout_mask, zoneout_mask)
    given = (input, hx, weights, lengths, reset, extras)
    return _forward(options, given, batch_first, return_states, return_saved)


def lstm(
    input: Any,
    hx: Any,
    weights: Any,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    proj_size: int = 0,
    activation: str = "tanh",
    gate_activation: str = "sigmoid",
    peephole: bool = False,
    layer_norm: bool = False,
    heads: int = 1,
    zoneout: float | tuple[float, float] = 0.0,
    grad_clip: float | None = None,
    recompute: bool = False,
    lengths: Any = None,
    reset: Any = None,
    reset_hx: Any = None,
    dropout_mask: Any = None,
    zoneout_mask: Any = None,
    return_states: bool = False,
    return_saved: bool = False,
) -> tuple[Any, ...]:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; projection: Sak et al. 2014).

    Arguments:
        hx: ``(h0, c0)``, of shapes (L·D, B, O) and (L·D, B, H), or None for zeros.
        activation: of the candidate and of the cell's output: ``"tanh"``, ``"relu"``,
            ``"sigmoid"`` or ``"identity"``.
        gate_activation: ``"sigmoid"`` or ``"hardsigmoid"``.
        peephole: whether the gates see the cell state (Gers & Schmidhuber 2000).
        input, weights and the others: see `fastrnn.functional`.

    Returns:
        ``output`` (T, B, D·O), as ``batch_first`` says, and ``(h_n, c_n)``, shaped as ``hx``; then
        what ``return_states`` and ``return_saved`` ask for.

    >>> import numpy as np
    >>> w_ih, w_hh = np.zeros((4, 2)), np.zeros((4, 1))  # I = 2, H = 1: f = σ(0) = 1/2
    >>> x, h0, c0 = np.ones((3, 1, 2)), np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    >>> output, (h_n, c_n) = lstm(x, (h0, c0), [w_ih, w_hh], bias=False)
    >>> c_n.numpy().ravel()
    array([0.125])
    """
    options = _options(
        "LSTM",
        num_layers,
        bidirectional,
        bias,
        proj_size=proj_size,
        activation=activation,
        gate_activation=gate_activation,
        peephole=peephole,
        layer_norm=layer_norm,
        heads=heads,
        zoneout=zoneout,
        grad_clip=grad_clip,
        recompute=recompute,
    )
    extras = make_extras(options, reset_hx, dropout_mask, zoneout_mask)
    given = (input, hx, weights, lengths, reset, extras)
    return _forward(options, given, batch_first, return_states, return_saved)


def gru(
    input: Any,
    hx: Any,
    weights: Any,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    activation: str = "tanh",
    gate_activation: str = "sigmoid",
    reset_after: bool = True,
    layer_norm: bool = False,
    heads: int = 1,
    zoneout: float = 0.0,
    grad_clip: float | None = None,
    recompute: bool = False,
    lengths: Any = None,
    reset: Any = None,
    reset_hx: Any = None,
    dropout_mask: Any = None,
    zoneout_mask: Any = None,
    return_states: bool = False,
    return_saved: bool = False,
) -> tuple[Any, ...]:
    """Gated recurrent unit (Cho et al. 2014).

    Arguments:
        hx: h0 (L·D, B, H), or None for zeros.
        activation: of the candidate: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        gate_activation: ``"sigmoid"`` or ``"hardsigmoid"``.
        reset_after: whether the reset gate acts after the product with ``weight_hh``, as in
            ``torch.nn.GRU``, or before it, as in the paper.
        input, weights and the others: see `fastrnn.functional`.

    Returns:
        ``output`` (T, B, D·H), as ``batch_first`` says, and ``h_n`` (L·D, B, H); then what
        ``return_states`` and ``return_saved`` ask for.

    >>> import numpy as np
    >>> w_ih, w_hh = np.zeros((3, 2)), np.zeros((3, 1))  # I = 2, H = 1: z = σ(0) = 1/2, n = 0
    >>> output, h_n = gru(np.ones((3, 1, 2)), np.ones((1, 1, 1)), [w_ih, w_hh], bias=False)
    >>> output.numpy().ravel()
    array([0.5  , 0.25 , 0.125])
    """
    options = _options(
        "GRU",
        num_layers,
        bidirectional,
        bias,
        activation=activation,
        gate_activation=gate_activation,
        reset_after=reset_after,
        layer_norm=layer_norm,
        heads=heads,
        zoneout=zoneout,
        grad_clip=grad_clip,
        recompute=recompute,
    )
    extras = make_extras(options, reset_hx, dropout_mask, zoneout_mask)
    given = (input, hx, weights, lengths, reset, extras)
    return _forward(options, given, batch_first, return_states, return_saved)


def rnn_backward(
    d_output: Any, d_hx_n: Any, saved: Any, *, d_states: States | None = None
) -> tuple[Any, ...]:
    """The gradients of `rnn`'s arguments, by backpropagation through time (Werbos 1990).

    Arguments:
        d_output: gradient of ``output``, of its shape and dtype, or None for zeros.
        d_hx_n: gradient of ``h_n``, or None for zeros.
        saved: what `rnn` returned with ``return_saved=True``. The arrays that it was given must not
            have changed since.
        d_states: gradients of ``states``, each or all None for zeros.

    Returns:
        ``d_input``, ``d_h0`` (None where ``hx`` was None) and the list ``d_weights``; where
        ``reset_hx`` was given, then its gradient.

    >>> import numpy as np
    >>> one = np.ones((1, 1))
    >>> x = np.array([1.0, 2.0]).reshape(2, 1, 1)
    >>> output, h_n, saved = rnn(
    ...     x, None, [one, one], bias=False, nonlinearity="identity", return_saved=True
    ... )
    >>> d_input, d_h0, (d_w_ih, d_w_hh) = rnn_backward(None, np.ones((1, 1, 1)), saved)
    >>> d_w_ih.numpy(), d_w_hh.numpy()
    (array([[3.]]), array([[1.]]))
    """
    return _backward("RNN", d_output, d_hx_n, saved, d_states)


def lstm_backward(
    d_output: Any, d_hx_n: Any, saved: Any, *, d_states: States | None = None
) -> tuple[Any, ...]:
    """The gradients of `lstm`'s arguments, by backpropagation through time (Werbos 1990).

    Arguments:
        d_output: gradient of ``output``, of its shape and dtype, or None for zeros.
        d_hx_n: gradients of ``(h_n, c_n)``, each or all None for zeros.
        saved: what `lstm` returned with ``return_saved=True``. The arrays that it was given must
            not have changed since.
        d_states: gradients of ``states``, each or all None for zeros.

    Returns:
        ``d_input``, ``(d_h0, d_c0)`` (None where ``hx`` was None) and the list ``d_weights``; where
        ``reset_hx`` was given, then its gradients.

    >>> import numpy as np
    >>> w_ih, w_hh = np.zeros((4, 2)), np.zeros((4, 1))
    >>> x, h0, c0 = np.ones((3, 1, 2)), np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    >>> *_, saved = lstm(x, (h0, c0), [w_ih, w_hh], bias=False, return_saved=True)
    >>> d_input, (d_h0, d_c0), d_weights = lstm_backward(None, (None, np.ones((1, 1, 1))), saved)
    >>> d_c0.numpy().ravel()
    array([0.125])
    """
    return _backward("LSTM", d_output, d_hx_n, saved, d_states)


def gru_backward(
    d_output: Any, d_hx_n: Any, saved: Any, *, d_states: States | None = None
) -> tuple[Any, ...]:
    """The gradients of `gru`'s arguments, by backpropagation through time (Werbos 1990).

    Arguments:
        d_output: gradient of ``output``, of its shape and dtype, or None for zeros.
        d_hx_n: gradient of ``h_n``, or None for zeros.
        saved: what `gru` returned with ``return_saved=True``. The arrays that it was given must not
            have changed since.
        d_states: gradients of ``states``, each or all None for zeros.

    Returns:
        ``d_input``, ``d_h0`` (None where ``hx`` was None) and the list ``d_weights``; where
        ``reset_hx`` was given, then its gradient.

    >>> import numpy as np
    >>> w_ih, w_hh, h0 = np.zeros((3, 2)), np.zeros((3, 1)), np.ones((1, 1, 1))
    >>> *_, saved = gru(np.ones((3, 1, 2)), h0, [w_ih, w_hh], bias=False, return_saved=True)
    >>> d_input, d_h0, d_weights = gru_backward(None, np.ones((1, 1, 1)), saved)
    >>> d_h0.numpy().ravel()
    array([0.125])
    """
    return _backward("GRU", d_output, d_hx_n, saved, d_states)


def _options(cell: Any, num_layers: int, bidirectional: bool, bias: bool, **others: Any) -> Options:
    check_integers(num_layers=num_layers, proj_size=others.get("proj_size", 0))
    try:
        return make_options(
            cell,
            num_layers=num_layers,
            bidirectional=bool(bidirectional),
            bias=bool(bias),
            **others,
        )
    except ValueError as error:  # an RNN's activation goes by another name here
        if cell == "RNN" and str(error).startswith("activation"):
            raise ValueError(f"nonlinearity{str(error)[len('activation') :]}") from None
        raise


def _forward(
    options: Options,
    given: tuple[Any, Any, Any, Any, Any, Extras],
    batch_first: bool,
    return_states: bool,
    return_saved: bool,
) -> tuple[Any, ...]:
    """The call, given input, hx, weights, lengths, reset and extras."""
    check_bool("return_states", return_states)
    check_bool("return_saved", return_saved)
    route: Any = arrays
    if is_torch(given[0]):
        from .calls import tensors as route
    output, hx_n, states, saved = route.forward(
        options,
        *given,
        batch_first=batch_first,
        return_states=return_states,
        return_saved=return_saved,
    )
    more = ([states] if return_states else []) + ([saved] if return_saved else [])
    return (output, hx_n if options.cell == "LSTM" else hx_n[0], *more)


def _backward(cell: str, d_output: Any, d_hx_n: Any, saved: Any, d_states: Any) -> tuple[Any, ...]:
    options = getattr(saved, "options", None)
    if not isinstance(options, Options) or options.cell != cell:
        name = cell.lower()
        raise TypeError(
            f"saved must be what {name}(…, return_saved=True) returned last, got "
            f"{type(saved).__name__ if options is None else f'that of {options.cell.lower()}'}"
        )
    if cell != "LSTM":
        d_hx_n = (d_hx_n,)
    elif d_hx_n is None:
        d_hx_n = (None, None)
    elif not isinstance(d_hx_n, (tuple, list)) or len(d_hx_n) != 2:
        raise TypeError(f"d_hx_n must be None or a pair, (d_h_n, d_c_n), got {d_hx_n!r:.40}")
    if d_states is None:
        d_states = States(None, None)
    elif not isinstance(d_states, (tuple, list)) or len(d_states) != 2:
        raise TypeError(f"d_states must be None or States, (d_h, d_c), got {d_states!r:.40}")
    route: Any = arrays
    if not isinstance(saved, arrays.Saved):
        from .calls import tensors as route
    d_input, d_hx, d_weights, d_reset = route.backward(d_output, tuple(d_hx_n), saved, d_states)
    if cell != "LSTM":
        d_hx, d_reset = (None if d is None else d[0] for d in (d_hx, d_reset))
    return (d_input, d_hx, d_weights) if d_reset is None else (d_input, d_hx, d_weights, d_reset)


def __getattr__(name: str) -> Any:
    if name != "recurrent":  # imported, torch with it, when first used
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .calls.call import recurrent

    globals()[name] = recurrent
    return recurrent
