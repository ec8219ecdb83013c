"""`Stream`: a stack of recurrent layers that runs one step per call.

A step runs in C++ (csrc/bind/stream.h); this module checks the arguments of a stream. It does not
import torch: for a stream of a layer torch is imported already, and a stream of NumPy weights does
not need it.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _C
from ._engine import engine_options
from ._options import Options, check_integers, int8_lacks, make_options
from .calls.arguments import REAL, check_number_of_weights, is_torch, weight_names
from .calls.by_program import step_programs

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = (*REAL, "int8")
_MOST_ROWS = 2**31 - 1  # the engine's limit


class Stream:
    """Runs layers one step per call: weights packed once, states kept, no allocation in a step.

    For live data: each call of `step` takes the next input of every row and returns the output of
    the last layer. In the layer's dtype, or another floating dtype to which the weights are
    converted, the outputs equal, to the last bit, those of the layer in that dtype and in
    ``eval()`` over the whole sequence. With int8 they approximate them, with a quarter of the
    memory to read.

    Arguments:
        layer: `fastrnn.RNN`, `LSTM` or `GRU` on the CPU, in one direction; or a layer from
            `fastrnn.quantize_dynamic`, whose memory the stream uses. A stream always runs
            inference, even if the layer is in training mode: it records no gradient and applies no
            dropout.
        batch_size: B, the number of rows.
        dtype: None for the layer's; ``torch.float32``, ``float64``, ``bfloat16`` or ``float16``, as
            torch's dtype or by name; or ``"int8"``: int8 weights with one scale per row; for each
            product x and h are quantised to int8 with one scale per row; integer sums are exact;
            states, biases and the cell are float32. x is then float32.

    Attributes:
        batch_size: B.
        dtype: its name, for example ``"float32"``.

    The stream packs the weights when it is constructed; `refresh` packs the current weights. Only
    one thread at a time may use a stream; streams of one layer are independent of each other.

    Raises:
        TypeError: layer is not a fastrnn layer, batch_size is not an int, dtype is not a dtype.
        ValueError: the layer is bidirectional, not on the CPU, or has an option that int8 does not
            support; batch_size is below 1 or above 2³¹ - 1; dtype is not supported.
        MemoryError: the rows do not fit into memory.

    >>> import torch
    >>> import fastrnn
    >>> layer = fastrnn.GRU(3, 4)
    >>> stream = fastrnn.Stream(layer)
    >>> x = torch.randn(5, 1, 3)
    >>> steps = torch.stack([stream.step(x_t).clone() for x_t in x])
    >>> torch.equal(steps, layer(x)[0])
    True
    """

    batch_size: int
    dtype: str

    def __init__(self, layer: Any, batch_size: int = 1, dtype: Any = None) -> None:
        self._open(_Layer(layer), batch_size, dtype)

    @classmethod
    def from_weights(
        cls,
        cell: str,
        weights: Sequence[Any],
        *,
        num_layers: int = 1,
        bias: bool = True,
        proj_size: int = 0,
        batch_size: int = 1,
        dtype: Any = None,
        **options: Any,
    ) -> Stream:
        """Make a stream from arrays of weights; torch is not needed.

        Arguments:
            cell: ``"RNN"``, ``"LSTM"`` or ``"GRU"``.
            weights: the flat list of `fastrnn.functional`, as arrays of any library.
            num_layers, bias, proj_size: as in `fastrnn.functional`.
            batch_size, dtype: as above; None: the dtype of the weights.
            options: the other options of the cell's function in `fastrnn.functional`, such as
                ``nonlinearity``, ``activation``, ``gate_activation`` or ``reset_after``.

        Raises:
            TypeError, ValueError: as above; or an option does not exist or has an invalid value, or
                the weights have a wrong number or shape. The error names the argument.

        >>> import numpy as np
        >>> one = np.ones((1, 1), np.float32)
        >>> stream = Stream.from_weights("RNN", [one, one], bias=False, nonlinearity="identity")
        >>> [stream.step(one).item() for _ in range(3)]
        [1.0, 2.0, 3.0]
        """
        if cell == "RNN" and "nonlinearity" in options:
            options["activation"] = options.pop("nonlinearity")
        known = {field.name for field in fields(Options)} - {"zoneout_h", "zoneout_c"} | {"zoneout"}
        if options.pop("bidirectional", False):
            raise ValueError("bidirectional must be False: a stream cannot run backwards")
        for name in options:
            if name not in known:
                raise TypeError(f"from_weights has no option {name!r}")
        check_integers(num_layers=num_layers, proj_size=proj_size)
        described = make_options(
            cell,  # type: ignore[arg-type]
            num_layers=num_layers,
            bias=bias,
            proj_size=proj_size,
            **options,
        )
        stream = cls.__new__(cls)
        stream._open(_Arrays(described, weights), batch_size, dtype)
        return stream

    def _open(self, source: _Layer | _Arrays, batch_size: Any, dtype: Any) -> None:
        options = source.options
        if options.bidirectional:
            raise ValueError("layer must not be bidirectional: a stream cannot run backwards")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size must be an int, got {type(batch_size).__name__}")
        if not 1 <= batch_size <= _MOST_ROWS:
            raise ValueError(
                f"batch_size must be at least 1 and at most {_MOST_ROWS}, got {batch_size}"
            )
        weights = source.weights()
        name = _dtype_name(source.dtype if dtype is None else dtype)
        if name != "int8" and source.dtype == "int8":
            raise ValueError(f"dtype: a quantised layer runs with int8 alone, got {name!r}")
        if name == "int8":
            lacking = int8_lacks(options)
            if lacking:
                raise ValueError(f"dtype: int8 does not support {lacking}; use a floating dtype")
        self.batch_size, self.dtype = batch_size, name
        self._source = source
        self._storage = "float32" if name == "int8" else name
        weights = self._stored(weights)
        self._engine = _C.Stream(
            engine_options(options, int8=name == "int8"),
            weights,
            batch_size,
            self._storage,
            source.threads(),
            _view,
            step_programs(options, weights),
        )
        self._take_initial_state()
        self.reset()
        if type(self).step is Stream.step:  # call the engine without a Python frame
            self.step = self._engine.step  # type: ignore[method-assign, assignment]

    def step(self, x: Any) -> Any:
        """Run one step for every row.

        Arguments:
            x: (B, I), a torch tensor, a NumPy array or another array with ``__dlpack__``, with any
                strides, in the stream's dtype (float32 for an int8 stream).

        Returns:
            The output of the last layer, (B, O), an array of the type of x. It is the stream's own
            memory, **which the next step overwrites**: copy what you want to keep. You may write to
            it, and pass it as the next x.

        Raises:
            TypeError: x is not an array, or has another dtype.
            ValueError: x has another shape, or is not in host memory.
            RuntimeError: another thread is running a step.
        """
        return self._engine.step(x)

    def reset(self, rows: Any = None) -> None:
        """Reset rows to the initial state: zeros, or the layer's learned initial state.

        Arguments:
            rows: bool (B,), True for each row to reset, or the indices of the rows; None: all.

        Raises:
            TypeError: rows contains neither bools nor integers.
            ValueError: the shape of a mask is not (B,).
            IndexError: a row index is out of range.
        """
        self._engine.reset(None if rows is None else self._mask(rows))

    def _mask(self, rows: Any) -> Any:
        try:
            rows = np.asarray(rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"rows must be bools or integers: {error}") from error
        if rows.dtype == np.bool_:
            if rows.shape != (self.batch_size,):
                raise ValueError(f"rows must have shape ({self.batch_size},), got {rows.shape}")
            return rows
        if rows.dtype.kind not in "iu" and rows.size:
            raise TypeError(f"rows must be bools or integers, got {rows.dtype}")
        mask = np.zeros(self.batch_size, np.bool_)
        for row in rows.ravel().tolist():
            if not -self.batch_size <= row < self.batch_size:
                raise IndexError(f"rows: there is no row {row} of {self.batch_size}")
            mask[row] = True
        return mask

    @property
    def state(self) -> Any:
        """A copy of the states after the last step: h (L, B, O); for an LSTM (h, c), c (L, B, H).

        The states are torch tensors if the weights are, else NumPy arrays. For half types c is
        float32, as inside the engine, so that a stream whose state is assigned back continues with
        the same bits. To set the states, assign arrays of the same shapes and dtypes; c may also
        have the stream's dtype.
        """
        states = tuple(
            state.torch() if self._source.torch else state.numpy() for state in self._engine.state()
        )
        return states if len(states) == 2 else states[0]

    @state.setter
    def state(self, value: Any) -> None:
        h, c = value, None
        if self._source.options.cell == "LSTM":
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                got = f"{len(value)} of them" if isinstance(value, (tuple, list)) else repr(value)
                raise TypeError(f"state must be two arrays, (h, c), got {got:.40}")
            h, c = value
            c = self._wide(_settled(c))
        self._engine.set_state(_settled(h), c)

    def _wide(self, c: Any) -> Any:
        """c as float32 if it has a half type."""
        half = self._storage in ("bfloat16", "float16")
        given = str(getattr(c, "dtype", "")).removeprefix("torch.")
        return _converted(c, "float32") if half and given == self._storage else c

    def refresh(self) -> None:
        """Pack the current weights and learned initial state. The states do not change.

        Raises:
            TypeError, ValueError: a weight is None, has another shape than before, or is not on the
                CPU.
        """
        weights = self._stored(self._source.weights())
        self._engine.pack(weights, step_programs(self._source.options, weights))
        self._take_initial_state()

    def _stored(self, weights: list[Any]) -> list[Any]:
        """The weights as the engine takes them: in the stream's dtype, or packed already."""
        if self._source.dtype == "int8":
            return weights
        return [_converted(weight, self._storage) for weight in weights]

    def _take_initial_state(self) -> None:
        h, c = self._source.initial_state()
        h = None if h is None else _converted(h, self._storage)
        wide = "float64" if self._storage == "float64" else "float32"
        self._engine.set_initial(h, None if c is None else _converted(c, wide))

    def __repr__(self) -> str:
        return f"Stream({self._source!r}, batch_size={self.batch_size}, dtype={self.dtype!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy packs the weights that are current when it is made, and has the present state."""
        return _restored, (type(self), self._source, self.batch_size, self.dtype, self.state)


