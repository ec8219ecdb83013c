"""What a case is, what it costs in arithmetic, and the suites shipped with the package."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, cast

from fastrnn._options import Options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastrnn._options import Cell

Pass = Literal["inference", "training"]
PASSES: tuple[Pass, ...] = ("inference", "training")
CELLS = ("LSTM", "GRU", "RNN")
STEPS: dict[str, tuple[float, float]] = {
    # Cells that are torch modules (see step_providers.py): how many matrices of H rows multiply
    # the input in a step, and how many of H columns the state.
    "sLSTM": (4, 4),
    "MGU": (2, 2),
    "GRU-D": (7 / 3, 3),  # of the input's three parts one fades h, and two go to three gates
    "CfC": (1, 5),
    "NormGRU": (3, 3 / 4),  # in four heads
    "IndRNN": (1, 0),
    "LEM": (4, 4),
    "NAS": (8, 8),
    "PlainGRU": (3, 3),
    "PlainLSTM": (4, 4),
}
DTYPES = ("float32", "float64", "bfloat16", "float16")
PRECISIONS = (*DTYPES, "tf32")  # tf32: float32 in which a CUDA device multiplies by TF32
ELEMENT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Products:
    """One layer's matrix products in one forward pass, all its directions and members together."""

    projection: float  # multiplications and additions of x·W_ihᵀ
    recurrence: float  # and of h·W_hhᵀ
    weight_ih: int  # bytes of W_ih
    weight_hh: int  # and of W_hh


@dataclass(frozen=True)
class Case:
    """One stack of recurrent layers on one size of data.

    `T` steps, `B` rows, `I` input size, `H` hidden size. The fields after `dtype` are options that
    only some cases use: `reset_rate` is the share of (step, row) pairs at which an episode begins,
    `lengths` gives each row a length from 1 to T, `members` is the size of an ensemble that reads
    the same input, `tf32` lets a CUDA device multiply float32 by TF32 products.
    """

    cell: str
    T: int
    B: int
    I: int  # noqa: E741 - the field's name for the input size
    H: int
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    nonlinearity: str = "tanh"
    heads: int = 1
    reset_rate: float = 0.0
    lengths: bool = False
    layer_norm: bool = False
    members: int = 1
    tf32: bool = False

    @property
    def stack(self) -> Options:
        """What our layer for the case computes."""
        return Options(
            cast("Cell", self.cell),
            self.layers,
            self.bidirectional,
            activation=self.nonlinearity,
            layer_norm=self.layer_norm,
            heads=self.heads,
        )

    @property
    def is_step(self) -> bool:
        """Whether the cell is a torch module that takes a step, and none of our layers."""
        return self.cell in STEPS

    @property
    def matrices(self) -> tuple[float, float]:
        """How many matrices of H rows multiply the input in a step, and the state."""
        if self.is_step:
            return STEPS[self.cell]
        return self.stack.gates, self.stack.gates / self.heads

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def options(self) -> list[str]:
        """What of the case torch.nn's layers have no argument for."""
        chosen = {
            "heads": self.heads > 1,
            "resets": self.reset_rate > 0,
            "lengths": self.lengths,
            "layer norm": self.layer_norm,
            "members": self.members > 1,
        }
        return [name for name, is_on in chosen.items() if is_on]

    @property
    def precision(self) -> str:
        """What `--dtype` calls it: the dtype, or tf32."""
        return "tf32" if self.tf32 else self.dtype

    def in_precision(self, name: str) -> Case:
        """The case in one of `PRECISIONS`."""
        return replace(self, dtype="float32" if name == "tf32" else name, tf32=name == "tf32")

    def as_record(self) -> dict[str, Any]:
        """The case as the JSON names it: eight entries, and options that are not the default."""
        optional = {f.name: f.default for f in fields(self)[8:]}
        return {k: v for k, v in asdict(self).items() if k not in optional or v != optional[k]}

    def label(self) -> str:
        """One line for tables: ``LSTM T100 B32 I256 H256``, then whatever is not the default."""
        sizes = f"{self.cell} T{self.T} B{self.B} I{self.I} H{self.H}"
        extras = (
            (self.layers != 1, f"L{self.layers}"),
            (self.bidirectional, "bi"),
            (self.nonlinearity != "tanh", self.nonlinearity),
            (self.heads != 1, f"heads{self.heads}"),
            (self.reset_rate > 0, f"reset{self.reset_rate:g}"),
            (self.lengths, "lengths"),
            (self.layer_norm, "layernorm"),
            (self.members != 1, f"members{self.members}"),
            (self.precision != "float32", self.precision),
        )
        return " ".join([sizes, *(text for shown, text in extras if shown)])

    def flops(self, pass_: Pass) -> float:
        """Multiplications and additions of the matrix products, cells not counted.

        Forward: 2·G·H·(I + H/heads) per step, row and direction, I being D·H above the first layer,
        for each member; of rows with lengths, half of that, as their steps are on average. Of a
        cell that is a torch module, as many products as `STEPS` says.
        Training is three times as much: forward, gradients of data, gradients of weights.
        """
        forward = sum(p.projection + p.recurrence for p in self.products())
        return forward * (3.0 if pass_ == "training" else 1.0)

    def products(self) -> list[Products]:
        """What each layer multiplies, forward."""
        layers = []
        size = ELEMENT_BYTES[self.dtype]
        pairs = 2.0 * self.B * (0.5 * (self.T + 1) if self.lengths else self.T)
        of_input, of_state = self.matrices
        rows = self.members * self.directions * self.H
        for layer in range(self.layers):
            inputs = self.I if layer == 0 else self.directions * self.H
            weight_ih, weight_hh = round(of_input * rows * inputs), round(of_state * rows * self.H)
            layers.append(
                Products(
                    projection=pairs * weight_ih,
                    recurrence=pairs * weight_hh,
                    weight_ih=size * weight_ih,
                    weight_hh=size * weight_hh,
                )
            )
        return layers

    def intensity(self, pass_: Pass) -> float:
        """Multiplications and additions for each byte of weights that streams by.

        W_hh streams by once a step, since a step needs the one before; W_ih once, for all steps.
        Training has that twice, forward and for the gradients of data; the products for the
        gradients of weights stream no weights. For long sequences and I = H this is B flop a byte
        in float32 inference, of which the recurrence alone has 2·B / 4.
        """
        streamed = sum(p.weight_ih + self.T * p.weight_hh for p in self.products())
        return self.flops(pass_) / (streamed * (2.0 if pass_ == "training" else 1.0))


