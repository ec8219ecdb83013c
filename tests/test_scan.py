"""`fastrnn.scan`: any step over a sequence equals the loop that a reader would write."""

from __future__ import annotations

from collections import namedtuple
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from fastrnn.any_cell.explain import explain
from fastrnn.any_cell.scan import scan
from pairs import backward
from steps import loop, mapped

if TYPE_CHECKING:
    from collections.abc import Callable

T, B, SIZE, H = 6, 4, 3, 5
F64 = torch.float64
Step = Any  # (carry, x) -> (carry, y)


class Weights:
    """What the steps close over."""

    def __init__(self) -> None:
        self.w = torch.randn(H, H, dtype=F64, requires_grad=True)
        self.u = torch.randn(H, SIZE, dtype=F64, requires_grad=True)
        self.b = torch.randn(H, dtype=F64, requires_grad=True)

    def __iter__(self) -> Any:
        return iter((self.w, self.u, self.b))


def plain(weights: Weights) -> Step:
    """An Elman step; carry (B, H), x (B, I), y the carry."""

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ weights.u.t() + h @ weights.w.t() + weights.b)
        return h, h

    return step


def nested(weights: Weights) -> Step:
    """A step of everything: nested carry, two xs of their own widths, ys that are no state."""

    def step(carry: Any, x: Any) -> Any:
        (h, memory), n = carry["state"], carry["count"]
        gate = torch.sigmoid(x["b"][0])
        after = torch.tanh(x["a"] @ weights.u.t() + h @ weights.w.t() + weights.b)
        memory = gate * memory + (1 - gate) * after.sum(-1, keepdim=True)
        carry = {"state": (after, memory), "count": n + 1, "none": None}
        return carry, [after.mean(-1), {"late": n > 2, "none": None, "wide": after * gate}]

    return step


def nested_arguments(T: int = T, B: int = B) -> tuple[Any, Any]:
    init = {
        "state": (leaf(B, H), leaf(B, 1)),
        "count": torch.zeros(B, dtype=F64),
        "none": None,
    }
    return init, {"a": leaf(T, B, SIZE), "b": (leaf(T, B, 1), None)}


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, requires_grad=True)


def row_by_row(
    step: Step, init: Any, xs: Any, lengths: list[int], reset: Tensor | None, reverse: bool
) -> tuple[Any, Any]:
    """Each sequence by itself, as long as it is, and each of its episodes from `init`."""
    carries, ys = [], []
    for b, length in enumerate(lengths):
        start = mapped(lambda leaf: leaf[b : b + 1], init)  # noqa: B023
        row = mapped(lambda x: x[:, b : b + 1], xs)  # noqa: B023
        resets = [] if reset is None else [t for t in range(1, length) if reset[t, b]]
        parts = [
            loop(step, start, mapped(lambda x: x[first:last], row), reverse)  # noqa: B023
            for first, last in pairwise([0, *resets, length])
            if first < last
        ]
        carries.append(parts[0 if reverse else -1][0] if parts else start)
        padding = mapped(lambda y: torch.zeros_like(y[length:]), loop(step, start, row)[1])  # noqa: B023
        ys.append(mapped(lambda *y: torch.cat(y), *(y for _, y in parts), padding))
    return (
        mapped(lambda *leaves: torch.cat(leaves), *carries),
        mapped(lambda *leaves: torch.cat(leaves, 1), *ys),
    )


def leaves(*values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if leaf is not None]