def _restored(
    cls: type[Stream], source: _Layer | _Arrays, batch_size: int, dtype: str, state: Any
) -> Stream:
    stream = cls.__new__(cls)
    stream._open(source, batch_size, dtype)
    stream.state = state
    return stream


# ---- sources of the weights ---------------------------------------------------------------------


class _Layer:
    """A fastrnn layer, whose weights are read whenever they are packed."""

    torch = True

    def __init__(self, layer: Any) -> None:
        module = sys.modules.get("fastrnn.layers.forms")  # imported, if layer is a fastrnn layer
        if module is None or module.EveryForm not in type(layer).__mro__:
            hint = "; fastrnn.convert makes one from it" if _is_torch_module(layer) else ""
            raise TypeError(
                f"layer must be a fastrnn.RNN, LSTM or GRU, got {type(layer).__name__}{hint}"
            )
        self._layer = layer

    @property
    def options(self) -> Options:
        options: Options = self._layer._options
        return options

    @property
    def dtype(self) -> Any:
        """Of the weights; "int8" of a quantised layer."""
        quantised = hasattr(self._layer, "packed")
        return "int8" if quantised else self.weights()[0].dtype

    def weights(self) -> list[Any]:
        """The flat list; of a quantised layer its packed weights."""
        packed = hasattr(self._layer, "packed")
        names = ["packed"] if packed else self._layer._flat_weights_names
        weights = [getattr(self._layer, name) for name in names]
        for name, weight in zip(names, weights, strict=True):
            if weight is None:
                raise TypeError(f"{name} must be a Tensor, got None")
            if weight.device.type != "cpu":
                raise ValueError(
                    f"layer must be on the CPU, got {weight.device}; move it with layer.cpu()"
                )
        return weights

    def initial_state(self) -> tuple[Any, Any]:
        """The learned state, (L, 1, O) and (L, 1, H), or None for zeros."""
        return getattr(self._layer, "h_0", None), getattr(self._layer, "c_0", None)

    def threads(self) -> Any:
        return sys.modules["torch"].get_num_threads

    def __repr__(self) -> str:
        return repr(self._layer)


