"""Layers with int8 weights; `fastrnn.quantize_dynamic` makes them (models/quantize.py).

A layer holds its weights once, in the order in which this machine's kernels read them. State dicts,
pickles and copies hold them in torch.nn's layout instead, each matrix as int8 and a scale for each
of its rows, so that they serve every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from .. import _C, _checks
from .._engine import States, engine_options
from .._options import int8_lacks
from ..calls import int8
from . import torch_tools
from .forms import TORCH_DEFAULTS, EveryForm, options_shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.nn.utils.rnn import PackedSequence
    from typing_extensions import Self

    from .._options import Options
    from .layer import RecurrentLayer

_MATRICES = ("weight_ih", "weight_hh", "weight_hr")


class QuantizedLayer(EveryForm):
    """The base of QuantizedRNN, QuantizedLSTM and QuantizedGRU."""

    _maths: ClassVar[dict[str, Any]]  # the options torch.nn does not have, with its behaviour

    packed: Tensor
    h_0: Tensor | None
    c_0: Tensor | None

    @classmethod
    def from_float(cls, layer: RecurrentLayer) -> Self:
        """Quantise a float32 layer of fastrnn on the CPU; `quantize_dynamic` does so in a model.

        Raises:
            TypeError: layer is not a fastrnn layer of this cell.
            ValueError: it has an option that int8 does not support, another dtype than float32, is
                not on the CPU, or has more columns than an int32 sum of products holds.
        """
        if getattr(layer, "_cell", None) != cls._cell:
            raise TypeError(f"layer must be a fastrnn.{cls._cell}, got {type(layer).__name__}")
        lacking = int8_lacks(layer._options)
        if lacking:
            raise ValueError(f"int8 does not support {lacking}")
        quantised = cls.__new__(cls)
        Module.__init__(quantised)
        for name in ("mode", "input_size", "hidden_size", *TORCH_DEFAULTS):
            setattr(quantised, name, getattr(layer, name))
        quantised._describe(layer._options)
        flat: list[Any] = []
        for name in layer._flat_weights_names:
            weight = getattr(layer, name).detach()
            if weight.device.type != "cpu":
                raise ValueError(f"{name} is on {weight.device}: move the layer with .cpu()")
            if weight.dtype != torch.float32:
                raise ValueError(f"{name} is {weight.dtype}: convert the layer with .float()")
            weight = weight.resolve_neg().contiguous()
            is_matrix = name.startswith(_MATRICES)
            flat += _C.quantize(weight) if is_matrix else [weight]
        quantised._pack(flat)
        for name in ("h_0", "c_0"):
            learned = getattr(layer, name, None)
            learned = None if learned is None else learned.detach().clone()
            quantised.register_buffer(name, learned)
        return quantised.eval()

    def _describe(self, options: Options) -> None:
        """Derive the attributes that describe the weights."""
        self._options = options
        self._engine = engine_options(options, int8=True)
        for name in self._maths:
            setattr(self, name, getattr(options, name.replace("nonlinearity", "activation")))
        suffixes = ("", "_reverse")[: options.directions]
        self._names = [
            name
            for layer in range(options.num_layers)
            for suffix in suffixes
            for kind in options.weight_kinds
            for name in (
                f"{kind}_l{layer}{suffix}",
                *([f"{kind}_l{layer}{suffix}_scale"] if kind in _MATRICES else []),
            )
        ]

    def _pack(self, flat: Sequence[Any]) -> None:
        sizes = (self.input_size, self.hidden_size)
        packed = _C.pack_int8(self._engine, *sizes, flat, self.bias)
        self.register_buffer("packed", packed.torch(), persistent=False)

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, as in ``state_dict()``, in memory of their own.

        Each matrix ``weight_…`` is int8 in torch.nn's shape, with ``weight_…_scale``, float32,
        one number for each row; the matrix is ``weight * scale[:, None]``. Biases are float32.
        """
        unpacked = _C.unpack_int8(self._engine, self.packed)
        return {name: x.torch() for name, x in zip(self._names, unpacked, strict=True)}

    # ---- state dicts, pickles, copies -----------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: weight for name, weight in self.weights().items()})
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        names = [prefix + name for name in self._names]
        unexpected_keys += [key for key in unexpected if key not in names]
        weights = self.weights()
        found: dict[str, Tensor] = {}
        for name, own in weights.items():
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys += [prefix + name] if strict else []
            elif given.dtype != own.dtype and own.dtype == torch.int8:
                error_msgs.append(
                    f"{prefix + name} is {given.dtype}, expected torch.int8: these are weights of "
                    "the float layer; load them into the float model and quantise that"
                )
            elif given.shape != own.shape or given.dtype != own.dtype:
                error_msgs.append(
                    f"{prefix + name} must be {own.dtype} of shape {tuple(own.shape)}, "
                    f"got {given.dtype} of shape {tuple(given.shape)}"
                )
            else:
                found[name] = given.detach().cpu().contiguous()
        if found and not error_msgs:
            self._pack([*{**weights, **found}.values()])

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: x for name, x in self._buffers.items() if name != "packed"}
        derived = ("_engine", "_names", "_compiled_call_impl")
        state = {name: x for name, x in self.__dict__.items() if name not in derived}
        return {**state, "_buffers": buffers, "_weights": [*self.weights().values()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        flat = state.pop("_weights")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._describe(self._options)
        self._pack(flat)

    def extra_repr(self) -> str:
        """The line of the float layer."""
        return options_shown(self, {**TORCH_DEFAULTS, **self._maths}, {})

    # ---- forward --------------------------------------------------------------------------------

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: _checks.Lengths | None,
        reset: Tensor | None,
        return_states: bool,
    ) -> Any:
        """Check the arguments, run the stack, and return what ``forward`` returns."""
        if self.training:
            raise RuntimeError(
                f"{self} has int8 weights and cannot be trained: call .eval() on the model, or on "
                "this layer to train the others; train the float model and quantise it again"
            )
        plain = lengths is None and reset is None and return_states is False
        plain = plain and (hx is not None or self.h_0 is None)
        if plain and not torch.compiler.is_dynamo_compiling():
            found = _C.layer(
                None, self._engine, None, self._buffers, ("packed",), input, hx, self.batch_first,
                False,
            )  # fmt: skip
            if found is not None:
                return found
        states = torch_tools.states_of(self._cell, hx, "lstm", 4)
        return self._run_any_form(input, states, lengths, reset, return_states)

    def _checked_weights(
        self, input: Tensor, hx: tuple[Tensor, ...] | None, dims: int, batch: int
    ) -> list[Tensor]:
        if input.dtype != torch.float32:
            raise ValueError(
                f"input must be float32 for {self}, got {input.dtype}: the weights are int8, the "
                "states float32"
            )
        _checks.check_input(input, input, dims, self.input_size)
        for name, x in (("input", input), ("the layer", self.packed)):
            if x.device.type != "cpu":
                raise RuntimeError(f"{self} runs on the CPU, but {name} is on {x.device}")
        self._check_state_shapes(hx, batch)
        states = (*(hx or ()), *self._learned())
        _checks.check_companions(input, states, ())
        if torch.is_grad_enabled() and any(x.requires_grad for x in (input, *states)):
            raise RuntimeError(
                f"{self} has int8 weights and computes no gradient, but an argument requires one: "
                "call it under torch.no_grad(), or detach the argument"
            )
        return []

    def _learned(self) -> tuple[Tensor, ...]:
        """The learned initial state, (L·D, 1, ·) each; () where none is."""
        return tuple(x for x in (self.h_0, self.c_0) if x is not None)

    def _call(
        self,
        input: Tensor,
        hx: tuple[Tensor, ...] | None,
        weights: list[Tensor],
        batch: int,
        **steps: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...], States | None]:
        learned = self._learned()
        if learned and hx is None:
            hx = tuple(state.expand(-1, batch, -1) for state in learned)
        if steps.get("reset") is not None and learned:
            steps["reset_hx"] = tuple(state[:, 0] for state in learned)
        return int8.run(self._options, input, hx, self.packed, self.hidden_size, **steps)


