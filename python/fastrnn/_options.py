"""What a stack of recurrent layers computes, apart from the sizes of its data."""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, get_args

Cell = Literal["RNN", "LSTM", "GRU"]
Activation = Literal["tanh", "relu", "sigmoid", "identity"]
GateActivation = Literal["sigmoid", "hardsigmoid"]
Shape = tuple[int, ...]

MOST_LAYERS = 2**16  # more would take for ever to name
GATES: dict[Cell, int] = {"RNN": 1, "LSTM": 4, "GRU": 3}

# Options that int8 kernels support, and options that have no effect on inference.
_INT8_OPTIONS = {
    "cell",
    "num_layers",
    "bidirectional",
    "bias",
    "proj_size",
    "activation",
    "gate_activation",
    "reset_after",
    "grad_clip",
    "recompute",
}


@dataclass(frozen=True, slots=True)
class Options:
    """Everything about a stack that is not a size of the data; hashable.

    Attributes:
        cell: ``"RNN"``, ``"LSTM"`` or ``"GRU"``.
        num_layers: layers in the stack, at least 1 and at most 65,536.
        bidirectional: whether each layer also runs backwards in time.
        bias: whether the weights contain ``b_ih`` and ``b_hh``.
        proj_size: size of the projected state; 0 means no projection. LSTM alone.
        activation: the candidate and cell-output function, of an RNN its nonlinearity:
            ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        gate_activation: ``"sigmoid"``, or ``"hardsigmoid"``, which is clip(x/6 + 1/2, 0, 1).
        reset_after: GRU alone: whether the reset gate acts after the matrix product.
        peephole: LSTM alone: whether the gates see c (Gers & Schmidhuber 2000).
        layer_norm: whether the pre-activations are normalised (Ba et al. 2016).
        heads: how many blocks the recurrent weights have on their diagonal.
        zoneout_h: probability that a unit of h keeps its old value (Krueger et al. 2017). Without
            a mask the expectation is taken.
        zoneout_c: the same for c; LSTM alone.
        grad_clip: limit of the gradients of h and c at every step (Graves 2013); 0: none.
        recompute: whether backward computes the gates again instead of keeping them.

    Raises:
        ValueError: an argument is not among the values above.
        TypeError: an argument is of another type.

    >>> Options("GRU", num_layers=2).gate_activation
    'sigmoid'
    """

    cell: Cell
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    activation: str = "tanh"
    gate_activation: str = "sigmoid"
    reset_after: bool = True
    peephole: bool = False
    layer_norm: bool = False
    heads: int = 1
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    grad_clip: float = 0.0
    recompute: bool = False

    def __post_init__(self) -> None:
        _check_choice("cell", self.cell, get_args(Cell))
        _check_choice("activation", self.activation, get_args(Activation))
        _check_choice("gate_activation", self.gate_activation, get_args(GateActivation))
        for name in ("reset_after", "peephole", "layer_norm", "recompute"):
            check_bool(name, getattr(self, name))
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"num_layers must be at most {MOST_LAYERS}, got {self.num_layers}")
        if self.proj_size < 0:
            raise ValueError(f"proj_size must be 0 or a positive integer, got {self.proj_size}")
        for name in ("proj_size", "peephole", "zoneout_c"):
            value = getattr(self, name)
            if value and self.cell != "LSTM":
                raise ValueError(
                    f"{name} is only supported for LSTM, got {name}={value} with cell {self.cell!r}"
                )
        for name in ("zoneout_h", "zoneout_c"):
            check_probability(name, getattr(self, name))
        if not self.grad_clip >= 0:
            raise ValueError(f"grad_clip must be 0 or a positive number, got {self.grad_clip}")
        check_heads(self.heads, proj_size=self.proj_size)

    @property
    def text(self) -> str:
        """The options by name, without those at their defaults; `parse` reads it.

        >>> Options("LSTM", num_layers=2, bidirectional=True).text
        'LSTM num_layers=2 bidirectional=True'
        """
        parts: list[str] = [self.cell]
        for name, default in _DEFAULTS:
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value}")
        return " ".join(parts)

    @property
    def gates(self) -> int:
        """G, how many pre-activations a hidden unit has."""
        return GATES[self.cell]

    @property
    def directions(self) -> int:
        """D, 2 where each layer also runs backwards in time."""
        return 2 if self.bidirectional else 1

    @property
    def beyond_the_cells(self) -> bool:
        """Whether a forward step is more than one of the CPU engine's fused cells."""
        return self.heads > 1 or self.beyond_heads

    @property
    def beyond_heads(self) -> bool:
        """The same, with heads, which the CUDA kernels support."""
        return self.peephole or self.layer_norm or self.zoneout_h > 0 or self.zoneout_c > 0

    @property
    def in_torch_nn(self) -> bool:
        """Whether torch.nn has a layer or a cell that takes such a step."""
        activations = ("tanh", "relu") if self.cell == "RNN" else ("tanh",)
        return (
            self.activation in activations
            and self.gate_activation == "sigmoid"
            and self.reset_after
            and not self.beyond_the_cells
            and self.grad_clip == 0
        )

    def weight_shapes(self, width: int, hidden_size: int) -> dict[str, Shape]:
        """The weights of one layer and direction by name: torch's in torch's order, then our own.

        Arguments:
            width: the size of the layer's input.
            hidden_size: H.
        """
        rows, out, heads = self.gates * hidden_size, self.proj_size or hidden_size, self.heads
        shapes: dict[str, Shape] = {"weight_ih": (rows, width)}
        shapes["weight_hh"] = (rows, out) if heads == 1 else (heads, rows // heads, out // heads)
        if self.bias:
            shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (rows,))
        if self.proj_size:
            shapes["weight_hr"] = (out, hidden_size)
        if self.peephole:
            shapes |= dict.fromkeys(("weight_ci", "weight_cf", "weight_co"), (hidden_size,))
        if self.layer_norm:
            shapes |= dict.fromkeys(("norm_ih", "norm_hh"), (rows,))
            if self.cell == "LSTM":
                shapes |= dict.fromkeys(("norm_c", "norm_c_bias"), (hidden_size,))
        return shapes

    @property
    def weight_kinds(self) -> tuple[str, ...]:
        """The names of `weight_shapes`."""
        return tuple(self.weight_shapes(0, 0))