def cell_named(name: str) -> str | None:
    """The cell of that name, in capitals or not.

    >>> cell_named("slstm")
    'sLSTM'
    """
    return next((cell for cell in (*CELLS, *STEPS) if cell.upper() == name.upper()), None)


def load_suites() -> dict[str, list[Case]]:
    """Every suite of the package's data file, by name.

    >>> [case.label() for case in load_suites()["fastrnns"]]
    ['LSTM T100 B64 I512 H512']
    """
    text = (resources.files("fastrnn.bench") / "suites.json").read_text(encoding="utf-8")
    return {name: [Case(**case) for case in cases] for name, cases in json.loads(text).items()}


def select(
    suites: Mapping[str, Sequence[Case]],
    names: Sequence[str],
    cells: Sequence[str],
    dtypes: Sequence[str],
) -> list[tuple[str, Case]]:
    """The cases of the named suites whose cell is wanted, once per dtype of `PRECISIONS`.

    Raises:
        ValueError: a name is not a suite, or nothing is left.
    """
    for name in names:
        if name not in suites:
            raise ValueError(f"suite {name!r} is not known; there are: {', '.join(suites)}")
    chosen = [
        (name, case.in_precision(dtype))
        for name in dict.fromkeys(names)
        for dtype in dtypes
        for case in suites[name]
        if case.cell in cells
    ]
    if not chosen:
        raise ValueError(
            f"no case left: suite {', '.join(names)} has no case with cell {', '.join(cells)}"
        )
    return chosen
