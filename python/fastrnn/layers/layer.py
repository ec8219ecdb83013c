"""What the layers RNN, LSTM and GRU share: parameters, argument checks, the call of the engine.

A layer keeps no list of its weights. Each forward looks them up by name, so that whatever put
another tensor there (a replaced parameter, ``functional_call``, a parametrization, weight norm)
is seen by the next call.
"""

from __future__ import annotations

import math
import numbers
import re
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _C, _checks
from .._engine import NO_EXTRAS, Extras, Prepared, States
from .._options import (
    Cell,
    Options,
    Shape,
    check_bool,
    check_forget_bias,
    check_heads,
    check_probability,
    make_options,
)
from ..calls import torch_route
from ..calls.call import casts_by_itself, recurrent, usual_layer
from . import autocast, onnx_export, random_masks, torch_tools
from .forms import TORCH_DEFAULTS, EveryForm, Result, options_shown
from .surface import DERIVED, GIVEN, RNNSurface, state_of

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence
    from typing_extensions import Self

Device = torch.device | str | int | None
# The own options of every layer, each with the value that is torch.nn's behaviour.
COMMON_OPTIONS: dict[str, Any] = {
    "layer_norm": False,
    "heads": 1,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
    "learn_initial_state": False,
    "grad_clip": None,
    "recompute": False,
}
# Own options that no step knows of.
OUTSIDE_THE_STEP = ("recurrent_dropout", "learn_initial_state", "forget_bias")


_CELLS: dict[str, Cell] = {"LSTM": "LSTM", "GRU": "GRU", "RNN_TANH": "RNN", "RNN_RELU": "RNN"}