class _Arrays:
    """A flat list of arrays."""

    def __init__(self, options: Options, weights: Any) -> None:
        check_number_of_weights(options, weights)
        for name, weight in zip(weight_names(options), weights, strict=True):
            if not hasattr(weight, "__dlpack__") or not hasattr(weight, "dtype"):
                raise TypeError(
                    f"{name} must be an array (NumPy or another with __dlpack__), "
                    f"got {weight!r:.40}"
                )
        self.options, self._weights = options, tuple(weights)
        self.torch = is_torch(weights[0])

    @property
    def dtype(self) -> Any:
        return self._weights[0].dtype

    def weights(self) -> list[Any]:
        return list(self._weights)

    def initial_state(self) -> tuple[Any, Any]:
        return None, None

    def threads(self) -> Any:
        return sys.modules["torch"].get_num_threads if self.torch else None

    def __repr__(self) -> str:
        return repr(self.options.cell)


def _is_torch_module(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.nn.RNNBase)


# ---- dtypes -------------------------------------------------------------------------------------


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype of torch or NumPy, or of a dtype given by name."""
    name = dtype if isinstance(dtype, str) else str(dtype)
    if not isinstance(dtype, str) and not name.startswith("torch."):
        try:
            name = np.dtype(dtype).name
        except TypeError:
            raise TypeError(
                f"dtype must be a dtype or the name of one, got {dtype!r:.40}"
            ) from None
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return name


def _converted(array: Any, dtype: str) -> Any:
    """The array in that dtype; the array itself if it has that dtype."""
    if is_torch(array):
        return _settled(array.detach().to(getattr(sys.modules["torch"], dtype)))
    if str(array.dtype) == dtype:
        return array
    target: Any = dtype
    if dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError(
                "dtype: NumPy has no bfloat16; install ml_dtypes, or pass torch tensors as weights"
            ) from None
        target = ml_dtypes.bfloat16
    return np.asarray(array).astype(target)


def _settled(array: Any) -> Any:
    """The array; for a torch tensor with a pending negation, its resolved values."""
    return array.resolve_neg() if is_torch(array) else array


def _view(output: _C.Tensor, x: Any) -> Any:
    """The result of steps for arrays of x's type: the output's memory as that type."""
    if is_torch(x):
        with sys.modules["torch"].inference_mode(False):  # so that autograd may use it later
            return output.torch()
    return output.numpy() if isinstance(x, np.ndarray) else output
