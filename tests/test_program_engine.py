"""The executor of programs (csrc/program.h) does to every row what NumPy does, step by step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from fastrnn import _C

# ---- what a program means, in NumPy --------------------------------------------------------------

_ERF = np.vectorize(math.erf)


def _to_bfloat16(a: Any) -> Any:
    """Of a float32, by its bits: to nearest, ties to even."""
    bits = a.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    quiet = np.where(np.isnan(a), 0x7FC00000, rounded).astype(np.uint32)
    return quiet.view(np.float32).astype(np.float64)


POINTS: dict[str, Any] = {
    "copy": lambda a: a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "sign": lambda a: np.where(np.isnan(a), 0, np.sign(a)),  # torch's
    "reciprocal": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sin": np.sin,
    "cos": np.cos,
    "erf": _ERF,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
    "softplus1": lambda a: np.logaddexp(0, a),
    "bfloat16": _to_bfloat16,
    "float16": lambda a: a.astype(np.float32).astype(np.float16).astype(np.float64),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "lt": lambda a, b: (a < b) * 1.0,
    "le": lambda a, b: (a <= b) * 1.0,
    "gt": lambda a, b: (a > b) * 1.0,
    "ge": lambda a, b: (a >= b) * 1.0,
    "eq": lambda a, b: (a == b) * 1.0,
    "ne": lambda a, b: (a != b) * 1.0,
    "where": lambda a, b, c: np.where(a != 0, b, c),
    "fma": lambda a, b, c: a * b + c,
    "normalize": lambda a, b, c: (a - b) * c,
    "tanh_grad": lambda d, y: d * (1 - y * y),
    "sigmoid_grad": lambda d, y: d * (1 - y) * y,
}


class Text:
    """A program in its text form, and what it means."""

    def __init__(self) -> None:
        self.values: list[tuple[Any, ...]] = []
        self.phases: dict[str, list[tuple[Any, ...]]] = {"before": [], "step": [], "after": []}
        self.reductions: list[tuple[Any, ...]] = []
        self.constants: list[float] = []
        self.tables: list[tuple[Any, Any]] = []

    def value(self, home: str, index: int, width: int, previous: int = 0) -> int:
        self.values.append((home, index, width, *([previous] if previous else [])))
        return len(self.values) - 1

    def constant(self, number: float) -> tuple[int, int, bool]:
        self.constants.append(number)
        return (-1, len(self.constants) - 1, True)

    def compile(self, dtype: str = "float64") -> _C.Program:
        return _C.Program(
            dtype, self.values, *self.phases.values(), self.reductions, self.constants, self.tables
        )

    # The arrays of a run are changed in place, as by the engine.
    def interpret(
        self,
        T: int,
        B: int,
        reverse: bool,
        shared: list[Any],
        sequences: list[Any],
        firsts: list[Any],
        fixed: list[Any],
        inits: list[Any],
        finals: list[Any],
        gradients: list[Any],
    ) -> None:
        states = [np.zeros(f.shape) if i is None else i for i, f in zip(inits, finals, strict=True)]
        for gradient in gradients:
            gradient[...] = 0
        for t in range(T)[:: -1 if reverse else 1]:
            rows: list[Any] = []
            for home, index, width, *previous in self.values:
                at = t + (previous[0] if previous else 0)
                if home == "sequence":
                    outside = np.zeros((B, width)) if firsts[index] is None else firsts[index]
                    rows.append(sequences[index][at] if 0 <= at < T else outside)
                elif home == "shared":
                    rows.append(np.broadcast_to(shared[index].reshape(-1)[:width], (B, width)))
                elif home == "fixed":
                    rows.append(fixed[index])
                elif home == "carry":
                    rows.append(states[index])
                else:
                    rows.append(np.full((B, width), np.nan))
            for phase in self.phases.values():
                for instruction in phase:
                    self._execute(instruction, rows, shared, B)
            for reduction in self.reductions:
                _reduce_pairs(reduction, rows, gradients)
            for v, (home, index, *_) in enumerate(self.values):
                if home == "next":
                    states[index] = rows[v]
        for final, state in zip(finals, states, strict=True):
            final[...] = state

    def _execute(self, i: tuple[Any, ...], rows: list[Any], shared: list[Any], B: int) -> None:
        if i[0] == "product":
            _, out, o, inp, x, weight, w, G, og, ig, wg, wk, wn, K, N, init, at = i
            flat = _flat(shared[self.values[weight][1]])
            for g in range(G):
                matrix = flat[w + g * wg + np.arange(K)[:, None] * wk + np.arange(N) * wn]
                start = rows[init][:, at + g * og :][:, :N] if init >= 0 else 0
                product = rows[inp][:, x + g * ig :][:, :K] @ matrix
                rows[out][:, o + g * og : o + g * og + N] = start + product
        elif i[0] == "run":
            registers: dict[int, Any] = {}
            for code, to, *operands in i[2]:
                given = [self._operand(x, i[1], rows, registers, B) for x in operands if x]
                with np.errstate(all="ignore"):
                    result = POINTS[code](*given) * np.ones((B, i[1]))
                if self.values[to[0]][0] == "tile":
                    registers[to[0]] = result
                else:
                    rows[to[0]][:, to[1] : to[1] + i[1]] = result
        elif i[0] == "reduce":
            _, kind, out, o, inp, x, G, segment, n, element, *second = i
            if kind in ("moments", "means"):
                row = rows[inp][:, x : x + n]
                if kind == "moments":
                    two = row.mean(1), 1 / np.sqrt(row.var(1) + 1e-5)
                else:
                    value, begin = second
                    two = row.mean(1), (row * rows[value][:, begin : begin + n]).mean(1)
                rows[out][:, o : o + 2] = np.stack(two, 1)
                return
            for g in range(G):
                part = rows[inp][:, x + g * segment + np.arange(n) * element]
                rows[out][:, o + g] = part.sum(1) if kind == "sum" else part.max(1)
        else:
            _, out, o, inp, x, count, table = i
            starts, indices = self.tables[table]
            for j in range(count):
                part = rows[inp][:, x + np.asarray(indices[starts[j] : starts[j + 1]], int)]
                rows[out][:, o + j] = part.sum(1)

    def _operand(self, x: Any, width: int, rows: list[Any], registers: Any, B: int) -> Any:
        value, offset, scalar = x
        if value == -1:
            return np.full((B, width), self.constants[offset])
        if value in registers:
            return registers[value]
        return rows[value][:, offset : offset + (1 if scalar else width)]


def _flat(array: Any) -> Any:
    """The memory of an array, which is all of its base, from its first element on."""
    return array.reshape(-1) if array.base is None else array.base.reshape(-1)


def _reduce_pairs(reduction: tuple[Any, ...], rows: list[Any], gradients: list[Any]) -> None:
    if reduction[0] == "columns":
        _, target, offset, d, o, width = reduction
        gradients[target].reshape(-1)[offset : offset + width] += rows[d][:, o : o + width].sum(0)
        return
    _, target, offset, d, o, x, i, G, dg, xg, wg, wk, wn, K, N = reduction
    flat = gradients[target].reshape(-1)
    for g in range(G):
        outer = rows[x][:, i + g * xg :][:, :K].T @ rows[d][:, o + g * dg :][:, :N]
        flat[offset + g * wg + np.arange(K)[:, None] * wk + np.arange(N) * wn] += outer


TOLERANCE = {"float32": 2e-4, "float64": 1e-12}


def check(
    text: Text,
    T: int,
    B: int,
    dtype: str,
    *,
    shared: list[Any] | None = None,
    sequences: list[Any] | None = None,
    written: tuple[int, ...] = (),
    firsts: dict[int, Any] | None = None,
    fixed: list[Any] | None = None,
    inits: list[Any] | None = None,
    gradients: list[Any] | None = None,
    states: tuple[int, ...] = (),
    reverse: bool = False,
    threads: tuple[int, ...] = (1,),
) -> list[Any]:
    """Runs a program by the engine and by NumPy; the results agree, and are given.

    On each number of threads the engine gives the same bits.
    """
    arrays: dict[str, list[Any]] = {
        "shared": shared or [],
        "sequences": sequences or [],
        "firsts": [(firsts or {}).get(i) for i in range(len(sequences or []))],
        "fixed": fixed or [],
        "inits": inits or [None] * len(states),
        "finals": [np.full((B, width), np.nan) for width in states],
        "gradients": gradients or [],
    }
    expected = {k: [None if a is None else a.astype(float) for a in v] for k, v in arrays.items()}
    wanted = [("sequences", i) for i in written]
    wanted += [("finals", i) for i in range(len(states))]
    wanted += [("gradients", i) for i in range(len(arrays["gradients"]))]
    text.interpret(T, B, reverse, *expected.values())
    program, results = text.compile(dtype), []
    for count in threads:
        given = {k: [None if a is None else _cast(a, dtype) for a in v] for k, v in arrays.items()}
        program.run(T, B, reverse, count, *given.values())
        results.append([given[name][i] for name, i in wanted])
    for (name, i), *values in zip(wanted, *results, strict=True):
        tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        np.testing.assert_allclose(
            values[0], expected[name][i], **tolerance, err_msg=f"{name}[{i}]"
        )
        for other in values[1:]:
            np.testing.assert_array_equal(other, values[0], err_msg=f"{name}[{i}]")
    return results[0]


def _cast(array: Any, dtype: str) -> Any:
    """The same values and the same strides, in a type."""
    base = array if array.base is None else array.base
    cast = base.astype(dtype)
    if array.base is None:
        return cast
    size, at = array.dtype.itemsize, array.__array_interface__["data"][0]
    first = (at - base.__array_interface__["data"][0]) // size
    strides = [s // size * cast.itemsize for s in array.strides]
    return np.lib.stride_tricks.as_strided(cast.reshape(-1)[first:], array.shape, strides)


def randn(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])

# ---- whole cells ---------------------------------------------------------------------------------


def elman(inputs: int, H: int) -> Text:
    """h' = tanh(x·W_ihᵀ + b + h·W_hhᵀ), in torch's layout of weights; y is h'."""
    t = Text()
    x, y = t.value("sequence", 0, inputs), t.value("sequence", 1, H)
    w_ih, w_hh, b = (t.value("shared", i, w) for i, w in enumerate((1, 1, H)))
    h, h_next, from_x, gates = (
        t.value("carry", 0, H),
        t.value("next", 0, H),
        t.value("block", 0, H),
        t.value("local", 0, H),
    )
    t.phases["before"] = [
        ("product", from_x, 0, x, 0, w_ih, 0, 1, 0, 0, 0, 1, inputs, inputs, H, b, 0)
    ]
    t.phases["step"] = [
        ("product", gates, 0, h, 0, w_hh, 0, 1, 0, 0, 0, 1, H, H, H, from_x, 0),
        (
            "run",
            H,
            [
                ("tanh", (h_next, 0, False), (gates, 0, False), None, None),
                ("copy", (y, 0, False), (h_next, 0, False), None, None),
            ],
        ),
    ]
    return t


