"""The forms in which a layer takes its input: a batch, one sequence, a PackedSequence.

All become one call over time-major arrays; the results go back in the form of the input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from .. import _checks
from .._engine import States
from .._options import Cell, check_bool
from . import torch_tools

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# A call that torch.fx traces has its proxy for the output, and None for the states.
Result = tuple[Any, Any, States | None]

# torch.nn's options, in the order in which its layers show them.
TORCH_DEFAULTS: dict[str, Any] = {
    "proj_size": 0,
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "dropout": 0,
    "bidirectional": False,
}


def options_shown(layer: Any, defaults: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The sizes of a layer, then its options that are not at their defaults.

    Arguments:
        own: the values of options that the layer's attributes of these names may not have.
    """
    shown = [str(layer.input_size), str(layer.hidden_size)]
    for name, default in defaults.items():
        value = own[name] if name in own else getattr(layer, name)
        if value != default:
            shown.append(f"{name}={value}")
    return ", ".join(shown)


class EveryForm(Module):
    """What `RecurrentLayer` and `QuantizedLayer` share of their forward."""

    _cell: ClassVar[Cell]

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def _run_any_form(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, ...] | None,
        lengths: _checks.Lengths | None,
        reset: Tensor | None,
        return_states: bool,
    ) -> Result:
        """Check the arguments, run the stack, and return its results in the form of the input."""
        if torch_tools.is_traced(input, hx, lengths, reset):
            options = {"lengths": lengths, "reset": reset, "return_states": return_states}
            return torch_tools.call_whole(self, input, hx, **options), None, None
        check_bool("return_states", return_states)
        _checks.check_states(hx)
        if isinstance(input, PackedSequence):
            _checks.refuse_with_packed(lengths=lengths, reset=reset)
            return self._run_packed(input, hx, return_states)
        _checks.check_tensor("input", input)
        if input.dim() not in (2, 3):
            tensor = " tensor" if self._cell == "RNN" else ""
            raise ValueError(
                f"{self._cell}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead"
            )
        unbatched = input.dim() == 2
        if hx is not None:
            _checks.check_state_dims(hx, unbatched)
        if unbatched:
            sequence = input.unsqueeze(1)
            hx = None if hx is None else tuple(state.unsqueeze(1) for state in hx)
        else:
            sequence = input.transpose(0, 1) if self.batch_first else input
        steps, batch = sequence.shape[0], sequence.shape[1]
        weights = self._checked_weights(sequence, hx, 3, batch)
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            lengths = _checks.lengths_tensor(lengths, sequence, unbatched)
        if reset is not None:
            reset = _checks.reset_tensor(reset, sequence, unbatched, self.batch_first)
        output, hx_n, states = self._call(
            sequence, hx, weights, batch, lengths=lengths, reset=reset, return_states=return_states
        )
        if unbatched:
            output = output.squeeze(1)
            hx_n = tuple(state.squeeze(1) for state in hx_n)
            if states is not None:
                c = None if states.c is None else states.c.squeeze(2)
                states = States(states.h.squeeze(2), c)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, hx_n, states

    def _run_packed(
        self, input: PackedSequence, hx: tuple[Tensor, ...] | None, return_states: bool
    ) -> Result:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        _checks.check_packed_data(data)
        _checks.check_batch_sizes(batch_sizes, data)
        batch = int(batch_sizes[0])
        _checks.check_indices("sorted_indices", sorted_indices, batch, data)
        _checks.check_indices("unsorted_indices", unsorted_indices, batch, data)
        batch_sizes = batch_sizes.contiguous()
        if hx is not None and sorted_indices is not None:
            hx = tuple(_checks.permuted(state, sorted_indices) for state in hx)
        weights = self._checked_weights(data, hx, 2, batch)
        output, hx_n, states = self._call(
            data, hx, weights, batch, batch_sizes=batch_sizes, return_states=return_states
        )
        if unsorted_indices is not None:
            hx_n = tuple(state.index_select(1, unsorted_indices) for state in hx_n)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, hx_n, states

    def _check_state_shapes(self, hx: tuple[Tensor, ...] | None, batch: int) -> None:
        """Refuse states that do not fit the layers, the batch or the hidden size."""
        if hx is not None:
            groups = self.num_layers * (2 if self.bidirectional else 1)
            h_0 = (groups, batch, self.proj_size or self.hidden_size)
            _checks.check_state_shapes(hx, (h_0, (groups, batch, self.hidden_size)))

    def _checked_weights(
        self, input: Tensor, hx: tuple[Tensor, ...] | None, dims: int, batch: int
    ) -> list[Tensor]:
        """The weights of this moment, once they, the input and the states fit together."""
        raise NotImplementedError

    def _call(
        self,
        input: Tensor,
        hx: tuple[Tensor, ...] | None,
        weights: list[Tensor],
        batch: int,
        **steps: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...], States | None]:
        """Run the stack over a time-major input."""
        raise NotImplementedError