class _OfOneState(QuantizedLayer):
    """What RNN and GRU share: their state is h alone."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layers, as the float layer does in ``eval()``, with float32 arguments.

        Raises:
            RuntimeError: the layer is in training mode, or a gradient is asked for; and as the
                float layer.
            ValueError, TypeError: an argument is not float32; and as there.
        """
        output, hx_n, states = self._run(input, hx, lengths, reset, return_states)
        if hx_n is None:  # torch.fx traces the call
            return output  # type: ignore[no-any-return]
        return (output, hx_n[0], states) if return_states else (output, hx_n[0])


class QuantizedRNN(_OfOneState):
    """An RNN with int8 weights, from `fastrnn.quantize_dynamic`; called as `fastrnn.RNN` is."""

    _cell = "RNN"
    _maths: ClassVar[dict[str, Any]] = {"nonlinearity": "tanh"}
    nonlinearity: str


class QuantizedLSTM(QuantizedLayer):
    """An LSTM with int8 weights, from `fastrnn.quantize_dynamic`; called as `fastrnn.LSTM` is."""

    _cell = "LSTM"
    _maths: ClassVar[dict[str, Any]] = {"activation": "tanh", "gate_activation": "sigmoid"}
    activation: str
    gate_activation: str

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layers, as ``fastrnn.LSTM.forward`` does in ``eval()``, with float32 arguments.

        Raises:
            RuntimeError: the layer is in training mode, or a gradient is asked for; and as
                ``fastrnn.LSTM.forward``.
            ValueError, TypeError: an argument is not float32; and as there.
        """
        output, hx_n, states = self._run(input, hx, lengths, reset, return_states)
        if hx_n is None:  # torch.fx traces the call
            return output  # type: ignore[no-any-return]
        return (output, hx_n, states) if return_states else (output, hx_n)


class QuantizedGRU(_OfOneState):
    """A GRU with int8 weights, from `fastrnn.quantize_dynamic`; called as `fastrnn.GRU` is."""

    _cell = "GRU"
    _maths: ClassVar[dict[str, Any]] = {
        "activation": "tanh",
        "gate_activation": "sigmoid",
        "reset_after": True,
    }
    activation: str
    gate_activation: str
    reset_after: bool