@dtypes
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "B"), [(1, 1), (2, 3), (7, 33), (40, 1), (300, 2), (3, 70)])
@pytest.mark.parametrize(("inputs", "H"), [(3, 5), (16, 64), (7, 100)])
def test_an_elman_step_is_numpys(
    inputs: int, H: int, T: int, B: int, reverse: bool, dtype: str
) -> None:
    check(
        elman(inputs, H),
        T,
        B,
        dtype,
        shared=[randn(H, inputs) / inputs, randn(H, H) / H, randn(H)],
        sequences=[randn(T, B, inputs), np.zeros((T, B, H))],
        written=(1,),
        states=(H,),
        inits=[randn(B, H)],
        reverse=reverse,
    )


def test_no_steps_give_the_initial_state() -> None:
    h0 = randn(4, 5)
    shared = [randn(5, 3), randn(5, 5), randn(5)]
    sequences = [np.zeros((0, 4, 3)), np.zeros((0, 4, 5))]
    (_, final) = check(
        elman(3, 5), 0, 4, "float64", shared=shared, sequences=sequences, written=(1,),
        states=(5,), inits=[h0],
    )  # fmt: skip
    np.testing.assert_array_equal(final, h0)


def test_no_rows_give_nothing() -> None:
    shared = [randn(5, 3), randn(5, 5), randn(5)]
    sequences = [np.zeros((6, 0, 3)), np.zeros((6, 0, 5))]
    check(
        elman(3, 5), 6, 0, "float32", shared=shared, sequences=sequences, written=(1,), states=(5,)
    )


