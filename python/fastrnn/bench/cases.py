"""The definition of a case, its arithmetic cost, and the suites of the package."""

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
    # Cells that are torch modules (see step_providers.py): the number of matrices with H rows that
    # multiply the input in a step, and of matrices with H columns that multiply the state.
    "sLSTM": (4, 4),
    "MGU": (2, 2),
    "GRU-D": (7 / 3, 3),  # one of the input's three parts decays h, and two enter three gates
    "CfC": (1, 5),
    "NormGRU": (3, 3 / 4),  # in four heads
    "IndRNN": (1, 0),
    "LEM": (4, 4),
    "NAS": (8, 8),
    "PlainGRU": (3, 3),
    "PlainLSTM": (4, 4),
}
DTYPES = ("float32", "float64", "bfloat16", "float16")
PRECISIONS = (*DTYPES, "tf32")  # tf32: float32 with TF32 products on a CUDA device
ELEMENT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Products:
    """One layer's matrix products in one forward pass, summed over directions and members."""

    projection: float  # multiplications and additions of x·W_ihᵀ
    recurrence: float  # multiplications and additions of h·W_hhᵀ
    weight_ih: int  # bytes of W_ih
    weight_hh: int  # bytes of W_hh


@dataclass(frozen=True)
class Case:
    """One stack of recurrent layers with one size of data.

    `T` steps, `B` rows, `I` input size, `H` hidden size. The fields after `dtype` are options that
    only some cases use: `reset_rate` is the share of (step, row) pairs at which an episode begins,
    `lengths` gives each row a length from 1 to T, `members` is the size of an ensemble that reads
    the same input, `tf32` allows TF32 products for float32 on a CUDA device.
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
        """The options of fastrnn's layer for the case."""
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
        """Whether the cell is a torch module that computes a step, not one of fastrnn's layers."""
        return self.cell in STEPS

    @property
    def matrices(self) -> tuple[float, float]:
        """The numbers of matrices with H rows that multiply the input and the state in a step."""
        if self.is_step:
            return STEPS[self.cell]
        return self.stack.gates, self.stack.gates / self.heads

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def options(self) -> list[str]:
        """The options of the case for which torch.nn's layers have no argument."""
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
        """The name for `--dtype`: the dtype, or tf32."""
        return "tf32" if self.tf32 else self.dtype

    def in_precision(self, name: str) -> Case:
        """The case in one of `PRECISIONS`."""
        return replace(self, dtype="float32" if name == "tf32" else name, tf32=name == "tf32")

    def as_record(self) -> dict[str, Any]:
        """The case as a JSON record: eight entries, and options that differ from the default."""
        optional = {f.name: f.default for f in fields(self)[8:]}
        return {k: v for k, v in asdict(self).items() if k not in optional or v != optional[k]}

    def label(self) -> str:
        """One line for tables: ``LSTM T100 B32 I256 H256``, then values that are not defaults."""
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
        """Multiplications and additions of the matrix products, without the cells.

        Forward: 2·G·H·(I + H/heads) per step, row, direction and member, where I is D·H above the
        first layer. With lengths only half of the steps run on average, so half of that. For a cell
        that is a torch module, `STEPS` gives the number of products.
        Training counts three times as much: forward, gradients of data, gradients of weights.
        """
        forward = sum(p.projection + p.recurrence for p in self.products())
        return forward * (3.0 if pass_ == "training" else 1.0)

    def products(self) -> list[Products]:
        """The products of each layer in the forward pass."""
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
        """Multiplications and additions per byte of weights read.

        W_hh is read once per step, because a step depends on the previous one; W_ih once for all
        steps. Training reads both twice, in forward and for the gradients of data; the products for
        the gradients of weights read no weights. For long sequences and I = H this is B operations
        per byte in float32 inference; the recurrence alone has 2·B / 4.
        """
        streamed = sum(p.weight_ih + self.T * p.weight_hh for p in self.products())
        return self.flops(pass_) / (streamed * (2.0 if pass_ == "training" else 1.0))


def cell_named(name: str) -> str | None:
    """The cell with that name, ignoring case.

    >>> cell_named("slstm")
    'sLSTM'
    """
    return next((cell for cell in (*CELLS, *STEPS) if cell.upper() == name.upper()), None)


def load_suites() -> dict[str, list[Case]]:
    """Every suite of the package's data file, by name. ``project`` there says where a size is from.

    >>> [case.label() for case in load_suites()["fastrnns"]]
    ['LSTM T100 B64 I512 H512']
    """
    text = (resources.files("fastrnn.bench") / "suites.json").read_text(encoding="utf-8")
    suites: dict[str, list[dict[str, Any]]] = json.loads(text)
    names = {field.name for field in fields(Case)}
    return {
        name: [Case(**{key: case[key] for key in names & case.keys()}) for case in cases]
        for name, cases in suites.items()
    }


def select(
    suites: Mapping[str, Sequence[Case]],
    names: Sequence[str],
    cells: Sequence[str],
    dtypes: Sequence[str],
) -> list[tuple[str, Case]]:
    """The cases of the named suites with one of the cells, once for each of the dtypes.

    Raises:
        ValueError: a name is not a suite, or no case matches.
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
