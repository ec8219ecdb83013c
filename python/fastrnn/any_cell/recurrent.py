"""`Recurrent`: a layer from any cell module with the interface of torch.nn's cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, RNNBase
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .. import _checks
from .._options import check_bool, check_probability
from ..layers.layer import RecurrentLayer
from .cell import Cell, Run
from .scan import Tree, alike, mapped, valid_steps, zero_past

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Recurrent(Module):
    """Runs any cell with the interface of torch.nn's cells over a sequence.

    T stands for steps, B for batch, I for input size, H for the size of a cell's output, L for
    layers and D for directions (1 or 2).

    A cell is called as ``cell(input, state)`` with input (B, I), and with ``state=None`` at the
    first step if the caller passes no state. It returns one of

    - its next state, a tensor or a nested tuple whose first entry is the output, as
      ``torch.nn.GRUCell`` (h) and ``torch.nn.LSTMCell`` ((h, c)) do;
    - ``(output, state)`` or ``(output, *state)``, where the output is no part of the state.

    The part of the result that has the shapes of the given state is the next state. If no state is
    given, the cell is first called on its own result, without computing values.

    Arguments:
        cell: a cell module, or a list of them: a stack, in which each cell's input is the output
            of the cell below.
        reverse_cell: a cell, or a list as long as ``cell``, to run backwards in time. The outputs
            of both directions are concatenated on the last axis.
        batch_first: whether input and output are (B, T, ·) instead of (T, B, ·). States are not
            affected.
        dropout: the probability of dropping a value between two layers during training.

    Attributes:
        cell: the cell. Its parameters are in ``state_dict`` under ``cell.``, such as
            ``cell.weight_ih``; of a list they are ``cells.0.…``, ``cells.1.…`` and the attribute
            is ``cells``.
        reverse_cell: the cell that runs backwards, or None; of a list, ``reverse_cells``.

    Raises:
        TypeError: a cell is not a module, or is a layer; batch_first is not a bool or dropout not
            a number.
        ValueError: there is no cell, or reverse_cell has another number of cells; dropout is out
            of range.

    >>> import torch
    >>> layer = Recurrent(torch.nn.LSTMCell(3, 4))
    >>> output, (h_n, c_n) = layer(torch.randn(5, 2, 3), lengths=[5, 3])
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]), torch.Size([1, 2, 4]))
    >>> [name for name, _ in layer.named_parameters()][:2]
    ['cell.weight_ih', 'cell.weight_hh']
    """

    batch_first: bool
    dropout: float
    cell: Module
    reverse_cell: Module | None
    cells: ModuleList
    reverse_cells: ModuleList | None

    def __init__(
        self,
        cell: Module | Iterable[Module],
        reverse_cell: Module | Iterable[Module] | None = None,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_bool("batch_first", batch_first)
        check_probability("dropout", dropout)
        self.batch_first, self.dropout = batch_first, float(dropout)
        self._stack = isinstance(cell, _STACKS)
        cells = _checked_cells("cell", cell, self._stack)
        back = []
        if reverse_cell is not None:
            back = _checked_cells("reverse_cell", reverse_cell, self._stack)
            if len(back) != len(cells):
                raise ValueError(
                    f"reverse_cell must have as many cells as cell, {len(cells)}, got {len(back)}"
                )
        if self._stack:
            self.cells = ModuleList(cells)
            self.reverse_cells = ModuleList(back) if back else None
        else:
            self.cell = cells[0]
            self.reverse_cell = back[0] if back else None
        if dropout > 0 and len(cells) == 1:
            warnings.warn(
                "dropout is applied between layers, so that it does nothing in a stack of one "
                f"cell; got dropout={dropout}",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        shown = ["batch_first=True"] if self.batch_first else []
        return ", ".join([*shown, f"dropout={self.dropout}"] if self.dropout else shown)

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: Any = None,
        *,
        lengths: _checks.Lengths | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the cells over a batch of sequences.

        Arguments:
            input: (T, B, I), with ``batch_first`` (B, T, I); one sequence (T, I); or a
                PackedSequence. In place of I there may be several axes, if the cells support them.
            state: initial states: the state of a cell with (L·D, B, ·) in place of (B, ·), as in
                torch.nn's layers; for one sequence (L·D, ·). The order is layer by layer, in each
                layer forwards, then backwards. Or a list of L·D states of cells. None: each cell
                is called with None and uses its own initial state.
            lengths: integers (B,), each 0…T: the number of valid steps of each sequence. Output
                past a length is 0; the final state is the one after the last valid step (for
                length 0 the initial one, which is 0 if ``state`` is None); the backward direction
                starts at the last valid step; padding may hold any value and gets no gradient.
            reset: bool (T, B), with ``batch_first`` (B, T), for one sequence (T,). True: a new
                episode begins at this step, with the cell's own initial state; in both directions
                no state and no gradient crosses the boundary of episodes.
            return_states: whether to also return the states of every layer at every step.

        Returns:
            ``output, state_n``, with ``return_states`` ``output, state_n, states``. The output is
            the last layer's, in the layout of input, of size D·H. state_n: the final states, in the
            layout of state. states: the state of a cell with (L, T, B, D·) in place of (B, ·),
            for one sequence (L, T, D·), for a PackedSequence (L, N, D·), where N is the number of
            steps of all its sequences. If the states of the cells differ in structure, shape or
            dtype, or are lists, state_n and states are lists of L·D states, one for each cell,
            with (B, ·) and (T, B, ·).

        Raises:
            ValueError: the input has fewer than 2 dimensions, a state does not fit the batch or
                changes its shape or dtype, or lengths or reset do not fit the input.
            RuntimeError: T is 0.
            TypeError: an argument or the result of a cell has a wrong type.
        """
        check_bool("return_states", return_states)
        if isinstance(input, PackedSequence):
            _checks.refuse_with_packed(lengths=lengths, reset=reset)
            return self._run_packed(input, state, return_states)
        _checks.check_tensor("input", input)
        if input.dim() < 2:
            raise ValueError(
                "input must be (T, B, …), or (T, I) for one sequence, got "
                f"{input.dim()}-D of shape {tuple(input.shape)}"
            )
        unbatched = input.dim() == 2
        if unbatched:
            sequence = input.unsqueeze(1)
        else:
            sequence = input.transpose(0, 1) if self.batch_first else input
        if sequence.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        states = self._initial_states(state, sequence.shape[1], unbatched)
        valid = starts = None
        if lengths is not None:
            lengths = _checks.lengths_tensor(lengths, sequence, unbatched)
            valid = valid_steps(lengths, sequence)
            sequence = zero_past(valid, sequence)
        if reset is not None:
            starts = _checks.reset_tensor(reset, sequence, unbatched, self.batch_first)
        output, finals, every = self._run(sequence, states, valid, starts, return_states)
        if unbatched:
            output = output.squeeze(1)
            finals = [mapped(lambda leaf: leaf.squeeze(0), final) for final in finals]
            every = [mapped(lambda leaf: leaf.squeeze(1), one) for one in every]
        elif self.batch_first:
            output = output.transpose(0, 1)
        return self._results(output, finals, every, return_states, flat=unbatched)

    def _run_packed(
        self, input: PackedSequence, state: Any, return_states: bool
    ) -> tuple[Any, ...]:
        data, batch_sizes, order, back = input
        _checks.check_tensor("input", data)
        if data.dim() < 2:
            raise ValueError(f"the data of input must be (N, …), got {data.dim()}-D")
        _checks.check_batch_sizes(batch_sizes, data)
        batch = int(batch_sizes[0])
        _checks.check_indices("sorted_indices", order, batch, data)
        _checks.check_indices("unsorted_indices", back, batch, data)
        states = self._initial_states(state, batch, unbatched=False)
        if order is not None:
            states = [mapped(lambda leaf: leaf.index_select(0, order), one) for one in states]
        # Rows stay in packed order, in which the first rows of each step are valid.
        sequence, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        valid = valid_steps(lengths, sequence)
        output, finals, every = self._run(sequence, states, valid, None, return_states)
        packed_rows = torch.arange(batch) < batch_sizes.unsqueeze(1)
        step, row = (index.to(data.device) for index in packed_rows.nonzero(as_tuple=True))
        if back is not None:
            finals = [mapped(lambda leaf: leaf.index_select(0, back), final) for final in finals]
        every = [mapped(lambda leaf: leaf[step, row], one) for one in every]
        packed = PackedSequence(output[step, row], batch_sizes, order, back)
        return self._results(packed, finals, every, return_states, flat=True)

    def _run(
        self,
        sequence: Tensor,
        states: list[Any],
        valid: Tensor | None,
        starts: Tensor | None,
        return_states: bool,
    ) -> tuple[Tensor, list[Any], list[Any]]:
        """The output, and for each layer and direction the final state and all states."""
        finals: list[Any] = []
        every: list[Any] = []
        layers = self._layers()
        for layer, directions in enumerate(layers):
            outputs = []
            for reverse, cell in enumerate(directions):
                name = ("cell", "reverse_cell")[reverse] + (f"s[{layer}]" if self._stack else "")
                given = {"valid": valid, "state": states[len(finals)], "starts": starts}
                final, (output, seen) = _run(cell, name, return_states, reverse, sequence, given)
                outputs.append(output)
                finals.append(final)
                every.append(seen)
            sequence = _joined(outputs)
            if self.training and self.dropout > 0 and layer < len(layers) - 1:
                sequence = torch.nn.functional.dropout(sequence, self.dropout)
        return sequence, finals, every

    def _initial_states(self, state: Any, batch: int, unbatched: bool) -> list[Any]:
        """The initial states of the cells, with B rows each; None: the cell's own."""
        count = sum(map(len, self._layers()))
        if state is None:
            return [None] * count
        by_cell = type(state) is list
        if by_cell and len(state) != count:
            raise ValueError(
                f"state must be a list of {count}, one state for each layer and direction, or one "
                f"state with L·D = {count} as the first axis, got a list of {len(state)}"
            )
        tree = Tree("state", state)
        leading = ((), (count,))[not by_cell] + ((), (batch,))[not unbatched]
        for path, leaf in tree.named():
            if leaf.shape[: len(leading)] != leading:
                expected = ", ".join([*map(str, leading), "…"])
                axes = " and ".join(((), ("L·D",))[not by_cell] + ((), ("B",))[not unbatched])
                raise ValueError(
                    f"{path} must have shape ({expected}), {axes} first, got {tuple(leaf.shape)}"
                )
        leaves = tree.tensors
        if unbatched:
            leaves = [leaf.unsqueeze(0 if by_cell else 1) for leaf in leaves]
        if by_cell:
            return list(tree.build(leaves))
        return [tree.build([leaf[index] for leaf in leaves]) for index in range(count)]

    def _results(
        self, output: Any, finals: list[Any], every: list[Any], return_states: bool, flat: bool
    ) -> tuple[Any, ...]:
        """The results of a call, with the states of all cells stacked if they are alike.

        Arguments:
            flat: whether the states of all steps have one axis for steps and rows.
        """
        stack = type(finals[0]) is not list and all(alike(finals[0], one) for one in finals[1:])
        if stack:
            finals = mapped(_stacked, *finals)
        if not return_states:
            return output, finals
        if stack:
            count = len(self._layers()[0])
            layers = [every[at : at + count] for at in range(0, len(every), count)]
            joined = [mapped(lambda *leaves: _joined(leaves, flat), *layer) for layer in layers]
            every = mapped(_stacked, *joined)
        return output, finals, every

    def _layers(self) -> list[tuple[Module, ...]]:
        """The cells of each layer, one for each direction."""
        if not self._stack:
            return [(self.cell,) if self.reverse_cell is None else (self.cell, self.reverse_cell)]
        if self.reverse_cells is None:
            return [(cell,) for cell in self.cells]
        return list(zip(self.cells, self.reverse_cells, strict=True))