class RecurrentLayer(RNNSurface, EveryForm, torch_tools.SeenByTools):
    """The base of RNN, LSTM and GRU; it takes the arguments of torch.nn's RNNBase."""

    __constants__: ClassVar[list[str]] = [
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    ]

    # The options torch.nn does not have, each with the value that is torch.nn's behaviour.
    own_options: ClassVar[dict[str, Any]] = COMMON_OPTIONS

    def __init__(
        self,
        mode: str,
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
        **own_options: Any,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        # Attributes too, for who reads them; a user's class may give these another meaning.
        self._own: dict[str, Any] = {**self.own_options, **own_options}
        for name, value in self._own.items():
            setattr(self, name, value)
        self._check_sizes(dropout)
        self._describe()
        self._check_own_options()
        shapes = zip(self._flat_weights_names, self._weight_shapes, strict=True)
        for name, shape in (*shapes, *self._learned_shapes().items()):
            weight = torch.empty([*map(int, shape)], device=device, dtype=dtype)
            setattr(self, name, Parameter(weight))
        self.flatten_parameters()
        self.reset_parameters()

    def _check_sizes(self, dropout: float) -> None:
        if (
            not isinstance(dropout, numbers.Real)
            or isinstance(dropout, bool)
            or not 0 <= dropout <= 1
        ):
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an "
                "element being zeroed"
            )
        self.dropout = float(dropout)
        if dropout > 0 and self.num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero "
                f"dropout expects num_layers greater than 1, but got dropout={dropout} and "
                f"num_layers={self.num_layers}",
                stacklevel=4,  # the line that constructs the layer
            )
        for name in ("bias", "batch_first"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        for name in ("input_size", "hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
            if value <= 0:
                raise ValueError(f"{name} must be greater than zero")
        sizes = ("input_size", "hidden_size", "num_layers", "proj_size")
        _checks.check_integers(**{name: getattr(self, name) for name in sizes})
        if self.num_layers <= 0:
            raise ValueError("num_layers must be greater than zero")
        if self.proj_size < 0:
            raise ValueError(
                "proj_size should be a positive integer or zero to disable projections"
            )
        if self.proj_size >= self.hidden_size:
            raise ValueError("proj_size has to be smaller than hidden_size")

    def _check_own_options(self) -> None:
        """Check what `Options` does not hold, or not beside the hidden size."""
        check_heads(self._own["heads"], hidden_size=self.hidden_size)
        check_probability("recurrent_dropout", self._own["recurrent_dropout"])
        check_bool("learn_initial_state", self._own["learn_initial_state"])
        check_forget_bias(self._own.get("forget_bias"), self.bias)

    def _maths(self) -> dict[str, Any]:
        """The options that change the maths of a step."""
        own = {n: v for n, v in self._own.items() if n not in OUTSIDE_THE_STEP}
        if self._cell == "RNN":
            own["activation"] = self.mode.removeprefix("RNN_").lower()
        return own

    def _describe(self) -> None:
        """Derive the options and the names and shapes of the weights from the attributes."""
        if not hasattr(type(self), "_cell"):  # a class of the user's right over this one
            if self.mode not in _CELLS:
                raise ValueError(f"Unrecognized RNN mode: {self.mode}")
            self.__dict__["_cell"] = _CELLS[self.mode]
        self._options: Options = make_options(
            self._cell,
            num_layers=self.num_layers,
            bidirectional=bool(self.bidirectional),
            bias=self.bias,
            proj_size=self.proj_size,
            **self._maths(),
        )
        output = self.proj_size or self.hidden_size
        directions = 2 if self.bidirectional else 1
        self._all_weights: list[list[str]] = []
        self._weight_shapes: list[Shape] = []
        for layer in range(self.num_layers):
            width = self.input_size if layer == 0 else output * directions
            shapes = self._options.weight_shapes(width, self.hidden_size)
            for suffix in ("", "_reverse")[:directions]:
                self._all_weights.append([f"{name}_l{layer}{suffix}" for name in shapes])
                self._weight_shapes += shapes.values()
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._prepared = Prepared(self._options, tuple(self._flat_weights_names))

    def _learned_shapes(self) -> dict[str, Shape]:
        """The parameters that `learn_initial_state` asks for."""
        if not self._own["learn_initial_state"]:
            return {}
        groups = self.num_layers * (2 if self.bidirectional else 1)
        shapes: dict[str, Shape] = {"h_0": (groups, 1, self.proj_size or self.hidden_size)}
        if self._cell == "LSTM":
            shapes["c_0"] = (groups, 1, self.hidden_size)
        return shapes

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√H, 1/√H), in the order of ``parameters()``.

        But gains of layer norm start at 1, ``norm_c_bias`` and learned initial states at 0, and the
        forget gate's part of ``bias_ih`` at ``forget_bias`` where one is given.
        """
        initialize(self)

    def flatten_parameters(self) -> None:
        """Lay the weights on a GPU in one piece of memory, as torch.nn's do; elsewhere do nothing.

        Layers do so by themselves when they are made and moved. cuDNN copies other weights at every
        call; the numbers are the same, and nothing warns.
        """
        if self._options.in_torch_nn:
            torch_route.flatten(self)

    def train(self, mode: bool = True) -> Self:
        """As torch.nn's; training thaws a frozen layer."""
        if mode:
            self._prepared.frozen = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._prepared.frozen = None
        applied = super()._apply(fn, recurse)
        self.flatten_parameters()
        return applied

    def __getstate__(self) -> dict[str, Any]:
        return state_of(self)

    def extra_repr(self) -> str:
        """torch.nn's line, then the options torch.nn does not have, where they are on."""
        return options_shown(self, {**TORCH_DEFAULTS, **self.own_options}, self._own)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled layer, also one from before ``proj_size`` or an own option existed."""
        derived = ("_flat_weights", "_flat_weight_refs", "all_weights", *DERIVED)
        own = {name: value for name, value in state.items() if name not in derived}
        super().__setstate__(own)  # type: ignore[no-untyped-call]
        restore_own_options(self, state)
        self.__dict__.setdefault("proj_size", 0)
        if self.mode.startswith("RNN_"):
            self.__dict__.setdefault("nonlinearity", self.mode.removeprefix("RNN_").lower())
        self._describe()

    # ---- forward ------------------------------------------------------------------------------

    def _run(
        self,
        input: Tensor | PackedSequence,
        given: Any,
        lengths: _checks.Lengths | None,
        reset: Tensor | None,
        return_states: bool,
    ) -> Result:
        """Check the arguments, run the stack, and return its results in the layout of the input.

        Arguments:
            given: hx as the caller gave it; the others as in ``forward``.
        """
        plain = (
            lengths is None
            and reset is None
            and return_states is False
            and not torch.compiler.is_dynamo_compiling()
            and self._needs_weights_alone(given)
        )
        if plain:
            own = self._prepared
            plain = own.by_cells and (own.gradient_by_cells or not torch.is_grad_enabled())
        if plain:
            found: Result | None = _C.layer(
                own, own.engine, own.frozen, self._parameters, own.names, input, given,
                self.batch_first, False,
            )  # fmt: skip
            if found is not None:
                return found
        hx = torch_tools.states_of(self._cell, given, "lstm", 4)
        if plain:
            found = usual_layer(self, input, hx)
            if found is not None:
                return found
        return self._run_any_form(input, hx, lengths, reset, return_states)

    def _needs_weights_alone(self, hx: Any) -> bool:
        """Whether a call reads nothing but input, states and parameters, and draws no numbers."""
        if GIVEN in self.__dict__ or (hx is None and self._own["learn_initial_state"]):
            return False
        own = self._options
        return not self.training or (
            (self.dropout == 0 or self.num_layers == 1)
            and own.zoneout_h == 0
            and own.zoneout_c == 0
            and (
                self._own["recurrent_dropout"] == self.__dict__.get("recurrent_dropout", 0) == 0
                or self._recurrent_dropout() == 0
            )
        )

    def _drops(self) -> bool:
        """Whether values are dropped between layers now."""
        return self.training and self.dropout > 0 and self.num_layers > 1

    def _recurrent_dropout(self) -> float:
        """The attribute, which may change; a user's class may mean something else by it."""
        found: float = self._own["recurrent_dropout"]
        ours = type(self).__module__ == "fastrnn.nn"
        return vars(self).get("recurrent_dropout", found) if ours else found

    def _checked_weights(
        self, input: Tensor, hx: tuple[Tensor, ...] | None, dims: int, batch: int
    ) -> list[Tensor]:
        """The weights of this moment, once they, the input and the states fit together."""
        parameters: dict[str, Any] = self._parameters
        try:
            weights = [parameters[name] for name in self._flat_weights_names]
        except KeyError:  # parametrized, weight norm, a replica: not a registered parameter
            weights = [getattr(self, name) for name in self._flat_weights_names]
        if self._given():
            weights = list(self._flat_weights)
        _checks.check_weight_shapes(weights, self._flat_weights_names, self._weight_shapes)
        _checks.check_input(input, weights[0], dims, self.input_size)
        self._check_state_shapes(hx, batch)
        return weights

    def _call(
        self,
        input: Tensor,
        hx: tuple[Tensor, ...] | None,
        weights: list[Tensor],
        batch: int,
        **steps: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...], States | None]:
        """Call the engine, under autocast in the dtype that autocast asks for."""
        dropout = self.dropout if self._drops() else 0.0
        anew = self._learned_states()
        if anew and hx is None:
            hx = tuple(state.expand(-1, batch, -1) for state in anew)
        half, wide, casts = autocast.requested(input), None, False
        batch_sizes, return_states = steps.get("batch_sizes"), steps.get("return_states", False)
        drops = self.training and self._recurrent_dropout() > 0
        # With lengths and resets not, as composed operations may have to serve there.
        cuts = any(steps.get(name) is not None for name in ("lengths", "reset"))
        if half is not None and not (drops or cuts):
            given = (self._options, input, hx, weights, batch_sizes, return_states)
            half = None if casts_by_itself(*given) else half
            casts = half is None
        if half is not None:
            fused = self._cell == "LSTM" and not self.proj_size and "batch_sizes" not in steps
            wide = autocast.result_dtype(self._cell, half, input, hx, fused)
            input = autocast.cast(input, half)
            hx = None if hx is None else tuple(autocast.cast(state, half) for state in hx)
            anew = tuple(autocast.cast(state, half) for state in anew)
            weights = [autocast.cast(weight, half) for weight in weights]
        if not casts:
            _checks.check_companions(input, (*(hx or ()), *anew), weights)
        output, hx_n, states = onnx_export.route(recurrent)(
            self._options,
            input,
            hx,
            weights,
            extras=self._extras(input, batch, anew if steps.get("reset") is not None else ()),
            dropout=dropout,
            frozen=None if half is not None or self._given() else self._prepared.frozen,
            **steps,
        )
        if wide is not None:
            # A projected h is a product, which torch leaves in autocast's dtype.
            narrow = input.dtype if self.proj_size else wide
            h_n, *c_n = hx_n
            output = output.to(narrow)
            hx_n = (h_n.to(narrow), *(state.to(wide) for state in c_n))
        return output, hx_n, states

    def _learned_states(self) -> tuple[Tensor, ...]:
        """The parameters h_0 and c_0 of this moment, once they fit; () where none are learned."""
        if not self._own["learn_initial_state"]:
            return ()
        shapes = self._learned_shapes()
        states = tuple(getattr(self, name) for name in shapes)
        _checks.check_weight_shapes(states, tuple(shapes), tuple(shapes.values()))
        return states

    def _extras(self, input: Tensor, batch: int, anew: tuple[Tensor, ...]) -> Extras:
        """What the options ask for besides: masks while training, the states after a reset."""
        extras = NO_EXTRAS
        if self.training:
            size, dropout = self.hidden_size, self._recurrent_dropout()
            extras = random_masks.draw(self._options, input, batch, size, dropout)
        names = ("reset_h", "reset_c")
        anew_by_name = {name: s[:, 0] for name, s in zip(names, anew, strict=False)}
        return extras._replace(**anew_by_name) if anew else extras


