"""What a stack of recurrent layers computes, apart from the sizes of its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Cell = Literal["RNN", "LSTM", "GRU"]
Activation = Literal["tanh", "relu", "sigmoid", "identity"]
GateActivation = Literal["sigmoid", "hardsigmoid"]


@dataclass(frozen=True, slots=True)
class Options:
    """Everything about a stack that is not a size of the data; hashable.

    Attributes:
        cell: ``"RNN"``, ``"LSTM"`` or ``"GRU"``.
        num_layers: layers in the stack, at least 1.
        bidirectional: whether each layer also runs backwards in time.
        bias: whether the weights contain ``b_ih`` and ``b_hh``.
        proj_size: size of the projected state; 0 means no projection. LSTM alone.
        activation: the candidate and cell-output function, of an RNN its nonlinearity:
            ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        gate_activation: ``"sigmoid"``, or ``"hardsigmoid"``, which is clip(x/6 + 1/2, 0, 1).
        reset_after: GRU alone: whether the reset gate acts after the matrix product.

    Raises:
        ValueError: an argument is not among the values above.

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

    def __post_init__(self) -> None:
        _check_choice("cell", self.cell, get_args(Cell))
        _check_choice("activation", self.activation, get_args(Activation))
        _check_choice("gate_activation", self.gate_activation, get_args(GateActivation))
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        if self.proj_size < 0:
            raise ValueError(f"proj_size must be 0 or a positive integer, got {self.proj_size}")
        if self.proj_size > 0 and self.cell != "LSTM":
            raise ValueError(
                f"proj_size is only supported for LSTM, got proj_size={self.proj_size} "
                f"with cell {self.cell!r}"
            )


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{argument} must be one of {names}, got {value!r}")
