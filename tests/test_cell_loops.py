"""A cell called in a loop: its steps share one product for the gradient of the weights.

Whatever is asked of the graph, the gradients are those of torch.nn's cell.
"""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn.calls import autograd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STEPS, ROWS, INPUTS, UNITS = 5, 3, 4, 6
CELLS = {
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
    "LSTM": {},
    "LSTM without bias": {"bias": False},
    "GRU": {},
}
every_cell = pytest.mark.parametrize("name", CELLS)


def both(name: str, **more: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn's cell and ours, of the same weights."""
    made = {"dtype": torch.float64, **CELLS[name], **more}
    cell = f"{name.partition(' ')[0]}Cell"
    theirs = getattr(torch.nn, cell)(INPUTS, UNITS, **made)
    ours = getattr(fastrnn, cell)(INPUTS, UNITS, **made)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(STEPS, ROWS, INPUTS, dtype=dtype).requires_grad_()


def first(hx: Any) -> Tensor:
    h: Tensor = hx[0] if isinstance(hx, tuple) else hx
    return h


def loop(cell: torch.nn.Module, x: Tensor, hx: Any = None) -> Tensor:
    total = x.new_zeros(())
    for k, step in enumerate(x):
        hx = cell(step, hx)
        total = total + (k + 1) * first(hx).square().sum()
    return total


def leaves(cell: torch.nn.Module, x: Tensor) -> list[Tensor]:
    return [x, *cell.parameters()]


def close(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    torch.testing.assert_close(list(ours), list(theirs), rtol=1e-11, atol=1e-12)


def compare(name: str, work: Callable[[torch.nn.Module, Tensor], Any], **more: Any) -> None:
    theirs, ours = both(name, **more)
    x = inputs()
    close(work(ours, x), work(theirs, x))


@every_cell
def test_gradients(name: str) -> None:
    compare(name, lambda cell, x: torch.autograd.grad(loop(cell, x), leaves(cell, x)))


@every_cell
def test_the_weights_have_one_node_after_the_first_step(name: str) -> None:
    """So the test above tests what it is about."""
    _, ours = both(name)
    seen: set[Any] = set()
    hx = None
    for step in inputs():
        hx = ours(step, hx)
        seen |= {
            node
            for node, _ in first(hx).grad_fn.next_functions
            if node is not None and type(node).__name__ == "_WeightsBackward"
        }
    assert len(seen) == 1


@every_cell
def test_steps_are_freed_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long loop multiplies after every few rows: here after two steps of four."""
    monkeypatch.setattr(autograd._Steps, "_ROWS", 2 * ROWS)
    compare(name, lambda cell, x: torch.autograd.grad(loop(cell, x), leaves(cell, x)))
    waiting: list[int] = []
    multiply = autograd._Steps._multiply

    def counted(self: Any, now: Any) -> None:
        waiting.append(len(now.steps))
        multiply(self, now)

    monkeypatch.setattr(autograd._Steps, "_multiply", counted)
    _, ours = both(name)
    loop(ours, inputs()).backward()
    assert waiting == [2, 2]


@every_cell
def test_backward_again_and_in_part(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> list[Tensor]:
        total, found = loop(cell, x), []
        for asked in (leaves(cell, x), [x], [cell.weight_hh], leaves(cell, x)):
            found += torch.autograd.grad(total, asked, retain_graph=True)
        return found

    compare(name, work)


@every_cell
def test_backward_of_each_step_by_itself(name: str) -> None:
    """Passes that reach some of the steps, one after the other, into .grad."""

    def work(cell: torch.nn.Module, x: Tensor) -> list[Tensor | None]:
        cell.zero_grad()
        hx = None
        for step in x.detach():
            hx = cell(step, hx)
            first(hx).sum().backward(retain_graph=True)
        return [p.grad for p in cell.parameters()]

    compare(name, work)


@every_cell
def test_gradients_of_gradients(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> list[Tensor]:
        once = torch.autograd.grad(loop(cell, x), leaves(cell, x), create_graph=True)
        total = sum((g.square().sum() for g in once), x.new_zeros(()))
        return [*once, *torch.autograd.grad(total, leaves(cell, x))]

    compare(name, work)


@every_cell
def test_batched_gradients(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> Sequence[Tensor]:
        hx = None
        for step in x:
            hx = cell(step, hx)
        h = first(hx)
        each = torch.eye(h.numel(), dtype=h.dtype).view(-1, *h.shape)
        return torch.autograd.grad(h, leaves(cell, x), each, is_grads_batched=True)

    compare(name, work)


@every_cell
def test_some_weights_alone(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> Sequence[Tensor]:
        cell.weight_ih.requires_grad_(False)
        asked = [p for p in leaves(cell, x) if p.requires_grad]
        return torch.autograd.grad(loop(cell, x), asked)

    compare(name, work)


@every_cell
def test_no_weights(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(loop(cell.requires_grad_(False), x), [x])

    compare(name, work)


@every_cell
def test_weights_that_begin_to_need_a_gradient_in_the_middle(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> Sequence[Tensor]:
        cell.weight_hh.requires_grad_(False)
        hx = cell(x[1], cell(x[0]))
        cell.weight_hh.requires_grad_(True)
        return torch.autograd.grad(loop(cell, x[2:], hx), leaves(cell, x))

    compare(name, work)


@every_cell
def test_branches_of_one_state(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> Sequence[Tensor]:
        hx = cell(x[1], cell(x[0]))
        total = loop(cell, x[2:], hx) + loop(cell, x[3:], hx) * loop(cell, x[:2])
        return torch.autograd.grad(total, leaves(cell, x))

    compare(name, work)


def test_a_stack_of_cells() -> None:
    below, above = both("LSTM"), both("GRU")
    widen = torch.nn.Linear(UNITS, INPUTS, dtype=torch.float64)

    def work(lower: torch.nn.Module, upper: torch.nn.Module, x: Tensor) -> Sequence[Tensor]:
        total, hx, top = x.new_zeros(()), None, None
        for step in x:
            hx = lower(step, hx)
            top = upper(widen(hx[0]), top)
            total = total + top.square().sum()
        every = [x, *lower.parameters(), *upper.parameters(), *widen.parameters()]
        return torch.autograd.grad(total, every)

    x = inputs()
    close(work(below[1], above[1], x), work(below[0], above[0], x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own reads it
@every_cell
def test_where_torch_compiles_backward(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> list[Tensor | None]:
        cell.zero_grad()
        total = loop(cell, x.detach())
        with compiled_autograd._enable(lambda graph: graph):
            total.backward()
        return [p.grad for p in cell.parameters()]

    compare(name, work)


@every_cell
def test_under_checkpoint(name: str) -> None:
    def work(cell: torch.nn.Module, x: Tensor) -> Sequence[Tensor]:
        hx = cell(x[0])
        total = checkpoint(lambda x, hx: loop(cell, x, hx), x[1:], hx, use_reentrant=False)
        return torch.autograd.grad(total, leaves(cell, x))

    compare(name, work)


@every_cell
def test_a_weight_changed_between_steps_is_an_error(name: str) -> None:
    for cell in both(name):
        x = inputs()
        hx = cell(x[1], cell(x[0]))
        with torch.no_grad():
            cell.weight_hh.mul_(2)
        total = loop(cell, x[2:], hx)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@every_cell
def test_an_input_changed_by_a_hook_is_an_error(name: str) -> None:
    """Between backward of its step and that of the weights, where torch does not look again."""
    _, ours = both(name)
    x = inputs().detach()
    last = x[2].clone()
    hx = ours(x[1], ours(x[0]))

    def change(_: Tensor) -> None:
        last.add_(1)

    first(hx).register_hook(change)
    total = first(ours(last, hx)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@every_cell
def test_a_pass_that_failed_leaves_nothing_behind(name: str) -> None:
    theirs, ours = both(name)
    x = inputs()
    found = []
    for cell in (theirs, ours):
        hx, total = None, x.new_zeros(())
        fail = True

        def refuse(_: Tensor) -> None:
            if fail:  # noqa: B023
                raise ArithmeticError

        for k, step in enumerate(x):
            hx = cell(step, hx)
            total = total + first(hx).sum()
            if k == 1:
                first(hx).register_hook(refuse)
        with pytest.raises(ArithmeticError):
            total.backward(retain_graph=True)
        fail = False
        found.append(torch.autograd.grad(total, leaves(cell, x)))
    close(found[1], found[0])


@every_cell
def test_the_graph_is_freed(name: str) -> None:
    _, ours = both(name)
    x = inputs()
    gone = []
    for run in (lambda total: total.backward(), lambda total: None):
        total = loop(ours, x)
        node: Any = total.grad_fn
        while type(node).__name__ != "RecurrenceBackward":
            node = next(n for n, _ in node.next_functions if n is not None)
        gone += [weakref.ref(node), weakref.ref(node.next_loop.steps)]
        run(total)
        del total, node
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_cell
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Of half types the gates' gradients are summed in float32, over all steps."""
    theirs, ours = both(name, dtype=dtype)
    x = inputs(dtype)
    exact = theirs.double()
    wide = x.detach().double().requires_grad_()
    want = torch.autograd.grad(loop(exact, wide), leaves(exact, wide))
    got = torch.autograd.grad(loop(ours, x), leaves(ours, x))
    eps = torch.finfo(dtype).eps
    for mine, right in zip(got, want, strict=True):
        assert (mine - right).abs().max() <= 40 * eps * right.abs().max()


@every_cell
def test_the_same_bits_every_time(name: str) -> None:
    _, ours = both(name, dtype=torch.float32)
    x = inputs(torch.float32)
    found = [torch.autograd.grad(loop(ours, x), leaves(ours, x)) for _ in range(3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found.append(torch.autograd.grad(loop(ours, x), leaves(ours, x)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