def _run(
    cell: Module, name: str, return_states: bool, reverse: int, sequence: Tensor,
    given: dict[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    """The result of `Run` for one cell; under torch.compile one node of the graph."""
    # Strict export does not support such a node, and unrolls the loop.
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        run = Run(Cell(cell, name), return_states, given["valid"], bool(reverse))
        return run(sequence, given["state"], given["starts"])
    from . import compiled

    # One step, with unused results, so that dynamo guards on what the cell depends on.
    cell(sequence[0], given["state"])
    given = {name: value for name, value in given.items() if value is not None}
    final, output, *states = compiled.call(
        cell, name, return_states, bool(reverse), sequence, given
    )
    return final, (output, states[0] if states else None)


# ---- nested values ----------------------------------------------------------------------------


def _stacked(*leaves: Tensor) -> Tensor:
    return torch.stack(leaves) if len(leaves) > 1 else leaves[0].unsqueeze(0)


def _joined(parts: Sequence[Tensor], flat: bool = False) -> Tensor:
    """Both directions' values, (T, B, ·) or flat (T·B, ·), concatenated on the last axis."""
    if len(parts) == 1:
        return parts[0]
    scalars = parts[0].dim() == (1 if flat else 2)  # one number for each step and row
    return torch.stack(list(parts), -1) if scalars else torch.cat(list(parts), -1)


_STACKS = (list, tuple, ModuleList)


def _checked_cells(name: str, given: Any, stack: bool) -> list[Module]:
    """The cells of one direction; ``stack``: whether ``cell`` is a list."""
    if not stack:
        _check_cell(name, given)
        return [given]
    if not isinstance(given, _STACKS):
        raise TypeError(f"{name} must be a list where cell is a list, got {type(given).__name__}")
    for index, cell in enumerate(given):
        _check_cell(f"{name}[{index}]", cell)
    if not given:
        raise ValueError(f"{name} must hold at least one cell, got an empty list")
    return list(given)


def _check_cell(name: str, cell: Any) -> None:
    if isinstance(cell, type):
        raise TypeError(f"{name} must be a cell, got the class {cell.__name__}; make one of it")
    if not isinstance(cell, Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(cell).__name__}")
    if isinstance(cell, RNNBase | RecurrentLayer | Recurrent):
        raise TypeError(
            f"{name} must be a cell, which makes one step, got the layer {type(cell).__name__}, "
            "which makes all; call the layer itself"
        )
