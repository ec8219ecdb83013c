"""Programs: each operation of torch that the engine knows, forward and backward, against torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import steps
from fastrnn.program import ir, run

T, B, H = 3, 4, 6


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ONE = {
    "neg": torch.neg,
    "reciprocal": lambda x: (x * x + 1).reciprocal(),
    "pow 2": lambda x: x.pow(2),
    "pow 3": lambda x: x**3,
    "pow 4": lambda x: x**4,
    "pow -1": lambda x: (x * x + 1) ** -1,
    "pow -2": lambda x: (x * x + 1) ** -2,
    "square": torch.square,
    "sqrt": lambda x: (x * x + 1).sqrt(),
    "pow 0.5": lambda x: (x * x + 1) ** 0.5,
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": lambda x: (x * x + 1).log(),
    "log1p": lambda x: (x * x).log1p(),
    "abs": torch.abs,
    "sign": lambda x: x * torch.sign(x),
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, beta=3.0, threshold=2.0),
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "hardswish": lambda x: F.hardswish(3 * x),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "relu6": lambda x: F.relu6(5 * x),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.3, -1.0),
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp_min": lambda x: x.clamp(min=0.1),
    "clamp_max": lambda x: x.clamp(max=0.1),
    "rsub": lambda x: 1 - x,
    "scalar arithmetic": lambda x: (2 * x + 1) / 3 - 0.5,
    "add alpha": lambda x: torch.add(x, x, alpha=3),
    "comparison": lambda x: x * (x > 0.2) + x * (x <= -0.2),
    "logical": lambda x: torch.where((x > 0) & ~(x > 1) | (x < -1), x, 2 * x),
    "xor": lambda x: torch.where((x > 0) ^ (x.abs() > 1), x, 2 * x),
    "where number": lambda x: torch.where(x > 0, x, 0.5),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.0),
    "to float": lambda x: x * (x > 0).to(x.dtype),
    "sum": lambda x: x * x.sum(-1, keepdim=True),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "var": lambda x: x / (1 + x.var(-1, keepdim=True)),
    "var biased": lambda x: x / (1 + x.var(-1, correction=0, keepdim=True)),
    "std": lambda x: x / (1 + x.std(-1, keepdim=True)),
    "var_mean": lambda x: torch.var_mean(x, -1, keepdim=True)[0] * x,
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "amin": lambda x: x - x.amin(-1, keepdim=True),
    "norm": lambda x: x / (1 + x.norm(dim=-1, keepdim=True)),
    "norm 1": lambda x: x / (1 + x.norm(p=1, dim=-1, keepdim=True)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: x - torch.logsumexp(x, -1, keepdim=True),
    "cumsum": lambda x: torch.cumsum(torch.softmax(x, -1), -1),
    "layer_norm": lambda x: F.layer_norm(x, (H,)),
    "rms_norm": lambda x: F.rms_norm(x, (H,), eps=1e-5),
    "group_norm": lambda x: F.group_norm(x, 2),
    "chunk": lambda x: torch.cat([c.tanh() for c in x.chunk(3, -1)], -1),
    "split": lambda x: torch.cat(x.split([2, 4], -1)[::-1], -1),
    "slice": lambda x: torch.cat([x[:, 2:], x[:, :2]], -1),
    "strided slice": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], -1),
    "select": lambda x: x * x[:, 1:2] + x[:, 0, None],
    "unbind": lambda x: torch.stack(x.unbind(-1)[::-1], -1),
    "view": lambda x: (x.view(-1, 2, 3) * 2).flatten(1),
    "view of rows": lambda x: x.view(x.shape[0], 3, 2).transpose(1, 2).reshape(x.shape[0], -1),
    "rows folded": lambda x: x.reshape(-1, 2).tanh().reshape(x.shape),
    "transpose": lambda x: x.t().tanh().t(),
    "permute": lambda x: x.view(-1, 2, 3).permute(2, 0, 1).tanh().permute(1, 2, 0).flatten(1),
    "expand": lambda x: x + x[:, :1].expand(-1, H),
    "repeat": lambda x: x[:, :3].repeat(1, 2),
    "unsqueeze": lambda x: x.unsqueeze(1).tanh().squeeze(1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "broadcast heads": lambda x: (x.view(-1, 2, 3) * x.view(-1, 2, 3)[:, :, :1]).flatten(1),
    "sum of heads": lambda x: x * x.view(-1, 2, 3).sum(1).repeat(1, 2),
    "detach": lambda x: x * x.detach(),
    "zeros_like": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "new_full": lambda x: x * x.new_full((x.shape[0], 1), 2.0),
    "ones of the batch": lambda x: x + torch.ones(x.shape[0], H, dtype=x.dtype),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "clone": lambda x: x.clone() * x.contiguous(),
    "outer of rows": lambda x: torch.einsum("bi,bj->bij", x, x).sum(-1),
    "product of rows": lambda x: torch.bmm(x.view(-1, 2, 3), x.view(-1, 3, 2)).sum(-1).repeat(1, 3),
}


@pytest.mark.parametrize("name", ONE)
def test_operation(name: str) -> None:
    """An operation on the state and x gives torch's values and gradients."""
    function = ONE[name]

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = function(0.5 * h + x)
        return torch.tanh(y), y

    steps.assert_both_ways(step, _values(B, H), _values(T, B, H, seed=1))