def gru_forward(H: int) -> Text:
    """The gates' sums of x come in; r, z, n and what n is made of are kept. Weights are (H, 3H)."""
    t = Text()
    x, y, kept = t.value("sequence", 0, 3 * H), t.value("sequence", 1, H), None
    kept = t.value("sequence", 2, 4 * H)  # r, z, n, hn
    w, b = t.value("shared", 0, 1), t.value("shared", 1, 3 * H)
    h, h_next = t.value("carry", 0, H), t.value("next", 0, H)
    a = t.value("local", 0, 3 * H)
    r, z, n = (t.value("tile", i, 0) for i in range(3))

    def at(v: int, offset: int = 0) -> tuple[int, int, bool]:
        return (v, offset, False)

    t.phases["step"] = [
        ("product", a, 0, h, 0, w, 0, 1, 0, 0, 0, 3 * H, 1, H, 3 * H, b, 0),
        (
            "run",
            H,
            [
                ("add", at(r), at(a), at(x), None),
                ("sigmoid", at(r), at(r), None, None),
                ("add", at(z), at(a, H), at(x, H), None),
                ("sigmoid", at(z), at(z), None, None),
                ("fma", at(n), at(r), at(a, 2 * H), at(x, 2 * H)),
                ("tanh", at(n), at(n), None, None),
                ("copy", at(kept), at(r), None, None),
                ("copy", at(kept, H), at(z), None, None),
                ("copy", at(kept, 2 * H), at(n), None, None),
                ("copy", at(kept, 3 * H), at(a, 2 * H), None, None),
                ("sub", at(r), at(h), at(n), None),
                ("fma", at(n), at(z), at(r), at(n)),
                ("copy", at(y), at(n), None, None),
                ("copy", at(h_next), at(n), None, None),
            ],
        ),
    ]
    return t


def gru_backward(H: int) -> Text:
    """dy in; the gradients of the gates' sums, of h0, W and b out."""
    t = Text()
    dy, kept, da, dx = (t.value("sequence", i, w) for i, w in enumerate((H, 4 * H, 3 * H, 3 * H)))
    h = t.value("sequence", 4, H, -1)  # y, a step before
    w = t.value("shared", 0, 1)
    dh, dh_next = t.value("carry", 0, H), t.value("next", 0, H)
    partial = t.value("local", 0, H)
    d, u, v = (t.value("tile", i, 0) for i in range(3))
    one = t.constant(1.0)

    def at(v: int, offset: int = 0) -> tuple[int, int, bool]:
        return (v, offset, False)

    r, z, n, hn = (at(kept, i * H) for i in range(4))
    t.phases["step"] = [
        (
            "run",
            H,
            [
                ("add", at(d), at(dh), at(dy), None),
                ("mul", at(partial), at(d), z, None),
                ("sub", at(u), one, z, None),
                ("mul", at(u), at(d), at(u), None),
                ("mul", at(v), n, n, None),
                ("sub", at(v), one, at(v), None),
                ("mul", at(u), at(u), at(v), None),  # of n's sum
                ("copy", at(dx, 2 * H), at(u), None, None),
                ("mul", at(da, 2 * H), at(u), r, None),
                ("mul", at(u), at(u), hn, None),
                ("sub", at(v), one, r, None),
                ("mul", at(v), at(v), r, None),
                ("mul", at(u), at(u), at(v), None),
                ("copy", at(da), at(u), None, None),
                ("copy", at(dx), at(u), None, None),
                ("sub", at(u), at(h), n, None),
                ("mul", at(u), at(u), at(d), None),
                ("sub", at(v), one, z, None),
                ("mul", at(v), at(v), z, None),
                ("mul", at(u), at(u), at(v), None),
                ("copy", at(da, H), at(u), None, None),
                ("copy", at(dx, H), at(u), None, None),
            ],
        ),
        ("product", dh_next, 0, da, 0, w, 0, 1, 0, 0, 0, 1, 3 * H, 3 * H, H, partial, 0),
    ]
    t.reductions = [
        ("outer", 0, 0, da, 0, h, 0, 1, 0, 0, 0, 3 * H, 1, H, 3 * H),
        ("columns", 1, 0, da, 0, 3 * H),
    ]
    return t


@dtypes
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 4), (9, 3, 20), (30, 33, 16), (5, 2, 65)])
def test_a_gru_forward_and_back_is_numpys(T: int, B: int, H: int, dtype: str) -> None:
    w, b, h0 = randn(H, 3 * H) / H, randn(3 * H), randn(B, H)
    y, kept, _ = check(
        gru_forward(H),
        T,
        B,
        dtype,
        shared=[w, b],
        sequences=[randn(T, B, 3 * H), np.zeros((T, B, H)), np.zeros((T, B, 4 * H))],
        written=(1, 2),
        states=(H,),
        inits=[h0],
    )
    check(
        gru_backward(H),
        T,
        B,
        dtype,
        shared=[w],
        sequences=[randn(T, B, H, seed=1), kept, *(np.zeros((T, B, 3 * H)) for _ in "ax"), y],
        firsts={4: h0},
        written=(2, 3),
        states=(H,),
        gradients=[np.zeros((H, 3 * H)), np.zeros(3 * H)],
        reverse=True,
    )


def test_a_gru_backward_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    T, B, H = 11, 3, 6
    gru = torch.nn.GRU(3 * H, H, dtype=torch.float64)
    with torch.no_grad():  # the sums of x come as they are
        gru.weight_ih_l0.copy_(torch.eye(3 * H))
        gru.bias_ih_l0.zero_()
    x = torch.randn(T, B, 3 * H, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(1, B, H, dtype=torch.float64, requires_grad=True)
    expected, _ = gru(x, h0)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    w, b = gru.weight_hh_l0.detach().T.contiguous(), gru.bias_hh_l0.detach()
    like = {"dtype": torch.float64}
    y, kept = torch.empty(T, B, H, **like), torch.empty(T, B, 4 * H, **like)
    forward = gru_forward(H).compile()
    initial = h0.detach()[0]
    forward.run(
        T, B, False, 1, [w, b], [x.detach(), y, kept], [None] * 3, [], [initial], [None], []
    )
    torch.testing.assert_close(y, expected.detach())
    da, dx, dh0 = torch.empty_like(x), torch.empty_like(x), torch.empty_like(initial)
    dw, db = torch.empty(H, 3 * H, **like), torch.empty(3 * H, **like)
    sequences, firsts = [dy, kept, da, dx, y], [None] * 4 + [initial]
    backward = gru_backward(H).compile()
    backward.run(T, B, True, 1, [w], sequences, firsts, [], [None], [dh0], [dw, db])
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dh0, h0.grad[0])
    torch.testing.assert_close(dw.T, gru.weight_hh_l0.grad)
    torch.testing.assert_close(db, gru.bias_hh_l0.grad)


# ---- instructions --------------------------------------------------------------------------------