# Every field but the cell with its default.
_DEFAULTS: tuple[tuple[str, Any], ...] = tuple(
    (field.name, field.default) for field in fields(Options)[1:]
)
_PARSERS: dict[type, Any] = {bool: "True".__eq__, int: int, float: float, str: str}


@lru_cache(maxsize=256)
def int8_lacks(options: Options) -> str | None:
    """An option that int8 does not support, as ``"name=value"``; None: it supports all.

    >>> int8_lacks(Options("LSTM", peephole=True))
    'peephole=True'
    """
    for field in fields(options):
        default, value = field.default, getattr(options, field.name)
        if field.name not in _INT8_OPTIONS and default is not MISSING and value != default:
            return f"{field.name}={value!r}"
    return None


def parse(text: str) -> Options:
    """The options that `Options.text` describes.

    Raises:
        ValueError: a name or a value that `Options` does not have.

    >>> parse("GRU reset_after=False").reset_after
    False
    """
    cell, *parts = text.split(" ")
    kinds = {name: type(default) for name, default in _DEFAULTS}
    values = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in kinds:
            raise ValueError(f"options: expected names of {', '.join(kinds)}, got {part!r}")
        values[name] = _PARSERS[kinds[name]](value)
    return Options(cell, **values)  # type: ignore[arg-type]


def make_options(
    cell: Cell, *, zoneout: Any = 0.0, grad_clip: Any = None, **fields: Any
) -> Options:
    """Options from the arguments of layers, cells and functions.

    Arguments:
        zoneout: a number, of an LSTM for both h and c, or its pair (h, c).
        grad_clip: a positive number, or None.
        fields: the others, by the names of `Options`.
    """
    if grad_clip is not None:
        if not is_number(grad_clip):
            kind = type(grad_clip).__name__
            raise TypeError(f"grad_clip must be None or a number, got {kind}")
        if not grad_clip > 0:
            raise ValueError(f"grad_clip must be None or greater than 0, got {grad_clip}")
    for name in {"num_layers", "proj_size"} & set(fields):
        fields[name] = operator.index(fields[name])  # of NumPy's integers and bools, as torch.nn
    zoneout_h, zoneout_c = _zoneout_pair(cell, zoneout)
    return Options(
        cell,
        zoneout_h=zoneout_h,
        zoneout_c=zoneout_c,
        grad_clip=0.0 if grad_clip is None else float(grad_clip),
        **fields,
    )


def _zoneout_pair(cell: Cell, zoneout: Any) -> tuple[float, float]:
    """The probabilities of h and of c."""
    if not isinstance(zoneout, (tuple, list)):
        check_probability("zoneout", zoneout)
        return float(zoneout), float(zoneout) if cell == "LSTM" else 0.0
    if cell != "LSTM":
        raise ValueError(
            f"zoneout must be one number: of {cell} there is no c, got {tuple(zoneout)}"
        )
    if len(zoneout) != 2:
        raise ValueError(f"zoneout must be a number or a pair (h, c), got {tuple(zoneout)}")
    for value in zoneout:
        check_probability("zoneout", value)
    return float(zoneout[0]), float(zoneout[1])


def is_number(value: Any) -> bool:
    """Whether it is a real number; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_probability(argument: str, value: Any) -> None:
    """Refuse what is no number from 0 to 1."""
    if not is_number(value):
        raise TypeError(f"{argument} must be a number from 0 to 1, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{argument} must be a number from 0 to 1, got {value}")


def check_bool(argument: str, value: Any) -> None:
    """Refuse what is no bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be a bool, got {type(value).__name__}")


def check_integers(**sizes: Any) -> None:
    """Refuse what is no integer; of layers torch.nn's own errors say so."""
    for name, value in sizes.items():
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_forget_bias(value: Any, bias: bool) -> None:
    """Refuse what is neither None nor a finite number, or has no bias to go to."""
    if value is None:
        return
    if not is_number(value):
        raise TypeError(f"forget_bias must be None or a number, got {type(value).__name__}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        finite = False
    if not finite:
        raise ValueError(f"forget_bias must be None or a finite number, got {value}")
    if not bias:
        raise ValueError(f"forget_bias must be None where bias=False, got {value}")


def check_heads(heads: Any, **sizes: int) -> None:
    """Refuse a number of heads that is no positive integer or does not divide the sizes."""
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"heads must be an int, got {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    for name, size in sizes.items():
        if size % heads:
            raise ValueError(f"heads must divide {name}, got heads={heads} and {name}={size}")


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{argument} must be one of {names}, got {value!r}")