TWO = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a / (b * b + 1),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a * b, b),
    "clamp by tensors": lambda a, b: a.clamp(b - 1, b + 1),
    "lerp": lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b * b + 1),
    "eq": lambda a, b: a * (a == b) + b * (a != b),
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("shape", [(B, H), (H,), (B, 1), (1, H), (1,)])
def test_operation_of_two(name: str, shape: tuple[int, ...]) -> None:
    """The other operand is a tensor of each row, or one that the step closes over."""
    function, weight = TWO[name], _values(*shape, seed=2).requires_grad_()

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = function(0.5 * h + x, weight) + function(weight, x)
        return torch.tanh(y), y

    steps.assert_both_ways(step, _values(B, H), _values(T, B, H, seed=1), [weight])


def test_maximum_of_equals_halves_the_gradient() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.maximum(h, x), torch.minimum(h, x) + h.amax(-1, keepdim=True)

    steps.assert_both_ways(step, torch.ones(B, H).double(), torch.ones(T, B, H).double())


@pytest.mark.parametrize("name", ["clamp", "hardtanh", "hardsigmoid", "relu", "leaky_relu", "abs"])
def test_gradient_at_a_kink_is_torchs(name: str) -> None:
    function = {**ONE, "hardsigmoid": F.hardsigmoid}[name]
    kinks = torch.tensor([-3.0, -0.5, 0.0, 0.7, 0.8, 3.0]).double()

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return h + function(x), function(x)

    steps.assert_both_ways(step, torch.zeros(B, H).double(), kinks.expand(T, B, H))


W = {
    "linear": lambda x, w: F.linear(x, w(5, H), w(5)),
    "linear without bias": lambda x, w: F.linear(x, w(5, H)),
    "matmul": lambda x, w: x @ w(H, 5),
    "matmul transposed": lambda x, w: x @ w(5, H).t(),
    "addmm": lambda x, w: torch.addmm(w(5), x, w(H, 5), beta=0.5, alpha=2),
    "of a slice": lambda x, w: F.linear(x[:, :4], w(5, H)[:, 2:]),
    "by a chunk": lambda x, w: x @ w(H, 10).chunk(2, 1)[1],
    "of heads": lambda x, w: F.linear(x.view(-1, 2, 3), w(4, 3)).flatten(1),
    "block-diagonal bmm": lambda x, w: (
        torch.bmm(x.view(-1, 2, 3).transpose(0, 1), w(2, 3, 4)).transpose(0, 1).flatten(1)
    ),
    "block-diagonal einsum": lambda x, w: torch.einsum(
        "bhi,hio->bho", x.view(-1, 2, 3), w(2, 3, 4)
    ).flatten(1),
    "einsum transposed": lambda x, w: torch.einsum(
        "bhi,hoi->bho", x.view(-1, 2, 3), w(2, 4, 3)
    ).flatten(1),
    "einsum over heads": lambda x, w: torch.einsum("bhi,hio->bo", x.view(-1, 2, 3), w(2, 3, 4)),
    "einsum one x": lambda x, w: torch.einsum("bi,hio->bho", x, w(2, H, 3)).flatten(1),
    "joined with x": lambda x, w: F.linear(torch.cat([x, x * x], -1), w(5, 2 * H), w(5)),
    "bilinear": lambda x, w: torch.einsum("bi,ij,bj->b", x, w(H, H), x)[:, None],
    "skew": lambda x, w: x @ (w(H, H) - w(H, H).t()),
    "scaled weight": lambda x, w: x @ (w(H, H) * F.softplus(w(1))),
    "norms": lambda x, w: F.rms_norm(F.layer_norm(x, (H,), w(H), w(H)), (H,), w(H), 1e-6),
    "group norm": lambda x, w: F.group_norm(x, 3, w(H), w(H)),
    "bias of heads": lambda x, w: (x.view(-1, 2, 3) + w(3)).flatten(1),
    "gain of heads": lambda x, w: (x.view(-1, 2, 3) * w(2, 1)).flatten(1),
    "number": lambda x, w: x * w(),
}