# Of operations that subtract: how large what is subtracted may make the result.
_SIZES: dict[str, Any] = {
    "normalize": lambda a, b, c: (a + b) * c,
    "tanh_grad": lambda d, y: d * (1 + y * y),
    "sigmoid_grad": lambda d, y: d * (1 + y) * y,
}
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 88.6, -87.2, 1e-30, 700.0, -700.0, 1e9]


@dtypes
@pytest.mark.parametrize("code", POINTS)
def test_a_pointwise_operation_is_numpys(code: str, dtype: str) -> None:
    names = POINTS[code].__code__.co_argcount if hasattr(POINTS[code], "__code__") else None
    count = names or getattr(POINTS[code], "nin", 1)
    width = 83
    values = np.concatenate([randn(4, width) * 3, np.resize(SPECIAL, (3, width))]).astype(dtype)
    t = Text()
    given = [t.value("sequence", i, width) for i in range(count)]
    out = t.value("sequence", count, width)
    operands = [(v, 0, False) for v in given] + [None] * (3 - count)
    t.phases["step"] = [("run", width, [(code, (out, 0, False), *operands)])]
    arrays = [np.roll(values, 7 * i)[None] for i in range(count)]
    result = np.zeros((1, 7, width), dtype)
    t.compile(dtype).run(
        1, 7, False, 1, [], [*arrays, result], [None] * (count + 1), [], [], [], []
    )
    with np.errstate(all="ignore"):
        expected = POINTS[code](*(a.astype(float) for a in arrays)).astype(dtype)
    eps, smallest = np.finfo(dtype).eps, np.finfo(dtype).tiny  # smaller numbers become zero
    near = 10 * eps if code == "fma" else 2 * smallest  # a·b + c may cancel
    if code in _SIZES:  # as do these, in the size of what they subtract
        with np.errstate(all="ignore"):
            size = _SIZES[code](*(np.abs(a.astype(float)) for a in arrays))
        near = np.maximum(np.where(np.isfinite(size), 4 * eps * size, 0), near)
    close = np.isclose(result, expected, rtol=4 * eps, atol=near, equal_nan=True)
    assert close.all(), (result[~close], expected[~close])


@dtypes
@pytest.mark.parametrize("width", [1, 3, 16, 37, 500, 3000])
@pytest.mark.parametrize(("T", "B"), [(1, 1), (3, 40), (50, 2)])
def test_operands_are_vectors_scalars_and_constants(T: int, B: int, width: int, dtype: str) -> None:
    t = Text()
    x, y = t.value("sequence", 0, width + 2), t.value("sequence", 1, width + 1)
    s, f, u = t.value("shared", 0, width), t.value("fixed", 0, 3), t.value("tile", 31, 0)
    v = t.value("tile", 0, 0)
    one = t.constant(0.5)
    t.phases["before"] = [
        (
            "run",
            width,
            [
                ("fma", (u, 0, False), (x, 2, False), (f, 1, True), (s, 0, False)),
                ("mul", (v, 0, False), (x, 0, True), one, None),
                ("add", (v, 0, False), (v, 0, False), (s, width - 1, True), None),
                ("sub", (y, 1, False), (u, 0, False), (v, 0, False), None),
            ],
        ),
        ("run", 1, [("copy", (y, 0, False), one, None, None)]),
    ]
    check(
        t,
        T,
        B,
        dtype,
        shared=[randn(width)],
        fixed=[randn(B, 3)],
        sequences=[randn(T, B, width + 2), np.zeros((T, B, width + 1))],
        written=(1,),
    )


@dtypes
@pytest.mark.parametrize("B", [1, 2, 3, 7, 13, 64])
@pytest.mark.parametrize(
    ("G", "K", "N"), [(1, 1, 1), (1, 9, 16), (3, 5, 20), (1, 30, 200), (2, 7, 49), (1, 64, 400)]
)
@pytest.mark.parametrize("layout", ["k beside k", "n beside n", "strided", "groups inside"])
def test_a_product_is_numpys(G: int, K: int, N: int, layout: str, B: int, dtype: str) -> None:
    strides = {  # w_off, w_group, w_k, w_n
        "k beside k": (0, N * K, 1, K),
        "n beside n": (0, K * N, N, 1),
        "strided": (3, 2 * K * N, 2, 2 * K),
        "groups inside": (0, 1, N * G, G),
    }[layout]
    t = Text()
    x, y = t.value("sequence", 0, G * K + 3), t.value("sequence", 1, G * N)
    z, w = t.value("sequence", 2, G * N), t.value("shared", 0, 1)
    b = t.value("shared", 1, G * N)
    off, w_group, w_k, w_n = strides
    common = (x, 3, w, off, G, N, K, w_group, w_k, w_n, K, N)
    t.phases["before"] = [("product", y, 0, *common, b, 0)]
    t.phases["step"] = [("product", z, 0, *common, y, 0)]
    check(
        t,
        2,
        B,
        dtype,
        shared=[randn(2 * G * K * N + 3) / K, randn(G * N)],
        sequences=[randn(2, B, G * K + 3), np.zeros((2, B, G * N)), np.zeros((2, B, G * N))],
        written=(1, 2),
    )


@dtypes
@pytest.mark.parametrize("kind", ["sum", "max"])
@pytest.mark.parametrize(
    ("G", "segment", "n", "element"), [(1, 0, 1, 1), (1, 0, 40, 1), (5, 7, 7, 1), (40, 1, 3, 40)]
)
@pytest.mark.parametrize("B", [1, 5])
def test_a_reduction_of_a_row_is_numpys(
    kind: str, G: int, segment: int, n: int, element: int, B: int, dtype: str
) -> None:
    width = (G - 1) * segment + (n - 1) * element + 1
    t = Text()
    x, y = t.value("sequence", 0, width + 1), t.value("sequence", 1, G + 2)
    rest = [t.constant(float(i)) for i in range(2)]
    t.phases["step"] = [
        ("reduce", kind, y, 2, x, 1, G, segment, n, element),
        *(("run", 1, [("copy", (y, i, False), rest[i], None, None)]) for i in range(2)),
    ]
    sequences = [randn(3, B, width + 1), np.zeros((3, B, G + 2))]
    sequences[0][1] = -np.inf if kind == "max" else 0.0
    check(t, 3, B, dtype, sequences=sequences, written=(1,))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 7, 16, 64, 133])
@pytest.mark.parametrize("B", [1, 5])
def test_moments_and_means_of_a_row_are_numpys(n: int, B: int, dtype: str) -> None:
    t = Text()
    x, y, out = (t.value("sequence", i, width) for i, width in enumerate((n + 1, n, 4)))
    t.phases["step"] = [
        ("reduce", "moments", out, 0, x, 1, 1, 0, n, 1),
        ("reduce", "means", out, 2, x, 1, 1, 0, n, 1, y, 0),
    ]
    sequences = [randn(3, B, n + 1), randn(3, B, n), np.zeros((3, B, 4))]
    check(t, 3, B, dtype, sequences=sequences, written=(2,))


