"""A program and the engine's form of its passes, built on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .. import _C
from .passes import Pass, Passes, backward_pass, passes

if TYPE_CHECKING:
    from .grad import Needs
    from .ir import Graph


class Ready(NamedTuple):
    """A pass and the engine's form of it."""

    plan: Pass
    program: _C.Program


class Prepared:
    """A program with its passes.

    What forward saves depends on ``needs``, the gradients that `backward` may compute.

    Attributes:
        graph: the program.
        widths: of its states.
        dtype: ``"float32"`` or ``"float64"``.
    """

    def __init__(self, graph: Graph, widths: dict[int, int], dtype: str) -> None:
        self.graph, self.widths, self.dtype = graph, widths, dtype
        self._passes: dict[Needs | None, Passes] = {}
        self._forward: dict[Needs | None, Ready] = {}
        self._backward: dict[tuple[Needs, bool, Needs, frozenset[int]], Ready] = {}

    def passes(self, needs: Needs | None) -> Passes:
        found = self._passes.get(needs)
        if found is None:
            found = self._passes[needs] = passes(self.graph, self.widths, needs)
        return found

    def forward(self, needs: Needs | None) -> Ready:
        found = self._forward.get(needs)
        if found is None:
            found = self._forward[needs] = self._ready(self.passes(needs).forward)
        return found

    def backward(
        self,
        needs: Needs,
        reverse: bool,
        wanted: Needs | None = None,
        ys: frozenset[int] | None = None,
    ) -> Ready:
        """The backward pass for a forward pass with ``needs``.

        Arguments:
            wanted: the gradients of this call; None: all of ``needs``.
            ys: the outputs that have a gradient; None: all.
        """
        wanted = needs if wanted is None else wanted
        ys = frozenset(self.graph.ys) if ys is None else ys
        key = (needs, reverse, wanted, ys)
        found = self._backward.get(key)
        if found is None:
            part = None if (wanted, ys) == (needs, frozenset(self.graph.ys)) else (wanted, ys)
            found = self._ready(backward_pass(self.graph, self.passes(needs), reverse, part))
            self._backward[key] = found
        return found

    def _ready(self, plan: Pass) -> Ready:
        return Ready(plan, _C.Program(self.dtype, *plan.code.arguments()))
