"""A program, and what the engine made of its passes, each made when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .. import _C
from .passes import Pass, Passes, part_of_backward, passes

if TYPE_CHECKING:
    from .grad import Needs
    from .ir import Graph


class Ready(NamedTuple):
    """A pass, and the engine's form of it."""

    plan: Pass
    program: _C.Program


class Prepared:
    """Whose gradients are wanted decides what forward keeps; `backward` may want fewer of them.

    Attributes:
        graph: the program.
        widths: of its states.
        dtype: ``"float32"`` or ``"float64"``.
    """

    def __init__(self, graph: Graph, widths: dict[int, int], dtype: str) -> None:
        self.graph, self.widths, self.dtype = graph, widths, dtype
        self._passes: dict[tuple[Needs | None, bool], Passes] = {}
        self._forward: dict[tuple[Needs | None, bool], Ready] = {}
        self._backward: dict[tuple[Needs, bool, Needs, frozenset[int]], Ready] = {}

    def passes(self, needs: Needs | None, reverse: bool) -> Passes:
        found = self._passes.get((needs, reverse))
        if found is None:
            found = passes(self.graph, self.widths, needs, reverse)
            self._passes[needs, reverse] = found
        return found

    def forward(self, needs: Needs | None, reverse: bool) -> Ready:
        found = self._forward.get((needs, reverse))
        if found is None:
            found = self._ready(self.passes(needs, reverse).forward)
            self._forward[needs, reverse] = found
        return found

    def backward(
        self,
        needs: Needs,
        reverse: bool,
        wanted: Needs | None = None,
        ys: frozenset[int] | None = None,
    ) -> Ready:
        """Of a forward pass with ``needs``.

        Arguments:
            wanted: the gradients of this call; None: all of ``needs``.
            ys: the outputs that have a gradient; None: all.
        """
        wanted = needs if wanted is None else wanted
        ys = frozenset(self.graph.ys) if ys is None else ys
        key = (needs, reverse, wanted, ys)
        found = self._backward.get(key)
        if found is None:
            whole = self.passes(needs, reverse)
            assert whole.backward is not None
            if wanted == needs and ys == frozenset(self.graph.ys):
                found = self._ready(whole.backward)
            else:
                found = self._ready(part_of_backward(self.graph, whole, wanted, ys, reverse))
            self._backward[key] = found
        return found

    def _ready(self, plan: Pass) -> Ready:
        return Ready(plan, _C.Program(self.dtype, *plan.code.arguments()))