def test_the_maximum_of_a_row_with_nan_is_nan() -> None:
    t = Text()
    x, y = t.value("sequence", 0, 40), t.value("sequence", 1, 1)
    t.phases["step"] = [("reduce", "max", y, 0, x, 0, 1, 0, 40, 1)]
    rows = np.zeros((1, 40, 40))
    rows[0, np.arange(40), np.arange(40)] = np.nan
    result = np.zeros((1, 40, 1))
    t.compile().run(1, 40, False, 1, [], [rows, result], [None, None], [], [], [], [])
    assert np.isnan(result).all()


@dtypes
@pytest.mark.parametrize("as_array", [False, True])
def test_a_collect_permutes_repeats_pads_and_sums(dtype: str, as_array: bool) -> None:
    lists = [[3], [4], [5], [], [], [0], [0], [1, 2, 3], [9], [8], [7, 7], [6]]
    starts = np.cumsum([0, *map(len, lists)])
    indices = np.concatenate([np.asarray(i, int) for i in lists])
    t = Text()
    x, y = t.value("sequence", 0, 12), t.value("sequence", 1, len(lists))
    table = (starts, indices.astype(np.int32)) if as_array else (list(starts), list(indices))
    t.tables = [table]
    t.phases["after"] = [("collect", y, 0, x, 1, len(lists), 0)]
    check(t, 2, 3, dtype, sequences=[randn(2, 3, 12), np.zeros((2, 3, 12))], written=(1,))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("previous", [-1, 1])
@pytest.mark.parametrize("phase", ["before", "step", "after"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("T", "B"), [(1, 2), (9, 3), (500, 1)])
def test_a_sequence_is_read_a_step_away(
    T: int, B: int, given: bool, phase: str, previous: int, reverse: bool
) -> None:
    t = Text()
    x, y = t.value("sequence", 0, 4, previous), t.value("sequence", 1, 4)
    here = t.value("sequence", 0, 4)
    t.phases[phase] = [("run", 4, [("sub", (y, 0, False), (here, 0, False), (x, 0, False), None)])]
    t.reductions = [("outer", 0, 0, here, 0, x, 0, 1, 0, 0, 0, 1, 4, 4, 4)]
    check(
        t,
        T,
        B,
        "float64",
        sequences=[randn(T, B, 4), np.zeros((T, B, 4))],
        firsts={0: randn(B, 4, seed=2)} if given else {},
        written=(1,),
        gradients=[np.zeros((4, 4))],
        reverse=reverse,
    )


@dtypes
@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0), (1, 1), (17, 5), (300, 3), (2, 700)])
@pytest.mark.parametrize(("G", "K", "N"), [(1, 3, 2), (3, 5, 20), (2, 70, 33), (1, 200, 7)])
@pytest.mark.parametrize("layout", ["k beside k", "n beside n", "apart", "one for all"])
def test_a_sum_of_outer_products_is_numpys(
    T: int, B: int, G: int, K: int, N: int, layout: str, dtype: str
) -> None:
    strides = {  # offset, w_group, w_k, w_n
        "k beside k": (0, N * K, 1, K),
        "n beside n": (2, K * N, N, 1),
        "apart": (1, 2 * K * N, 2, 2 * K),
        "one for all": (0, 0, 1, K),
    }[layout]
    offset, w_group, w_k, w_n = strides
    t = Text()
    d, x, c = t.value("sequence", 0, G * N), t.value("fixed", 0, G * K + 1), t.value("block", 0, N)
    t.phases["before"] = [("run", N, [("neg", (c, 0, False), (d, 0, False), None, None)])]
    t.reductions = [
        ("outer", 0, offset, d, 0, x, 1, G, N, K, w_group, w_k, w_n, K, N),
        ("columns", 1, 2, c, 0, N),
        ("columns", 1, 0, d, (G - 1) * N, N),
    ]
    check(
        t,
        T,
        B,
        dtype,
        sequences=[randn(T, B, G * N)],
        fixed=[randn(B, G * K + 1) / 10],
        gradients=[np.ones(2 * G * K * N + 2), np.ones(N + 2)],
    )


@pytest.mark.parametrize("layout", ["rows apart", "batch first", "one for all steps"])
def test_sequences_may_have_strides(layout: str) -> None:
    T, B, width = 6, 5, 7
    x = {
        "rows apart": randn(T, B, 2 * width)[:, :, 3 : 3 + width],
        "batch first": randn(B, T, width).transpose(1, 0, 2),
        "one for all steps": np.broadcast_to(randn(B, width), (T, B, width)),
    }[layout]
    t = Text()
    given, y = t.value("sequence", 0, width), t.value("sequence", 1, width)
    t.phases["before"] = [("run", width, [("neg", (y, 0, False), (given, 0, False), None, None)])]
    result = np.zeros((T, B, width))
    t.compile().run(T, B, False, 1, [], [x, result], [None, None], [], [], [], [])
    np.testing.assert_array_equal(result, -x)


# ---- what cannot be a program --------------------------------------------------------------------


def refused(t: Text) -> str:
    with pytest.raises(ValueError) as error:
        t.compile()
    return str(error.value)


def simple() -> Text:
    """Values by number: 0, 1 sequences, 2 shared, 3 carry, 4 next, 5 block, 6 local, 7 tile."""
    t = Text()
    for home in ("sequence", "sequence", "shared", "carry", "next", "block", "local"):
        t.value(home, 1 if len(t.values) == 1 else 0, 8)
    t.value("tile", 0, 0)
    t.phases["step"] = [("run", 8, [("copy", (4, 0, False), (3, 0, False), None, None)])]
    return t


def copy(to: int, at: int, source: int, offset: int, width: int = 8) -> tuple[Any, ...]:
    return ("run", width, [("copy", (to, at, False), (source, offset, False), None, None)])


def test_the_simple_program_is_accepted() -> None:
    simple().compile()