def assert_same(actual: Any, expected: Any, inputs: list[Tensor]) -> None:
    """Structure, values and the gradients of the inputs agree."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    found = []
    for outputs in (leaves(actual), leaves(expected)):
        backward([o for o in outputs if o.requires_grad])
        found.append([*(o.detach() for o in outputs), *(i.grad for i in inputs)])
        for input in inputs:
            input.grad = None
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def differentiable(*values: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(*values) if leaf.requires_grad]


@pytest.fixture
def weights() -> Weights:
    return Weights()


# ---- the loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, T])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_nested_step_equals_the_loop_with_all_gradients(
    weights: Weights, reverse: bool, steps: int
) -> None:
    init, xs = nested_arguments(steps)
    inputs = [*differentiable(init, xs), *weights]
    step = nested(weights)
    assert_same(scan(step, init, xs, reverse=reverse), loop(step, init, xs, reverse), inputs)


def test_what_nothing_asks_a_gradient_of_has_none(weights: Weights) -> None:
    step = plain(weights)
    for tensor in weights:
        tensor.requires_grad_(False)
    carry, ys = scan(step, torch.zeros(B, H, dtype=F64), torch.randn(T, B, SIZE, dtype=F64))
    assert not carry.requires_grad
    assert not ys.requires_grad
    xs = leaf(T, B, SIZE)
    ys = scan(step, torch.zeros(B, H, dtype=F64), xs)[1]
    ys.sum().backward()
    assert xs.grad is not None
    assert weights.w.grad is None


@pytest.mark.parametrize("options", [{}, {"lengths": [], "reset": torch.zeros(T, 0).bool()}])
def test_no_rows(weights: Weights, options: dict[str, Any]) -> None:
    init, xs = nested_arguments(B=0)
    assert_same(
        scan(nested(weights), init, xs, **options),
        loop(nested(weights), init, xs),
        [*differentiable(init, xs), *weights],
    )


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"lengths": [0] * B}])
def test_no_steps_return_init_and_empty_ys(weights: Weights, options: dict[str, Any]) -> None:
    init, xs = nested_arguments(T=0)
    carry, ys = scan(nested(weights), init, xs, **options)
    assert pytree.tree_structure(carry) == pytree.tree_structure(init)
    assert all(torch.equal(a, b) for a, b in zip(leaves(carry), leaves(init), strict=True))
    expected = loop(nested(weights), init, nested_arguments(T=1)[1])[1]
    assert pytree.tree_structure(ys) == pytree.tree_structure(expected)
    for y, like in zip(leaves(ys), leaves(expected), strict=True):
        assert y.shape == (0, *like.shape[1:])
        assert y.dtype == like.dtype


def test_no_steps_give_init_its_gradient(weights: Weights) -> None:
    init = leaf(B, H)
    carry, _ = scan(plain(weights), init, torch.zeros(0, B, SIZE, dtype=F64))
    carry.sum().backward()
    assert torch.equal(init.grad, torch.ones(B, H, dtype=F64))


def test_a_step_without_rows_and_a_y_that_is_none() -> None:
    def step(total: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return total * 0.5 + x.sum(), None

    xs = leaf(T, 2, 3, 4)
    init = leaf()
    assert_same(scan(step, init, xs), loop(step, init, xs), [init, xs])


def test_a_static_input_is_closed_over(weights: Weights) -> None:
    static = leaf(B, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ weights.u.t() + static * h)
        return h, h

    init, xs = leaf(B, H), leaf(T, B, SIZE)
    inputs = [init, xs, static, weights.u]
    assert_same(scan(step, init, xs), loop(step, init, xs), inputs)


def test_named_tuples_stay_and_dicts_may_come_in_another_order() -> None:
    State = namedtuple("State", "h parts")
    init = State(leaf(B, H), {"a": leaf(B), "b": [leaf(B)]})

    def step(state: Any, x: Tensor) -> Any:
        parts = {"b": [state.parts["a"]], "a": state.parts["b"][0] + x}
        return State(state.h * 0.9, parts), State(x, parts)

    carry, ys = scan(step, init, leaf(T, B))
    assert type(carry) is State
    assert list(carry.parts) == ["a", "b"]
    assert type(ys) is State
    assert ys.parts["a"].shape == (T, B)


def test_a_pair_may_be_a_list(weights: Weights) -> None:
    init, xs = leaf(B, H), leaf(T, B, SIZE)
    step = plain(weights)
    carry, ys = scan(lambda c, x: list(step(c, x)), init, xs)
    torch.testing.assert_close((carry, ys), scan(step, init, xs), rtol=0, atol=0)


def test_every_call_uses_the_current_weights(weights: Weights) -> None:
    init, xs, scale = leaf(B, H), leaf(T, B, SIZE), [1.0]
    elman = plain(weights)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, y = elman(h * scale[0], x)
        return h, y

    def check() -> None:
        torch.testing.assert_close(scan(step, init, xs), loop(step, init, xs))

    check()
    with torch.no_grad():
        weights.w.mul_(2)
    check()
    weights.u.data = weights.u.data * 3
    check()
    weights.b = torch.ones(H, dtype=F64)
    check()
    scale[0] = 0.5
    check()


def test_strides_of_the_arguments_do_not_matter(weights: Weights) -> None:
    init, xs = leaf(H, B).t(), leaf(SIZE, B, T).permute(2, 1, 0)
    expected = scan(plain(weights), init.contiguous(), xs.contiguous())
    torch.testing.assert_close(scan(plain(weights), init, xs), expected, rtol=1e-13, atol=1e-13)


def test_the_arguments_stay_as_they_are(weights: Weights) -> None:
    init, xs = nested_arguments()
    before = [tensor.clone() for tensor in leaves(init, xs)]
    scan(nested(weights), init, xs, lengths=[T, 0, 2, 3], reset=torch.rand(T, B) < 0.4)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(init, xs), strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_numbers_without_gradients_are_the_same(weights: Weights, mode: Any) -> None:
    init, xs = nested_arguments()
    expected = scan(nested(weights), init, xs)
    with mode():
        found = scan(nested(weights), init, xs)
    assert not any(tensor.requires_grad for tensor in leaves(found))
    torch.testing.assert_close(leaves(found), leaves(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_other_dtypes(dtype: torch.dtype) -> None:
    w, init, xs = torch.randn(H, H).to(dtype), torch.randn(B, H).to(dtype), torch.randn(T, B, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ w + x)
        return h, h

    found, expected = (how(step, init, xs.to(dtype)) for how in (scan, loop))
    torch.testing.assert_close(found, expected)
    assert found[0].dtype == dtype


# ---- derivatives ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reverse": True, "lengths": [3, 0]}])
def test_first_and_second_derivatives(options: dict[str, Any]) -> None:
    weights = Weights()

    def run(init: Tensor, xs: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        reset = torch.tensor([[False, True], [True, True], [False, False]])
        return scan(plain(weights), init, xs, reset=reset, **options)

    inputs = (leaf(2, H), leaf(3, 2, SIZE), *weights)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp uses it
def test_forward_mode(weights: Weights) -> None:
    init, xs = leaf(B, H).detach(), leaf(T, B, SIZE).detach()
    tangents = torch.randn_like(init), torch.randn_like(xs)
    step = plain(weights)
    found = torch.func.jvp(lambda *a: scan(step, *a), (init, xs), tangents)
    expected = torch.func.jvp(lambda *a: loop(step, *a), (init, xs), tangents)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_vmap_over_inputs(weights: Weights) -> None:
    init, xs = torch.randn(3, B, H, dtype=F64), torch.randn(T, 3, B, SIZE, dtype=F64)
    step = plain(weights)
    found = torch.func.vmap(lambda c, x: scan(step, c, x), (0, 1))(init, xs)
    for n in range(3):
        expected = scan(step, init[n], xs[:, n])
        torch.testing.assert_close((found[0][n], found[1][n]), expected, rtol=1e-12, atol=1e-12)


def test_repeated_backward(weights: Weights) -> None:
    init, xs = leaf(B, H), leaf(T, B, SIZE)
    _, ys = scan(plain(weights), init, xs)
    first = torch.autograd.grad(ys.sum(), (init, xs, *weights), retain_graph=True)
    second = torch.autograd.grad(ys.sum(), (init, xs, *weights))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- lengths and resets -----------------------------------------------------------------------


@given(data=st.data(), reverse=st.booleans(), T=st.integers(1, 5), B=st.integers(1, 4))
def test_lengths_and_resets_equal_each_episode_run_alone(
    data: st.DataObject, reverse: bool, T: int, B: int
) -> None:
    weights = Weights()
    init, xs = nested_arguments(T, B)
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    flags = st.lists(st.booleans(), min_size=B, max_size=B)
    reset = torch.tensor(data.draw(st.lists(flags, min_size=T, max_size=T)))
    step, inputs = nested(weights), [*differentiable(init, xs), *weights]
    for given_lengths, given_reset in ((lengths, None), (None, reset), (lengths, reset)):
        options = {"reverse": reverse, "lengths": given_lengths, "reset": given_reset}
        expected = row_by_row(step, init, xs, given_lengths or [T] * B, given_reset, reverse)
        found = []
        for outputs in (leaves(scan(step, init, xs, **options)), leaves(expected)):
            backward(differentiable(outputs))
            gradients = [torch.zeros_like(i) if i.grad is None else i.grad for i in inputs]
            found.append([*(o.detach() for o in outputs), *gradients])
            for input in inputs:
                input.grad = None
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_gets_no_gradient_and_may_hold_anything(weights: Weights, reverse: bool) -> None:
    xs = torch.randn(T, B, SIZE, dtype=F64)
    xs[3:, 1] = float("nan")
    xs[:, 2] = float("inf")
    xs.requires_grad_()
    init = leaf(B, H)
    carry, ys = scan(plain(weights), init, xs, lengths=[T, 3, 0, T], reverse=reverse)
    assert torch.equal(carry[2], init[2])
    assert not ys[3:, 1].any()
    (carry.square().sum() + ys.square().sum()).backward()
    assert torch.equal(xs.grad[3:, 1], torch.zeros(T - 3, SIZE, dtype=F64))
    assert torch.equal(xs.grad[:, 2], torch.zeros(T, SIZE, dtype=F64))
    assert xs.grad[:3, 1].abs().min() > 0
    assert all(tensor.grad.isfinite().all() for tensor in (init, *weights))


@pytest.mark.parametrize("reverse", [False, True])
def test_reset_cuts_the_gradient(weights: Weights, reverse: bool) -> None:
    init, xs = leaf(B, H), leaf(T, B, SIZE)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    _, ys = scan(plain(weights), init, xs, reset=reset, reverse=reverse)
    for mine, others in ((slice(0, 3), slice(3, T)), (slice(3, T), slice(0, 3))):
        gradients = torch.autograd.grad(ys[mine].sum(), (xs, init), retain_graph=True)
        assert gradients[0][mine].abs().min() > 0
        assert not gradients[0][others].any()
        assert gradients[1].abs().min() > 0  # each episode starts from init


def test_an_episode_that_became_nan_does_not_reach_the_next(weights: Weights) -> None:
    xs = torch.randn(T, B, SIZE, dtype=F64)
    xs[2] = float("nan")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    init = leaf(B, H)
    carry, ys = scan(plain(weights), init, xs, reset=reset)
    assert ys[2].isnan().all()
    expected = scan(plain(weights), init, xs[3:])
    torch.testing.assert_close((carry, ys[3:]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_lengths_of_any_integer_dtype_and_lists(weights: Weights, dtype: torch.dtype) -> None:
    init, xs = leaf(B, H), leaf(T, B, SIZE)
    expected = scan(plain(weights), init, xs, lengths=[4, 0, 6, 1])
    found = scan(plain(weights), init, xs, lengths=torch.tensor([4, 0, 6, 1], dtype=dtype))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- refusals ---------------------------------------------------------------------------------


def keep(change: Callable[[Any], Any]) -> Step:
    """A step with a carry {'h': (tensor,)} that is changed once it has started."""
    return lambda carry, x: (change(carry), x)


h = torch.zeros(B, H)
WRONG_CARRIES: list[tuple[Any, type[Exception], str]] = [
    (
        lambda c: {"h": (c["h"][0][:, 1:],)},
        ValueError,
        r"step: carry\['h'\]\[0\] was \(4, 5\) float32 before and is \(4, 4\) .* keep the shape",
    ),
    (
        lambda c: {"h": (c["h"][0].double(),)},
        ValueError,
        r"was \(4, 5\) float32 before and is \(4, 5\) float64 after .*: \.to\(torch\.float32\)",
    ),
    (
        lambda c: {"h": (c["h"][0].to("meta"),)},
        ValueError,
        r"carry\['h'\]\[0\] was .* and is \(4, 5\) float32 on meta after .* keep the device",
    ),
    (
        lambda c: {"h": c["h"][0]},
        TypeError,
        r"step: carry was \{'h': \(Tensor,\)\} before and is \{'h': Tensor\} after the step",
    ),
    (
        lambda c: {"h": [c["h"][0]]},
        TypeError,
        r"is \{'h': \[Tensor\]\} after the step; nest it alike at every step",
    ),
    (lambda c: {"g": c["h"]}, TypeError, r"is \{'g': \(Tensor,\)\} after the step"),
    (
        lambda c: {"h": (None,)},
        TypeError,
        r"step: carry\['h'\]\[0\] was Tensor before and is None after the step; return Tensor",
    ),
    (
        lambda c: {"h": (1.0,)},
        TypeError,
        r"step: carry\['h'\]\[0\] was Tensor before and is float after the step",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_CARRIES)
def test_a_carry_that_changes_is_refused_by_the_name_of_its_leaf(
    change: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scan(keep(change), {"h": (torch.zeros(B, H),)}, torch.zeros(T, B))


def test_init_is_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"carry was \(\) float32 before and is \(4, 5\) float32"):
        scan(lambda c, x: (c + x, None), torch.zeros(()), torch.zeros(T, B, H))


def test_a_none_in_the_carry_stays_none() -> None:
    with pytest.raises(TypeError, match=r"carry\[1\] was None before and is Tensor after the step"):
        scan(lambda c, x: ((c[0], x), None), (torch.zeros(B), None), torch.zeros(T, B))


def test_y_must_have_the_same_structure_at_every_step() -> None:
    def step(n: Tensor, x: Tensor) -> Any:
        return n + 1, {"y": x[: int(n) + 1]}

    message = r"step: y\['y'\] was \(1,\) float32 before and is \(2,\) float32 after the step"
    with pytest.raises(ValueError, match=message):
        scan(step, torch.zeros(()), torch.zeros(T, B))


@pytest.mark.parametrize("result", [None, torch.zeros(2), (torch.zeros(2),), {"carry": 1, "y": 2}])
def test_a_step_that_returns_no_pair_is_refused(result: Any) -> None:
    with pytest.raises(TypeError, match=r"step must return a pair \(carry, y\), got "):
        scan(lambda c, x: result, torch.zeros(2), torch.zeros(T, B))


def test_an_error_of_the_step_is_the_callers() -> None:
    def step(c: Tensor, x: Tensor) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        scan(step, torch.zeros(2), torch.zeros(T, B))


def test_arguments_that_do_not_fit_are_refused() -> None:
    def step(c: Any, x: Any) -> Any:
        return c, x

    zeros = torch.zeros
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        (("step", h, h), {}, TypeError, r"step must be callable as step\(carry, x\), got str"),
        ((step, {"n": 0}, h), {}, TypeError, r"init\['n'\] must be a Tensor, got int; give"),
        ((step, h, [h, 1.0]), {}, TypeError, r"xs\[1\] must be a Tensor, got float"),
        ((step, h, h.to_sparse()), {}, TypeError, "xs must be a dense Tensor"),
        ((step, h, {}), {}, ValueError, "xs hold no tensor, so that T is unknown; give at least"),
        ((step, h, None), {}, ValueError, "xs hold no tensor"),
        ((step, h, zeros(())), {}, ValueError, "xs must have T steps as its first axis, got a 0-D"),
        (
            (step, h, (zeros(3), {"a": zeros(4, 2)})),
            {},
            ValueError,
            r"xs must agree in T, their first axis: xs\[0\] has 3 steps and xs\[1\]\['a'\] has 4",
        ),
        ((step, h, h), {"reverse": 1}, TypeError, "reverse must be a bool, got int"),
        (
            (lambda c, x: (c, {"loss": 1.0}), h, h),
            {},
            TypeError,
            r"step: y\['loss'\] must be a Tensor, got float; return a tensor",
        ),
    ]
    for arguments, options, error, message in wrong:
        with pytest.raises(error, match=message):
            scan(*arguments, **options)


def test_lengths_and_reset_that_do_not_fit_are_refused() -> None:
    def step(c: Any, x: Any) -> Any:
        return c, x

    xs, reset = torch.zeros(T, B, SIZE), torch.zeros(T, B, dtype=torch.bool)
    wrong: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (h, xs, {"lengths": [1, 2]}, ValueError, r"lengths must have shape \(4,\)"),
        (
            h,
            xs,
            {"lengths": [1, 2, 3, 7]},
            ValueError,
            "lengths must lie between 0 and the 6 steps of xs",
        ),
        (h, xs, {"lengths": [1.0] * B}, TypeError, "lengths must be integers, got torch.float32"),
        (h, xs, {"reset": reset.int()}, TypeError, "reset must be a bool tensor, got torch.int32"),
        (h, xs, {"reset": reset.t()}, ValueError, r"reset must have shape \(T, B\), here \(6, 4\)"),
        (
            h,
            (xs, torch.zeros(T)),
            {"lengths": [T] * B},
            ValueError,
            r"xs\[1\] must have shape \(T, B, …\) beside lengths, got \(6,\)",
        ),
        (
            h,
            (xs, torch.zeros(T, 3)),
            {"reset": reset},
            ValueError,
            r"xs\[1\] must have shape \(T, B, …\) beside reset, with B = 4 as in xs\[0\]",
        ),
        (
            {"h": h, "n": torch.zeros(())},
            xs,
            {"lengths": [T] * B},
            ValueError,
            r"init\['n'\] must have shape \(B, …\) beside lengths, with B = 4 as in xs, got \(\)",
        ),
    ]
    for init, given_xs, options, error, message in wrong:
        with pytest.raises(error, match=message):
            scan(step, init, given_xs, **options)
    with pytest.raises(ValueError, match=r"step: y must have shape \(B, …\) beside lengths or"):
        scan(lambda c, x: (c, x.sum()), h, xs, lengths=[T] * B)


@pytest.mark.parametrize(
    ("step", "init", "xs", "kind", "message"),
    [
        (3, None, torch.zeros(5, 2, 3), TypeError, "step"),
        (lambda h, x: (h, x), None, None, ValueError, "xs"),
        (torch.nn.GRUCell(3, 4), None, "x", TypeError, "xs"),
        (torch.nn.GRUCell(3, 4), None, torch.zeros(5), ValueError, r"xs must be \(T, B, …\)"),
    ],
)
def test_explain_refuses_by_name(
    step: Any, init: Any, xs: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        explain(step, init, xs)