@pytest.mark.parametrize("name", W)
@pytest.mark.parametrize("of_state", [True, False])
def test_product(name: str, of_state: bool) -> None:
    """Products and norms with weights give torch's values, and gradients of the weights too."""
    weights: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        used: dict[tuple[int, ...], int] = {}

        def weight(*shape: int) -> torch.Tensor:
            at = used[shape] = used.get(shape, -1) + 1
            known = weights.setdefault(shape, [])
            if at == len(known):
                known.append(_values(*shape, seed=10 + len(known)).requires_grad_())
            return known[at]

        y = W[name](h + x if of_state else x, weight)
        return torch.tanh(h + y.sum(-1, keepdim=True)), y

    step(_values(B, H), _values(B, H))
    made = [w for group in weights.values() for w in group]
    steps.assert_both_ways(step, _values(B, H), _values(T, B, H, seed=1), made)


def test_without_rows() -> None:
    """A step on vectors, without an axis of rows."""
    a, b, bias = _values(H, H).requires_grad_(), _values(H, H, seed=3).requires_grad_(), _values(H)

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(a @ h + F.linear(x, b, bias) + torch.dot(h, x))
        return h, h.sum()

    steps.assert_both_ways(step, _values(H), _values(T, H, seed=1), [a, b])


def test_text_reads_back() -> None:
    """The text of a program is the program."""
    weight = _values(2, 3, 4)

    def step(h: list, x: list) -> tuple[list, list]:
        y = torch.einsum("bhi,hio->bho", (h[0] + x[0]).view(-1, 2, 3), weight).flatten(1)
        return [torch.cumsum(h[0].flip(-1), -1)], [y, h[0].amax(-1, keepdim=True)]

    sizes = next(run.sizes_of([_values(B, H)], [_values(T, B, H)]))
    graph = run.recorded(step, sizes)[0].graph
    assert graph is not None
    assert ir.parse(graph.text()).text() == graph.text()
    assert ir.parse(graph.text()).nodes == graph.nodes


# ---- random programs -----------------------------------------------------------------------------

_UNARY = [torch.tanh, torch.sigmoid, torch.sin, F.softplus, F.silu, torch.neg, torch.relu, F.gelu]
_BINARY = [torch.add, torch.sub, torch.mul, torch.maximum, lambda a, b: a / (1 + b * b)]


@st.composite
def programs(draw: st.DrawFn) -> tuple:
    """Widths of carries and xs, operations by number, and which values are what."""
    widths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    xs = draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))
    count = draw(st.integers(5, 40))
    choices = draw(st.lists(st.tuples(*[st.integers(0, 1000)] * 4), min_size=count, max_size=count))
    return widths, xs, choices, draw(st.booleans()), draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(programs())