@pytest.mark.parametrize(
    ("phase", "instruction", "message"),
    [
        ("step", copy(6, 0, 99, 0), r"step\[1\] \(run\) op 0 \(copy\): a: expected 0 to 7"),
        ("step", copy(6, 0, 0, 1), "elements 1 to 8 do not lie inside value 0"),
        ("step", copy(6, 0, 0, -1), "elements -1 to 6 do not lie inside"),
        ("step", copy(6, 1, 0, 0), r"dst: elements 1 to 8 do not lie inside"),
        ("step", copy(1, 0, 6, 0), "element 0 of value 6 .* is read before it is written"),
        ("step", copy(1, 0, 5, 0), "value 5 .* is read before it is written"),
        ("before", copy(1, 0, 3, 0), "value 3 .* cannot be read here"),
        ("before", copy(4, 0, 0, 0), "value 4 .* cannot be written here"),
        ("after", copy(1, 0, 4, 0), "value 4 .* cannot be read here"),
        ("step", copy(2, 0, 0, 0), "value 2 .* cannot be written here"),
        ("step", copy(3, 0, 0, 0), "value 3 .* cannot be written here"),
        ("step", copy(1, 0, 7, 0), "tile register 0 is read before this run writes it"),
        ("step", copy(1, 0, 0, 0, 4), "element 4 of value 1 .* is not written"),
        ("step", copy(1, 0, 0, 0, 0), "width: expected 1 to"),
        ("step", ("run", 8, [("add", (6, 0, False), (0, 0, False), None, None)]), "2 operands"),
        ("step", ("run", 8, [("mix", (6, 0, False), (0, 0, False), None, None)]), "'mix' is no"),
        ("step", ("fold", 1), "expected product, run, reduce or collect, got 'fold'"),
        (
            "step",
            ("product", 6, 0, 0, 0, 0, 0, 1, 0, 0, 0, 8, 1, 8, 8, -1, 0),
            "weight: expected a shared value",
        ),
        (
            "step",
            ("product", 6, 0, 0, 1, 2, 0, 1, 0, 0, 0, 8, 1, 8, 8, -1, 0),
            r"step\[1\] \(product\): inp: elements 1 to 8",
        ),
        (
            "step",
            ("product", 6, 0, 0, 0, 2, 0, 2, 0, 0, 0, 8, 1, 8, 8, -1, 0),
            "would be written twice",
        ),
        (
            "step",
            ("product", 6, 0, 0, 0, 2, 0, 2, 3, 0, 0, 8, 1, 8, 5, -1, 0),
            "would be written twice",
        ),
        (
            "step",
            ("product", 6, 0, 0, 0, 2, 0, 1 << 40, 0, 0, 0, 8, 1, 8, 8, -1, 0),
            "G: expected 1 to",
        ),
        (
            "step",
            ("product", 6, 0, 0, 0, 2, 0, 1, 0, 0, 0, 1 << 50, 1, 8, 8, -1, 0),
            "a stride: expected",
        ),
        ("step", ("reduce", "sum", 6, 0, 0, 0, 2, 4, 5, 1), "elements 0 to 8"),
        ("step", ("reduce", "mean", 6, 0, 0, 0, 2, 4, 4, 1), "'moments' or 'means', got 'mean'"),
        ("step", ("reduce", "means", 6, 0, 0, 0, 1, 4, 4, 1), "second: expected of means"),
        ("step", ("reduce", "moments", 6, 0, 0, 0, 2, 4, 4, 1), "G: expected 1"),
        ("step", ("collect", 6, 0, 0, 0, 2, 0), "table: expected 0 to -1"),
        ("step", ("collect", 6, 0, 0), "expected 7 items, got 4"),
    ],
)
def test_an_instruction_that_does_not_fit_is_refused_by_its_place(
    phase: str, instruction: tuple[Any, ...], message: str
) -> None:
    t = simple()
    t.phases[phase].append(instruction)
    with pytest.raises(ValueError, match=message):
        t.compile()


def test_a_local_of_another_phase_is_not_there() -> None:
    t = simple()
    t.phases["before"] = [copy(6, 0, 0, 0)]
    t.phases["step"].append(copy(1, 0, 6, 0))
    assert "is read before it is written" in refused(t)


def test_what_one_run_reads_and_writes_lies_at_one_offset() -> None:
    t = simple()
    t.values[6] = ("local", 0, 9)
    t.phases["step"].append(copy(6, 0, 0, 0))
    both = [("neg", (6, 1, False), (6, 0, False), None, None)]
    t.phases["step"].append(("run", 8, both))
    assert "read and written at different offsets" in refused(t)


def test_what_a_product_reads_is_not_what_it_writes() -> None:
    t = simple()
    t.phases["step"].append(copy(6, 0, 0, 0))
    t.phases["step"].append(("product", 6, 4, 6, 0, 2, 0, 1, 0, 0, 0, 8, 1, 5, 4, -1, 0))
    assert "element 4 of value 6 (local 0, width 8) is read and written" in refused(t)


def test_a_sequence_that_is_written_is_of_one_phase_and_read_nowhere_before() -> None:
    t = simple()
    t.phases["before"] = [copy(1, 0, 0, 0)]
    t.phases["after"] = [copy(1, 0, 0, 0)]
    assert "already written by another phase" in refused(t)
    t = simple()
    t.phases["before"] = [copy(5, 0, 1, 0)]
    t.phases["step"].append(copy(1, 0, 0, 0))
    assert "has been read before" in refused(t)
    t = simple()
    t.value("sequence", 1, 8, -1)
    t.phases["step"].append(copy(1, 0, 0, 0))
    assert "no other value may use its array" in refused(t)


def test_a_state_has_what_it_is_next() -> None:
    t = simple()
    t.phases["step"] = []
    assert "element 0 of value 4 (next 0, width 8) is not written" in refused(t)
    t.values[4] = ("next", 1, 8)
    t.phases["step"] = [copy(4, 0, 0, 0)]
    assert "carry 0 has no next" in refused(t)


def test_a_table_lists_what_it_says() -> None:
    t = simple()
    t.tables = [([0, 2], [1])]
    assert "starts: expected to begin with 0 and to end with the number of indices, 1" in refused(t)
    t.tables = [([0, 2, 1], [1])]
    assert "expected not to decrease" in refused(t)
    t.tables = [([0, 1], [8])]
    t.phases["step"].append(("collect", 6, 0, 0, 0, 1, 0))
    assert "elements 8 to 8 do not lie inside" in refused(t)


def test_the_elements_of_a_gradient_are_apart() -> None:
    t = simple()
    t.reductions = [("outer", 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 1, 8, 8)]
    assert "two sums have the same element" in refused(t)
    t.reductions = [("outer", 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 8, 1, 8, 8)]
    assert "value 3 (carry 0, width 8) cannot be summed" in refused(t)
    t.reductions = [("columns", 0, -1, 0, 0, 8)]
    assert "there is no element -1" in refused(t)


