"""Runs a program in torch operations, step by step, for double backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ir import Arg, Graph, Product, Reduce

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda a: a,
    "stop": torch.Tensor.detach,
    "bfloat16": lambda a: a.bfloat16().to(a.dtype),
    "float16": lambda a: a.half().to(a.dtype),
    "softplus1": lambda a: torch.nn.functional.softplus(a, threshold=80),
    **{
        name: getattr(torch, name)
        for name in "neg abs sign reciprocal sqrt rsqrt exp expm1 log log1p sin cos erf sigmoid "
        "tanh relu".split()
    },
}
_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    name: getattr(torch, name) for name in "add sub mul div maximum minimum".split()
}
_COMPARE = {name: getattr(torch, name) for name in "lt le gt ge eq ne".split()}


class Interpreter:
    """The nodes of a program for one step of all rows."""

    def __init__(self, graph: Graph, shared: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        self.graph, self.shared, self.fixed = graph, shared, fixed

    def step(
        self, carry: dict[int, Tensor], xs: Sequence[Tensor]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The states and outputs after a step; all are (B, width)."""
        graph = self.graph
        values: list[Any] = []
        inputs: dict[str, Any] = {"carry": carry, "x": xs, "fixed": self.fixed}
        rows = next(iter([*carry.values(), *xs, *self.fixed]))
        for node in graph.nodes:
            if node.op in inputs:
                values.append(inputs[node.op][node.info])
            elif node.op == "shared":
                flat = self.shared[node.info]  # type: ignore[call-overload]
                values.append(flat.expand(rows.shape[0], -1))
            elif node.op == "const":
                assert isinstance(node.info, float)
                values.append(rows.new_full((rows.shape[0], 1), node.info))
            else:
                values.append(self._node(node, values))
        nexts = {k: part(values, a, carry[k].shape[1]) for k, a in graph.nexts.items()}
        return nexts, {i: part(values, a, graph.widths[i]) for i, a in graph.ys.items()}

    def _node(self, node: Any, values: list[Any]) -> Tensor:
        info = node.info
        if isinstance(info, Product):
            return self._product(node, info, values)
        if isinstance(info, Reduce):
            return _reduce(node.args[0], info, values)
        if node.op == "collect":
            x: Tensor = values[node.args[0].value]
            if all(len(entry) == 1 for entry in info):
                return x[:, torch.tensor([entry[0] for entry in info])]
            zero = x.new_zeros(x.shape[0])
            return torch.stack([sum((x[:, e] for e in entry), zero) for entry in info], 1)
        if node.op == "cat":
            return torch.cat(
                [part(values, a, w).expand(-1, w) for a, w in zip(node.args, info, strict=True)], 1
            )
        operands = [part(values, a, node.width) for a in node.args]
        if node.op in _ONE:
            return _ONE[node.op](operands[0]).expand(-1, node.width)
        a, b = operands[:2]
        if node.op in _TWO:
            return _TWO[node.op](a, b).expand(-1, node.width)
        if node.op in _COMPARE:
            compared: Tensor = _COMPARE[node.op](a, b).to(a.dtype).expand(-1, node.width)
            return compared
        if node.op == "where":
            return torch.where(a != 0, b, operands[2]).expand(-1, node.width)
        return torch.addcmul(operands[2], a, b)

    def _product(self, node: Any, p: Product, values: list[Any]) -> Tensor:
        weight = self.shared[self.graph.nodes[p.weight].info]  # type: ignore[call-overload]
        (x,) = node.args
        parts = []
        for g in range(p.groups):
            matrix = weight.as_strided(
                (p.K, p.N), (p.w_k, p.w_n), weight.storage_offset() + p.offset + g * p.w_group
            )
            begin = x.offset + g * p.in_group
            parts.append(values[x.value][:, begin : begin + p.K] @ matrix)
        return torch.cat(parts, 1)


def part(values: list[Any], a: Arg, width: int) -> Tensor:
    """An operand, (B, width) or (B, 1)."""
    taken: Tensor = values[a.value][:, a.offset : a.offset + (1 if a.scalar else width)]
    return taken


def _reduce(x: Arg, r: Reduce, values: list[Any]) -> Tensor:
    columns = torch.tensor(
        [
            [x.offset + g * r.segment + j * r.element for j in range(r.length)]
            for g in range(r.groups)
        ]
    )
    taken: Tensor = values[x.value][:, columns]
    return taken.sum(-1) if r.kind == "sum" else taken.amax(-1)