def restore_own_options(module: Any, state: dict[str, Any]) -> None:
    """Give a layer or a cell its own options from a pickled state, once its attributes are there.

    They stand in ``_own``; in the files of 0.1, which hold ``_options``, as attributes; in torch's
    not at all.
    """
    if "_own" in state:
        return
    saved = state if "_options" in state else {}
    module._own = {name: saved.get(name, own) for name, own in module.own_options.items()}
    for name, value in module._own.items():
        if not hasattr(module, name):
            setattr(module, name, value)


_STARTS = {
    "norm_ih": 1.0,
    "norm_hh": 1.0,
    "norm_c": 1.0,
    "norm_c_bias": 0.0,
    "h_0": 0.0,
    "c_0": 0.0,
}


def initialize(module: Any) -> None:
    """Give every parameter of a layer or a cell the value that it starts with."""
    size = module.hidden_size
    bound = 1.0 / math.sqrt(size) if size > 0 else 0.0
    for path, parameter in module.named_parameters():
        name = path.removeprefix("parametrizations.").partition(".")[0]
        start = _STARTS.get(re.sub(r"_l\d+(_reverse)?$", "", name))
        if start is None:
            torch.nn.init.uniform_(parameter, -bound, bound)
        else:
            torch.nn.init.constant_(parameter, start)
    forget_bias = module._own.get("forget_bias")
    if forget_bias is not None:
        with torch.no_grad():
            for name in module._flat_weights_names:
                if name.startswith("bias_ih"):
                    getattr(module, name)[size : 2 * size].fill_(float(forget_bias))
