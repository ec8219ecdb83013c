"""Programs: what a step may do beside its operations, by the engine or by the loop."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastrnn
import steps

T, B, H = 3, 4, 6


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _as_the_loop(step: Any, init: Any = None, xs: Any = None, weights: Any = ()) -> list[str]:
    """Asserts that values and gradients are the loop's, however it runs; gives the warnings."""
    init = _values(B, H) if init is None else init
    xs = _values(T, B, H, seed=1) if xs is None else xs
    results = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        given = [t.clone().requires_grad_() for t in (init, xs)]
        outputs = fastrnn.scan(step, *given)
        results.append((outputs, steps.gradients_of(outputs, [*given, *weights])))
        with steps.by_loop():
            outputs = fastrnn.scan(step, *given)
            results.append((outputs, steps.gradients_of(outputs, [*given, *weights])))
    torch.testing.assert_close(*results, equal_nan=True)
    return [str(w.message) for w in said]


# ---- truth values --------------------------------------------------------------------------------

TRUTHS = {
    "cast": lambda h, x: x.bool(),
    "sum": lambda h, x: (x > 0) + (h > 0),
    "filled": lambda h, x: torch.full_like(x > 0, 5),
    "masked": lambda h, x: (x > 0).masked_fill(h > 0, 2),
    "of a cast": lambda h, x: x.to(torch.bool) & (h > 0),
    "not": lambda h, x: ~x.bool(),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_truths_are_0_or_1(name: str) -> None:
    """A bool tensor counts as 1 where it is true, whatever it was made of, and y is bool."""

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        truth = TRUTHS[name](h, x)
        return torch.tanh(h + x * truth.to(x.dtype)), truth

    steps.assert_both_ways(step, _values(B, H), _values(T, B, H, seed=1))


def test_bool_state() -> None:
    """A state may be truth values, and stays so."""

    def step(carry: Any, x: torch.Tensor) -> Any:
        h, on = carry
        return (torch.tanh(h + x * on), on ^ (h > x)), on

    init = (_values(B, H), _values(B, H, seed=2) > 0)
    steps.assert_both_ways(step, init, _values(T, B, H, seed=1))


# ---- numbers in the place of tensors -------------------------------------------------------------

CONSTANT = {
    "joined": lambda h, x: (h + torch.cat([x[:, :4], x.new_zeros(x.shape[0], 2)], 1), x),
    "joined like": lambda h, x: (h + torch.cat([x[:, :4], torch.ones_like(x[:, 4:])], 1), x),
    "y": lambda h, x: (torch.tanh(h + x), torch.ones_like(x)),
    "state": lambda h, x: (torch.zeros_like(h), h + x),
    "multiplied": lambda h, x: (h + F.linear(torch.ones_like(x), _values(H, H)), x),
    "summed": lambda h, x: (h + x * torch.ones_like(x).sum(-1, keepdim=True), x),
    "normalised": lambda h, x: (h + x * torch.softmax(torch.zeros_like(x), -1), x),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_filled_tensors(name: str) -> None:
    """A tensor of one number is as good as any other."""
    steps.assert_both_ways(CONSTANT[name], _values(B, H), _values(T, B, H, seed=1))


SHARED = {
    "joined to x": lambda h, x, w: (h + torch.cat([x[:, :3], w[0].expand(len(x), -1)], -1), x),
    "stacked": lambda h, x, w: (
        h + torch.stack([x[:, :3], w[:1].expand(len(x), 3)], -1).flatten(1),
        x,
    ),
    "y": lambda h, x, w: (h + x, w[0].expand(len(x), -1)),
    "y of zeros": lambda h, x, w: (h + x, x.new_zeros(len(x), 2)),
    "y of weights": lambda h, x, w: (h + x, F.linear(x.new_ones(len(x), 3), w)),
    "state": lambda h, x, w: (w.reshape(1, -1)[:, :H].expand(len(x), -1), h + x),
    "nothing joined": lambda h, x, w: (h + torch.cat([x, x[:, :0]], -1), x[:, 1:]),
}


@pytest.mark.parametrize("name", SHARED)
def test_weights_of_each_row(name: str) -> None:
    """What all rows share may stand beside what each has, and be returned for each."""
    weight = _values(3, 3, seed=4).requires_grad_()

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        return SHARED[name](h, x, weight)

    many = 700  # rows, too many numbers for one
    steps.assert_both_ways(step, _values(many, H), _values(T, many, H, seed=1), [weight])


def test_y_of_another_dtype_keeps_it() -> None:
    _as_the_loop(lambda h, x: (torch.tanh(h + x), torch.ones(3)))


# ---- the batch -----------------------------------------------------------------------------------


def _rows_of(step: Any, rows: int) -> Any:
    """Runs a step over so many rows by whatever runs it, and by the loop."""
    init, xs = _values(rows, H), _values(T, rows, H, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = fastrnn.scan(step, init, xs)
        with steps.by_loop():
            return ours, fastrnn.scan(step, init, xs)


BY_BATCH = {
    "branch": lambda h, x: (torch.tanh(h + x) if x.shape[0] == 1 else torch.tanh(h - x), x),
    "branch on many": lambda h, x: (torch.tanh(h + x) if len(x) > 200 else torch.tanh(h - x), x),
    "squeeze": lambda h, x: (torch.tanh(h + x), h.squeeze()),
    "number": lambda h, x: (torch.tanh(h + x / x.shape[0]), x),
    "mean": lambda h, x: (torch.tanh(h - x.mean(0)), x),
    "created": lambda h, x: (h * torch.linspace(0, len(x), len(x), dtype=x.dtype)[:, None], x),
}


@pytest.mark.parametrize("name", BY_BATCH)
def test_what_depends_on_the_batch_is_never_stale(name: str) -> None:
    for rows in (5, 1, 2048, 5, 1):
        torch.testing.assert_close(*_rows_of(BY_BATCH[name], rows))


def test_a_new_batch_size_costs_no_new_trace() -> None:
    """Another B runs the step once more on stand-ins, and makes no other program."""
    from fastrnn.program import trace

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        return torch.tanh(h.view(h.shape[0], 2, 3).flatten(1) + x), x * h.new_ones(len(h), 1)

    _rows_of(step, 4)
    records = trace.record
    trace.record = None  # type: ignore[assignment]
    try:
        for rows in (4, 9, 1, 100):
            torch.testing.assert_close(*_rows_of(step, rows))
    finally:
        trace.record = records


def test_weights_of_as_many_rows_as_the_stand_ins() -> None:
    """The sizes of stand-ins are sizes like any other."""
    from fastrnn.program import trace

    one, other = trace._ROWS[:2]
    weights = [_values(one, H), torch.zeros(one), _values(other, one), torch.zeros(other)]
    a, b, c, d = weights = [w.double().requires_grad_() for w in weights]

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        y = F.linear(F.linear(h + x, a, b), c, d)
        return torch.tanh(h + y[:, :H]), y

    steps.assert_both_ways(step, _values(B, H), _values(T, B, H, seed=1), weights)


def test_weights_used_as_rows_too() -> None:
    """A matrix of B rows that multiplies the state, and then its rows."""
    weight = _values(H, H).t().detach().requires_grad_()

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        return torch.tanh(F.linear(h, weight) + x * weight), h

    _as_the_loop(step, _values(H, H), _values(T, H, H, seed=1), [weight])


# ---- in place ------------------------------------------------------------------------------------


def _view_of_x(h: torch.Tensor, x: torch.Tensor) -> Any:
    x[:, :3].add_(1)
    return torch.tanh(h + x), x * 2


def _view_of_own(h: torch.Tensor, x: torch.Tensor) -> Any:
    a = h + x
    a[:, :3].mul_(2)
    return torch.tanh(a), a


def _detached(h: torch.Tensor, x: torch.Tensor) -> Any:
    a = h + x
    a.detach().mul_(2)
    return torch.tanh(a), a


def _without_gradient(h: torch.Tensor, x: torch.Tensor) -> Any:
    a = torch.tanh(h + x)
    with torch.no_grad():
        part = a[:, :3]
        part.mul_(2)
    return a * 1, a + 0.5


def _parts(h: torch.Tensor, x: torch.Tensor) -> Any:
    a = h + x
    r, z = a[:, :3], a[:, 3:]
    r.sigmoid_()
    z.tanh_()
    return torch.cat([r * z, z], -1), r + 1


@pytest.mark.parametrize("step", [_view_of_x, _view_of_own, _detached, _without_gradient])
def test_changes_in_place_are_seen(step: Any) -> None:
    init, xs = _values(B, H), _values(T, B, H, seed=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        ours = fastrnn.scan(step, init.clone(), xs.clone())
        with steps.by_loop():
            theirs = fastrnn.scan(step, init.clone(), xs.clone())
    torch.testing.assert_close(ours, theirs)


def test_changes_of_own_parts_in_place_run_on_the_engine() -> None:
    init, xs = _values(B, H), _values(T, B, H, seed=1)
    with torch.no_grad():
        with steps.by_engine():
            ours = fastrnn.scan(_parts, init, xs)
        with steps.by_loop():
            torch.testing.assert_close(ours, fastrnn.scan(_parts, init, xs))


# ---- what Python sees ----------------------------------------------------------------------------


def test_a_swallowed_error_is_seen() -> None:
    """A step that catches what a stand-in raises runs as the loop."""

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        try:
            up = bool((h > 0).any())
        except Exception:
            up = False
        return (torch.tanh(h + x) if up else torch.tanh(h - x)), x

    assert "aten.any" in _as_the_loop(step)[0]


def test_requires_grad_is_the_callers() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        return (torch.tanh(h + x) if h.detach().requires_grad else h - x), x

    assert "Tensor.requires_grad" in _as_the_loop(step)[0]


def _drawn_as_by_the_loop(step: Any, xs: torch.Tensor, seed: Any) -> None:
    """With one warning, and the loop's numbers after the same seed."""
    init = torch.zeros(B, H)
    seed(3)
    with pytest.warns(UserWarning, match="random numbers"):
        ours = fastrnn.scan(step, init, xs)[0]
    seed(3)
    with steps.by_loop():
        assert torch.equal(ours, fastrnn.scan(step, init, xs)[0])


def test_coins_are_thrown_at_every_step() -> None:
    """Python's random numbers are those of the loop, with one warning."""
    import random

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        return (h + 1 if random.random() < 0.5 else h), x * 2

    _drawn_as_by_the_loop(step, torch.zeros(40, B, H), random.seed)


def test_random_numbers_of_torch_are_said_once() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        return h + x * torch.rand(H), x

    with pytest.warns(UserWarning, match="random numbers"):
        fastrnn.scan(step, torch.zeros(B, H), torch.ones(T, B, H))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        ours = fastrnn.scan(step, torch.zeros(B, H), torch.ones(T, B, H))[0]
    torch.manual_seed(0)
    with steps.by_loop():
        assert torch.equal(ours, fastrnn.scan(step, torch.zeros(B, H), torch.ones(T, B, H))[0])


def test_random_numbers_equal_the_loops_whatever_ran_before() -> None:
    """A run on stand-ins draws none from the generators, also beside programs of like steps."""
    weight = torch.nn.Parameter(torch.randn(H, H))

    def plain(h: torch.Tensor, x: torch.Tensor) -> Any:
        return torch.tanh(h @ weight + x), x

    def dropped(h: torch.Tensor, x: torch.Tensor) -> Any:
        return torch.tanh(h @ F.dropout(weight, 0.5) + x), x

    init, xs = torch.zeros(B, H), torch.ones(T, B, H)
    fastrnn.scan(plain, init, xs)
    _drawn_as_by_the_loop(dropped, xs, torch.manual_seed)


def test_a_changed_step_raises_its_own_errors() -> None:
    """What a step raises comes out of it as it runs on the caller's tensors."""
    wrong = []

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        if wrong:
            raise ValueError(f"{len(h)} rows")
        return torch.tanh(h + x), x

    fastrnn.scan(step, _values(B, H), _values(T, B, H))
    wrong.append(1)
    with pytest.raises(ValueError, match="4 rows"):
        fastrnn.scan(step, _values(B, H), _values(T, B, H))
    wrong.clear()
    steps.assert_both_ways(step, _values(B, H), _values(T, B, H))


def test_an_argument_that_may_change_is_no_constant() -> None:
    import numpy as np

    factor = np.ones(H)

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        with torch.no_grad():
            return torch.tanh(torch.mul(h, factor) if False else h * torch.from_numpy(factor)), x

    for value in (1.0, 3.0):
        factor[:] = value
        torch.testing.assert_close(*_rows_of(step, B))


def test_a_device_by_name() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        return torch.tanh(h.to("cpu") + torch.zeros_like(x, device="cpu").cpu()), x

    steps.assert_both_ways(step, _values(B, H), _values(T, B, H, seed=1))


def test_inference_mode() -> None:
    """Composite operations come apart there as they do elsewhere."""
    heads, weight = _values(2, 3, 3), _values(2 * H, H)

    def step(h: torch.Tensor, x: torch.Tensor) -> Any:
        a, b = F.linear(x, weight).chunk(2, -1)
        y = torch.einsum("bhi,hio->bho", h.view(-1, 2, 3), heads).flatten(1) @ weight[:H]
        return F.layer_norm(torch.tanh(a * y + b), (H,)), a

    with torch.inference_mode():
        init, xs = _values(B, H), _values(T, B, H, seed=1)
        with steps.by_engine():
            ours = fastrnn.scan(step, init, xs)
        with steps.by_loop():
            torch.testing.assert_close(ours, fastrnn.scan(step, init, xs))
    steps.assert_both_ways(step, _values(B, H), _values(T, B, H, seed=1))


# ---- whole cells ---------------------------------------------------------------------------------


def _weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    made = [_values(*s, seed=50 + i) / s[-1] ** 0.5 for i, s in enumerate(shapes)]
    return [w.requires_grad_() for w in made]


def _gru(h: Any, x: torch.Tensor, *w: torch.Tensor) -> Any:
    """With a norm of the candidate."""
    (h,) = h
    r, z, n = F.linear(x, w[0], w[2]).chunk(3, -1)
    hr, hz, hn = F.linear(h, w[1]).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(F.layer_norm(n + torch.sigmoid(r + hr) * hn, w[3].shape, w[3], w[4]))
    h = (1 - z) * n + z * h
    return (h,), h


def _peephole(carry: Any, x: torch.Tensor, *w: torch.Tensor) -> Any:
    h, c = carry
    i, f, g, o = (F.linear(x, w[0], w[2]) + F.linear(h, w[1])).chunk(4, -1)
    c = torch.sigmoid(f + w[3] * c) * c + torch.sigmoid(i + w[4] * c) * torch.tanh(g)
    h = torch.sigmoid(o + w[3] * c) * torch.tanh(c)
    return (h, c), h


def _slstm(carry: Any, x: torch.Tensor, *w: torch.Tensor) -> Any:
    h, c, n, m = carry
    i, f, g, o = (F.linear(x, w[0], w[2]) + F.linear(h, w[1])).chunk(4, -1)
    f = F.logsigmoid(f)
    top = torch.maximum(f + m, i)
    i, f = torch.exp(i - top), torch.exp(f + m - top)
    c, n = f * c + i * torch.tanh(g), f * n + i
    h = torch.sigmoid(o) * c / n
    return (h, c, n, top), h


CELLS = {"gru": (_gru, 1, 3), "peephole": (_peephole, 2, 4), "slstm": (_slstm, 4, 4)}


def _cell(name: str, inputs: int, units: int) -> tuple[Any, int, list[torch.Tensor]]:
    step, states, gates = CELLS[name]
    shapes = [(gates * units, inputs), (gates * units, units), (gates * units,), (units,), (units,)]
    return step, states, _weights(*shapes[: 3 if name == "slstm" else 5])


@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_whole_cells(name: str) -> None:
    """First and second derivatives, by differences."""
    step, states, weights = _cell(name, 3, 2)
    init = [_values(2, 2, seed=i).abs().requires_grad_() for i in range(states)]
    xs = _values(3, 2, 3, seed=9).requires_grad_()

    def function(x: torch.Tensor, *rest: torch.Tensor) -> Any:
        given, w = rest[:states], rest[states:]
        with steps.by_engine():
            after, y = fastrnn.scan(lambda c, x: step(c, x, *w), given, x)
        return (y, *after)

    assert torch.autograd.gradcheck(function, (xs, *init, *weights))
    assert torch.autograd.gradgradcheck(function, (xs, *init, *weights))


@pytest.mark.parametrize("name", CELLS)
def test_bits_depend_on_no_batch_thread_or_cut(name: str) -> None:
    step, states, weights = _cell(name, 20, 48)
    weights = [w.detach().float().requires_grad_() for w in weights]
    init = tuple(_values(64, 48, seed=i).abs().float() for i in range(states))
    xs, weighted = _values(12, 64, 20, seed=9).float(), _values(12, 64, 48, seed=8).float()

    def run(rows: slice, times: slice = slice(None), start: Any = init) -> Any:
        given = tuple(s[rows].clone().requires_grad_() for s in start)
        x = xs[times, rows].clone().requires_grad_()
        with steps.by_engine():
            after, y = fastrnn.scan(lambda c, x: step(c, x, *weights), given, x)
        total = (y * weighted[times, rows]).sum()
        found = torch.autograd.grad(total, [x, *given, *weights])
        return y, after, found[0], found[1 : 1 + states], found[1 + states :]

    threads = torch.get_num_threads()
    try:
        whole = run(slice(None))
        for rows in (slice(3, 4), slice(3, 10), slice(0, 64)):
            torch.set_num_threads(1)
            y, after, dx, d_init, d_weights = run(rows)
            assert torch.equal(y, whole[0][:, rows])
            assert torch.equal(dx, whole[2][:, rows])
            for part, all_ in zip((*after, *d_init), (*whole[1], *whole[3]), strict=True):
                assert torch.equal(part, all_[rows])
            for count in (2, 3, 4):
                torch.set_num_threads(count)
                again = run(rows)
                assert torch.equal(again[0], y)
                assert all(map(torch.equal, again[4], d_weights))
        first = run(slice(None), slice(0, 5))
        second = run(slice(None), slice(5, None), [s.detach() for s in first[1]])
        assert torch.equal(torch.cat([first[0], second[0]]), whole[0])
    finally:
        torch.set_num_threads(threads)


def test_a_state_without_a_gradient_needs_none() -> None:
    """A counter beside a state that depends on weights."""
    weight = torch.randn(H, H).requires_grad_()

    def step(carry: Any, x: torch.Tensor) -> Any:
        h, n = carry
        return (torch.tanh(h @ weight + x), n + 1), h

    init = torch.zeros(B, H), torch.zeros(B, 1)
    with steps.by_engine():
        (h, n), _ = fastrnn.scan(step, init, torch.randn(T, B, H))
    assert h.requires_grad
    assert not n.requires_grad