def test_random_program(program: tuple) -> None:
    """A random graph of operations gives what the loop gives."""
    widths, x_widths, choices, reverse, rows = program
    weights: list[torch.Tensor] = []

    def step(carry: tuple, xs: tuple) -> tuple:
        values = [*carry, *xs]
        used = 0

        def weight(*shape: int) -> torch.Tensor:
            nonlocal used
            used += 1
            if used > len(weights):
                weights.append((_values(*shape, seed=used) / math.sqrt(shape[-1])).requires_grad_())
            return weights[used - 1]

        for kind, i, j, k in choices:
            a, b = values[i % len(values)], values[j % len(values)]
            match kind % 9:
                case 0 | 1:
                    values.append(_UNARY[k % len(_UNARY)](a))
                case 2 | 3:
                    if b.shape[1] not in (1, a.shape[1]):
                        b = F.linear(b, weight(a.shape[1], b.shape[1]))
                    values.append(_BINARY[k % len(_BINARY)](a, b))
                case 4:
                    n = 1 + k % 8
                    values.append(F.linear(a, weight(n, a.shape[1]), weight(n)))
                case 5:
                    values.append(torch.cat([a, b], -1)[:, :12])
                case 6:
                    at = k % a.shape[1]
                    values += [a[:, at:], a[:, : at + 1]]
                case 7:
                    values.append(a.sum(-1, keepdim=True).tanh())
                case 8:
                    values.append(torch.softmax(a, -1))
        after = []
        for n, w in enumerate(widths):
            source = values[-1 - n % len(values)]
            after.append(torch.tanh(F.linear(source, weight(w, source.shape[1])) + 0.5 * carry[n]))
        return tuple(after), (values[-1], values[len(values) // 2])

    init = tuple(_values(rows, w, seed=20 + n) for n, w in enumerate(widths))
    xs = tuple(_values(T, rows, w, seed=30 + n) for n, w in enumerate(x_widths))
    step(init, tuple(x[0] for x in xs))  # makes the weights
    steps.assert_both_ways(step, init, xs, weights, reverse=reverse, rtol=1e-7, atol=1e-9)


# ---- values that are no numbers ------------------------------------------------------------------

_ENDS = torch.tensor(
    [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -3.0, 1000.0, -1000.0]
).double()


@pytest.mark.parametrize("name", ONE)
def test_ends_are_torchs(name: str) -> None:
    """NaN, the infinities and both zeros give torch's values and gradients."""

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.5 * h, ONE[name](x)

    _assert_ends(step, _ENDS[:, None].expand(-1, H))


_ROWS_OF_ENDS = torch.tensor(
    [[math.nan, 1, 2], [math.inf, 1, 2], [-math.inf, 1, 2], [-math.inf] * 3, [math.inf] * 3,
     [0, 0, 0], [1, 1, 1], [-math.inf, math.inf, 0], [1000, -1000, 3]]
).double()  # fmt: skip
REDUCING = ["sum", "mean", "var", "std", "amax", "amin", "norm", "norm 1", "normalize", "softmax"]
REDUCING += ["log_softmax", "logsumexp", "cumsum"]


@pytest.mark.parametrize("name", REDUCING)
def test_rows_of_ends_are_torchs(name: str) -> None:
    """As a mask of -inf in all of a row, or rows without variance."""

    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.5 * h, ONE[name](x)

    _assert_ends(step, _ROWS_OF_ENDS)


@pytest.mark.parametrize("name", ["add", "mul", "maximum", "minimum", "where", "addcdiv"])
def test_pairs_of_ends_are_torchs(name: str) -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.5 * h, TWO[name](x[:, :1], x[:, 1:])

    _assert_ends(step, torch.cartesian_prod(_ENDS, _ENDS))


def _assert_ends(step: Any, values: torch.Tensor) -> None:
    init = torch.zeros(values.shape, dtype=values.dtype)
    ours, theirs = steps.both_ways(step, init, values[None])
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("pads", [(1, 2), (0, 3), (2, 0), (1, 0, 2, 1)])
def test_pad(pads: tuple[int, ...]) -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(h + x), F.pad((h * x).view(-1, 2, 3), pads, value=0.5)

    steps.assert_both_ways(step, _values(B, H), _values(T, B, H, seed=1))
