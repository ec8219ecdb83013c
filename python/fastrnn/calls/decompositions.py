"""Our operators in torch's own: what is needed where a graph must hold aten operators alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .._options import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from .._options import Options


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions`` that lowers fastrnn's operators to aten.

    ``torch.export`` keeps each layer as one operator of ours, which no other backend knows. With
    this table the graph holds aten operators alone, as ExecuTorch, OpenVINO, TVM, LiteRT and
    Core ML take them; every option is in it, and the numbers are the layer's up to rounding. Add it
    to torch's own table to lower the rest of the model too.

    The steps are unrolled, as torch's own are: the number of steps T is that of the example that
    was exported, and B may be dynamic.

    Returns:
        The decompositions, by operator: forward and backward, of one layer and of the ensembles
        that ``torch.func.vmap`` makes.

    Raises:
        ValueError, while decomposing: T is dynamic, or the input is a PackedSequence, whose sizes
            the graph does not know; give a padded tensor and ``lengths``.

    >>> import torch, fastrnn
    >>> program = torch.export.export(fastrnn.LSTM(3, 4).eval(), (torch.randn(5, 2, 3),))
    >>> table = torch.export.default_decompositions()
    >>> table.update(fastrnn.decompositions())
    >>> graph = program.run_decompositions(table).graph
    >>> any("fastrnn" in str(node.target) for node in graph.nodes)
    False
    """
    from . import transforms

    one, ensemble = transforms.ONE, transforms._ENSEMBLE
    return {
        one.forward: partial(_forward, one),
        one.backward: partial(_backward, one),
        ensemble.forward: partial(_forward, ensemble),
        ensemble.backward: partial(_backward, ensemble),
    }


def _forward(operators: Any, *arguments: Any) -> tuple[Any, ...]:
    from . import transforms

    *given, options, states, save, _ = arguments
    _check(operators, given)
    count = len(transforms._FORWARD)
    # `_backward` computes everything again: it does not read `saved`.
    scalars = (options, states or save, False, False)
    return transforms._composed_outputs(operators, given[:count], scalars)


def _backward(operators: Any, *arguments: Any) -> list[Any]:
    from . import transforms

    *given, text, needs, _ = arguments
    _check(operators, given)
    count = len(transforms._BACKWARD)
    forward, options = given[: len(transforms._FORWARD)], parse(text)
    cotangents = given[count - len(transforms._COTANGENTS) : count]
    if not operators.members:
        return _gradients(options, needs, forward, cotangents)
    every: list[Sequence[Tensor]] = [
        _gradients(
            options,
            needs,
            transforms._member(forward, member),
            [None if d is None else d.select(0, member) for d in cotangents],
        )
        for member in range(given[0].shape[0])
    ]
    by_argument = zip(*every, strict=True)
    return [torch.stack(ds) if need else ds[0] for ds, need in zip(by_argument, needs, strict=True)]


def _gradients(
    options: Options, needs: Sequence[bool], arguments: Sequence[Any], cotangents: Any
) -> list[Tensor]:
    """What the operator ``backward`` gives, by autograd through the composed operations."""
    from . import torch_kernels, transforms

    input = arguments[0]
    flat = list(transforms._flat(arguments))
    needed = [place for place, need in enumerate(needs) if need]
    with torch_kernels.recording(), torch.enable_grad():
        leaves = [flat[place].detach().requires_grad_() for place in needed]  # type: ignore[union-attr]
        for place, leaf in zip(needed, leaves, strict=True):
            flat[place] = leaf
        stack = transforms._stack(options, transforms._nested(flat, transforms._FORWARD))
        outputs: tuple[Any, ...] = (
            [stack.hidden[-1]],
            stack.hidden,
            stack.cell,
            [stack.h_n],
            [stack.c_n],
        )
        d_output, d_hidden, d_cell, d_h_n, d_c_n = cotangents
        gradients: tuple[Any, ...] = ([d_output], d_hidden, d_cell, [d_h_n], [d_c_n])
        pairs = [
            (y, d)
            for ys, ds in zip(outputs, gradients, strict=True)
            if ds is not None
            for y, d in zip(ys, ds, strict=True)
            if y is not None and d is not None and y.requires_grad
        ]
        found = torch.autograd.grad(
            [y for y, _ in pairs], leaves, [d for _, d in pairs], materialize_grads=True
        )
    answer = [input.new_empty(0)] * len(needs)
    for place, d in zip(needed, found, strict=True):
        answer[place] = d
    return answer


def _check(operators: Any, given: Sequence[Any]) -> None:
    names = (argument.name for argument in operators.forward._schema.arguments)
    named = dict(zip(names, given, strict=False))
    if named["batch_sizes"] is not None:
        raise ValueError(
            "fastrnn.decompositions() cannot lower a layer whose input is a PackedSequence, as the "
            "graph does not know its sizes: give the layer a padded tensor and lengths="
        )
    if isinstance(named["input"].shape[operators.members], torch.SymInt):
        raise ValueError(
            "fastrnn.decompositions() unrolls the steps of a layer, so their number must be "
            "constant, got a dynamic one: export with that dimension static (the batch may be "
            "dynamic), or keep fastrnn's operators in the graph"
        )
