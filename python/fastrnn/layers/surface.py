"""The methods of torch.nn's base classes RNNBase and RNNCellBase, apart from forward.

Tools and users' subclasses call them; fastrnn's own forward does not.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import TYPE_CHECKING, Any, ClassVar

from torch.nn import Module

from .. import _checks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

# fastrnn's classes with torch.nn's classes of the same kind; filled by `patch_torch`, else empty.
RECOGNISED: dict[type, type] = {}

# Attributes that a module derives from its other attributes, or keeps for the engine.
DERIVED = ("_options", "_weight_shapes", "_prepared")

GIVEN = "_given_weights"


class Recognising(ABCMeta):
    """The metaclass of fastrnn's base classes: while torch is patched, it accepts torch's layers.

    ``isinstance(m, torch.nn.LSTM)`` then calls fastrnn's class, also for torch's layers constructed
    earlier. The metaclass derives from ABCMeta, since users' classes may have both ABC and a layer
    of torch.nn as bases.
    """

    # Both methods check torch's class first, because ABCMeta caches its answers for ever.

    def __instancecheck__(cls, instance: Any) -> bool:
        torchs = RECOGNISED.get(cls)
        if torchs is not None and isinstance(instance, torchs):
            return True
        return super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        torchs = RECOGNISED.get(cls)
        if torchs is not None and issubclass(subclass, torchs):
            return True
        return super().__subclasscheck__(subclass)


def is_a(module: Any, *classes: type) -> bool:
    """Whether the module is an instance of a class, independently of `patch_torch`."""
    return not set(classes).isdisjoint(type(module).__mro__)


def state_of(module: Module) -> dict[str, Any]:
    """A module's state for pickling and copying: all attributes but the derived ones."""
    return {name: value for name, value in module.__dict__.items() if name not in DERIVED}


class FlatWeights(list["Tensor | None"]):
    """``layer._flat_weights``: as in torch.nn, writing to the list changes the layer's weights."""

    def __init__(self, layer: Any, weights: Iterable[Tensor | None]) -> None:
        super().__init__(weights)
        self._layer = layer

    def __setitem__(self, index: Any, weight: Any) -> None:
        super().__setitem__(index, weight)
        self._layer._flat_weights = self

    def __reduce__(self) -> Any:  # a copy is a plain list
        return list, (list(self),)


class RNNSurface(Module, metaclass=Recognising):
    """RNNBase's methods, with RNNBase's messages."""

    __jit_unused_properties__: ClassVar[list[str]] = ["all_weights"]

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    batch_first: bool
    bidirectional: bool
    proj_size: int
    _all_weights: list[list[str]]
    _flat_weights_names: list[str]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights of each layer and direction, in torch.nn's order."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    # ---- the list of weights ------------------------------------------------------------------

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights that the next call uses.

        As in torch.nn, a weight written here replaces the parameter at its position in calls,
        until the parameter is replaced or the layer is moved.
        """
        given = self._given()
        names = self._flat_weights_names
        return FlatWeights(self, (given.get(n, getattr(self, n, None)) for n in names))

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        names = self._flat_weights_names
        if len(weights) != len(names):
            raise ValueError(
                f"_flat_weights must hold {len(names)} tensors, {', '.join(names)}; "
                f"got {len(weights)}"
            )
        given = {}
        for name, weight in zip(names, weights, strict=True):
            own = getattr(self, name, None)
            if weight is not own:
                given[name] = (weight, own)
        self.__dict__.pop(GIVEN, None)
        if given:
            self.__dict__[GIVEN] = given

    def _given(self) -> dict[str, Tensor | None]:
        """The weights written to ``_flat_weights``, if no parameter was replaced since then."""
        given = self.__dict__.get(GIVEN)
        if given is None:
            return {}
        if any(getattr(self, name, None) is not own for name, (_, own) in given.items()):
            del self.__dict__[GIVEN]
            return {}
        return {name: weight for name, (weight, _) in given.items()}

    def _init_flat_weights(self) -> None:
        self.__dict__.pop(GIVEN, None)

    def _update_flat_weights(self) -> None:
        """Does nothing: every call reads the parameters."""

    def _weights_have_changed(self) -> bool:
        return False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._init_flat_weights()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    # ---- checks -------------------------------------------------------------------------------

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise an error for an input that does not fit the layer.

        Arguments:
            input: (T, B, I), with ``batch_first`` (B, T, I); with ``batch_sizes`` (N, I).
            batch_sizes: those of a PackedSequence, or None.

        Raises:
            ValueError: the input's dtype is not that of the weights.
            RuntimeError: the input has a wrong number of dimensions, or a wrong size.
        """
        weight: Any = self._flat_weights[0]
        dims = 3 if batch_sizes is None else 2
        _checks.check_input(input, weight, dims, self.input_size)

    def get_expected_hidden_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """The shape (L·D, B, O) of the state h for this input."""
        return self._state_shape(input, batch_sizes, self.proj_size or self.hidden_size)

    def _state_shape(
        self, input: Tensor, batch_sizes: Tensor | None, size: int
    ) -> tuple[int, int, int]:
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        else:
            batch = input.size(0 if self.batch_first else 1)
        return self.num_layers * (2 if self.bidirectional else 1), batch, size

    def check_hidden_size(
        self,
        hx: Tensor,
        expected_hidden_size: tuple[int, int, int],
        msg: str = "Expected hidden size {}, got {}",
    ) -> None:
        """Raise a RuntimeError for a state of another shape; ``msg`` formats both shapes."""
        if hx.size() != expected_hidden_size:
            raise RuntimeError(msg.format(expected_hidden_size, list(hx.size())))

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """`check_input`, and `check_hidden_size` of the state; for an LSTM of the pair (h, c)."""
        self.check_input(input, batch_sizes)
        self.check_hidden_size(hidden, self.get_expected_hidden_size(input, batch_sizes))

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The state, for an LSTM the pair (h, c), with its rows in the order of ``permutation``."""
        return hx if permutation is None else hx.index_select(1, permutation)


class LSTMSurface(RNNSurface):
    """The same for two states."""

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """The shape (L·D, B, H) of the state c for this input."""
        return self._state_shape(input, batch_sizes, self.hidden_size)

    def check_forward_args(
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        self.check_input(input, batch_sizes)
        expected_h = self.get_expected_hidden_size(input, batch_sizes)
        self.check_hidden_size(hidden[0], expected_h, "Expected hidden[0] size {}, got {}")
        expected_c = self.get_expected_cell_size(input, batch_sizes)
        self.check_hidden_size(hidden[1], expected_c, "Expected hidden[1] size {}, got {}")

    def permute_hidden(
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)