def run_simple(t: Text, **changed: Any) -> None:
    arrays: dict[str, Any] = {
        "shared": [np.zeros((8, 8))],
        "sequences": [np.zeros((2, 3, 8)), np.zeros((2, 3, 8))],
        "firsts": [None, None],
        "fixed": [],
        "inits": [np.zeros((3, 8))],
        "finals": [np.zeros((3, 8))],
        "gradients": [np.zeros(64)],
    }
    arrays.update(changed)
    t.reductions = [("outer", 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 8, 1, 8, 8)]
    t.phases["before"] = [("product", 5, 0, 0, 0, 2, 0, 1, 0, 0, 0, 8, 1, 8, 8, -1, 0)]
    t.phases["after"] = [copy(1, 0, 5, 0)]
    t.compile().run(2, 3, False, 1, *arrays.values())


def read_only(*shape: int) -> Any:
    array = np.zeros(shape)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"shared": []}, ValueError, "shared: expected 1 arrays, got 0"),
        ({"shared": [np.zeros((8, 7))]}, ValueError, r"shared\[0\]: expected memory at offsets"),
        ({"shared": [np.zeros((8, 8))[:, 1:]]}, ValueError, r"shared\[0\]: expected memory"),
        ({"shared": [np.zeros((8, 8), "f4")]}, TypeError, r"shared\[0\]: expected dtype float64"),
        ({"shared": [None]}, TypeError, r"shared\[0\]"),
        ({"sequences": [np.zeros((2, 3, 7))] * 2}, ValueError, r"sequences\[0\]: expected shape"),
        (
            {"sequences": [np.zeros((2, 3, 16))[:, :, ::2]] * 2},
            ValueError,
            r"sequences\[0\]: expected contiguous units",
        ),
        (
            {"sequences": [np.zeros((2, 3, 8)), read_only(2, 3, 8)]},
            ValueError,
            r"sequences\[1\]: expected an array to write to",
        ),
        ({"inits": [np.zeros((2, 8))]}, ValueError, r"inits\[0\]: expected shape \(3, 8\)"),
        ({"finals": [np.zeros((3, 9))[:, :8]]}, ValueError, r"finals\[0\]: expected a contiguous"),
        ({"gradients": [np.zeros(63)]}, ValueError, r"gradients\[0\]: expected at least 64"),
        ({"gradients": [None]}, TypeError, r"gradients\[0\]"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_by_its_name(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    run_simple(simple())
    with pytest.raises(error, match=message):
        run_simple(simple(), **changed)


def test_a_scratch_that_no_machine_has_is_a_memory_error() -> None:
    t = Text()
    state, after = t.value("carry", 0, 1 << 20), t.value("next", 0, 1 << 20)
    t.phases["step"] = [copy(after, 0, state, 0, 1 << 20)]
    with pytest.raises(MemoryError):
        t.compile().run(1, 2**31 - 1, False, 1, [], [], [], [], [None], [None], [])


def test_sizes_and_threads_are_not_negative() -> None:
    program = simple().compile()
    arrays: list[Any] = [[], [None] * 2, [None] * 2, [], [None], [None], []]
    with pytest.raises(ValueError, match="T: expected 0 to 2147483647, got -1"):
        program.run(-1, 1, False, 1, *arrays)
    with pytest.raises(ValueError, match="threads: expected 0"):
        program.run(1, 1, False, -1, *arrays)


# ---- programs at random, and threads -------------------------------------------------------------


class Random:
    """A program of instructions at random, each of which makes a value from those before it."""

    def __init__(self, seed: int, wide: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.t = t = Text()
        self.wide = wide
        self.locals = self.blocks = 0
        self.sequences = [self.width() for _ in range(2)]
        self.states = [self.width() for _ in range(2)]
        self.vector, self.fixed = self.width(), self.width()
        inputs = [t.value("sequence", i, w) for i, w in enumerate(self.sequences)]
        inputs.append(t.value("sequence", 0, self.sequences[0], int(self.rng.choice([-1, 1]))))
        inputs += [t.value("fixed", 0, self.fixed), t.value("shared", 1, self.vector)]
        self.weights = wide * wide
        self.weight = t.value("shared", 0, 1)
        carries = [t.value("carry", i, w) for i, w in enumerate(self.states)]
        nexts = [t.value("next", i, w) for i, w in enumerate(self.states)]
        blocks = self.phase("before", inputs, "block")
        blocks += self.phase("step", inputs + carries + blocks, "block")
        for state in nexts:
            self.into("step", state, inputs + carries + blocks)
        self.sequences += [self.width() for _ in range(2)]
        outputs = [t.value("sequence", i, self.sequences[i]) for i in (2, 3)]
        self.into("step", outputs[0], inputs + nexts + blocks)
        blocks += self.phase("after", inputs + blocks, "block")
        self.into("after", outputs[1], inputs + blocks)
        pairs = [*inputs[:4], *blocks, *outputs]
        for _ in range(3):
            d, x = (int(self.rng.choice(pairs)) for _ in "dx")
            N, K = t.values[d][2], t.values[x][2]
            layout = (1, K) if self.rng.random() < 0.5 else (N, 1)
            t.reductions.append(("outer", 0, 0, d, 0, x, 0, 1, 0, 0, 0, *layout, K, N))
            t.reductions.append(("columns", 1, 0, d, 0, N))

    def width(self) -> int:
        return int(self.rng.integers(1, self.wide))

    def phase(self, name: str, sources: list[int], home: str) -> list[int]:
        made: list[int] = []
        for i in range(int(self.rng.integers(2, 6))):
            last = i == 0 or self.rng.random() < 0.5
            count = self.blocks if last else self.locals
            value = self.t.value(home if last else "local", count, self.width())
            self.blocks, self.locals = self.blocks + last, self.locals + (not last)
            self.into(name, value, sources + made)
            made.append(value)
        return [v for v in made if self.t.values[v][0] == home]

    def into(self, phase: str, to: int, sources: list[int]) -> None:
        t, rng, width = self.t, self.rng, self.t.values[to][2]
        source = int(rng.choice(sources))
        have = t.values[source][2]
        kind = rng.choice(["product", "run", "collect", "reduce"])
        if kind == "product":
            init = int(rng.choice(sources))
            init = init if t.values[init][2] >= width else -1
            G = 2 if width % 2 == 0 and have % 2 == 0 else 1
            N, K = width // G, have // G
            strides = (N * K, 1, K) if self.rng.random() < 0.5 else (N * K, N, 1)
            t.phases[phase].append(
                ("product", to, 0, source, 0, self.weight, 0, G, N, K, *strides, K, N, init, 0)
            )
        elif kind == "reduce" and width <= have:
            t.phases[phase].append(
                ("reduce", "max", to, 0, source, 0, width, 1, have - width + 1, 1)
            )
        elif kind == "collect" or have < width:
            lists = [rng.integers(0, have, int(rng.integers(0, 3))) for _ in range(width)]
            t.tables.append((np.cumsum([0, *map(len, lists)]), np.concatenate(lists)))
            t.phases[phase].append(("collect", to, 0, source, 0, width, len(t.tables) - 1))
        else:
            self.run(phase, to, source, sources)

    def run(self, phase: str, to: int, source: int, sources: list[int]) -> None:
        t, rng, width = self.t, self.rng, self.t.values[to][2]
        fit = [v for v in sources if t.values[v][2] >= width]
        register = len(t.values)
        t.values += [("tile", int(i), 0) for i in rng.permutation(32)[:2]]

        def operand() -> tuple[int, int, bool]:
            value = int(rng.choice(fit))
            if rng.random() < 0.2:
                return t.constant(float(rng.standard_normal()))
            if rng.random() < 0.2:
                return (value, int(rng.integers(t.values[value][2])), True)
            return (value, int(rng.integers(t.values[value][2] - width + 1)), False)

        one, two = (register, 0, False), (register + 1, 0, False)
        codes = list(rng.choice(["add", "sub", "mul", "maximum", "minimum"], 2))
        ops = [
            (codes[0], one, operand(), operand(), None),
            ("tanh", two, one, None, None),
            (codes[1], two, two, operand(), None),
            ("sigmoid", one, two, None, None),
            ("fma", (to, 0, False), one, operand(), two),
        ]
        t.phases[phase].append(("run", width, ops))

    def arrays(self, T: int, B: int) -> dict[str, Any]:
        sequences = [randn(T, B, w) for w in self.sequences]
        widths = [v[2] for v in self.t.values if v[0] != "tile"]
        return {
            "shared": [randn(self.weights) / self.wide, randn(self.vector)],
            "sequences": sequences,
            "firsts": {0: randn(B, self.sequences[0])},
            "fixed": [randn(B, self.fixed)],
            "written": (2, 3),
            "states": tuple(self.states),
            "inits": [randn(B, w) for w in self.states],
            "gradients": [np.zeros(max(widths) ** 2), np.zeros(max(widths))],
        }


@dtypes
@pytest.mark.parametrize("seed", range(40))
def test_a_program_at_random_is_numpys(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    T, B = int(rng.integers(1, 9)), int(rng.choice([1, 2, 5, 33]))
    made = Random(seed, int(rng.choice([9, 40])))
    check(made.t, T, B, dtype, reverse=bool(seed % 2), **made.arrays(T, B))


@dtypes
@pytest.mark.parametrize(
    ("T", "B", "wide", "shared"), [(40, 64, 60, "rows"), (6, 1, 900, "columns")]
)
@pytest.mark.parametrize("seed", range(4))
def test_the_bits_are_the_same_for_any_number_of_threads(
    T: int, B: int, wide: int, shared: str, seed: int, dtype: str
) -> None:
    made = Random(seed, wide)
    assert made.t.compile(dtype).team(T, B, 4)[1] == shared
    arrays = made.arrays(T, B)
    check(made.t, T, B, dtype, reverse=seed == 1, threads=(1, 2, 3, 4), **arrays)


@dtypes
def test_a_rows_bits_depend_on_no_other_row(dtype: str) -> None:
    made, T, B = Random(7, 50), 12, 23
    arrays = made.arrays(T, B)
    whole = check(made.t, T, B, dtype, **arrays)[:4]
    for rows in (slice(0, 1), slice(3, 8), slice(1, 23)):
        part = dict(arrays)
        part["sequences"] = [a[:, rows].copy() for a in arrays["sequences"]]
        part["fixed"], part["inits"] = ([a[rows] for a in arrays[n]] for n in ("fixed", "inits"))
        part["firsts"] = {0: arrays["firsts"][0][rows]}
        results = check(made.t, T, rows.stop - rows.start, dtype, **part)[:4]
        for i, (all_rows, some) in enumerate(zip(whole, results, strict=True)):
            np.testing.assert_array_equal(all_rows[:, rows] if i < 2 else all_rows[rows], some)


# Of few steps the weights are read where they lie, of many they are packed.
@dtypes
@pytest.mark.parametrize(("B", "H"), [(1, 70), (2, 16), (9, 33), (3, 300)])
def test_a_cut_sequence_gives_the_same_bits(B: int, H: int, dtype: str) -> None:
    for text, width, shared in (
        (elman(5, H), 5, [randn(H, 5), randn(H, H) / H, randn(H)]),
        (gru_forward(H), 3 * H, [randn(H, 3 * H) / H, randn(3 * H)]),
    ):
        program, weights = text.compile(dtype), [w.astype(dtype) for w in shared]
        T, x = 40, randn(40, B, width).astype(dtype)
        outputs = 1 if width == 5 else 2
        bits = []
        for cuts in ([0, T], [0, 1, 2, 3, 8, T], range(T + 1)):
            y, kept = np.zeros((T, B, H), dtype), np.zeros((T, B, 4 * H), dtype)
            h = np.ones((B, H), dtype)
            for begin, end in itertools.pairwise(cuts):
                sequences = [a[begin:end] for a in (x, y, kept)][: 1 + outputs]
                firsts, after = [None] * len(sequences), np.zeros_like(h)
                program.run(
                    end - begin, B, False, 1, weights, sequences, firsts, [], [h], [after], []
                )
                h = after
            bits.append((y, kept, h))
        for other in bits[1:]:
            for one, two in zip(bits[0], other, strict=True):
                np.testing.assert_array_equal(one, two)


def test_a_sequence_may_be_written_batch_first() -> None:
    t = Text()
    x, y = t.value("sequence", 0, 4), t.value("sequence", 1, 4)
    t.phases["step"] = [copy(y, 0, x, 0, 4)]
    program, given = t.compile(), randn(6, 3, 4)
    result = np.zeros((3, 6, 4))
    arrays: list[Any] = [[None, None], [], [], [], []]
    program.run(6, 3, False, 1, [], [given, result.transpose(1, 0, 2)], *arrays)
    np.testing.assert_array_equal(result, given.transpose(1, 0, 2))
    over = np.lib.stride_tricks.as_strided(np.zeros(100), (6, 3, 4), (32, 16, 8))
    with pytest.raises(ValueError, match=r"sequences\[1\]: expected rows that do not overlap"):
        program.run(6, 3, False, 1, [], [given, over], *arrays)
