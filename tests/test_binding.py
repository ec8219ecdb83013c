"""`_C.forward` and `_C.backward`: what does not fit is refused by name."""

from __future__ import annotations

import gc
import re
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastrnn import _C

T, B, I, H, L, D = 4, 3, 5, 6, 2, 2  # noqa: E741
N = 9  # rows of the packed data
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
FORWARD = (
    "input h0 c0 weights batch_sizes lengths reset hidden h_n c_n cell gates all_layers"
).split()
BACKWARD = (
    "input h0 c0 weights batch_sizes lengths reset hidden cell gates "
    "d_output d_hidden d_cell d_h_n d_c_n d_input d_h0 d_c0 d_weights"
).split()

Arguments = dict[str, Any]


def options(cell: str = "LSTM", **changes: Any) -> _C.Options:
    return _C.Options(cell=cell, **{"num_layers": L, "bidirectional": D == 2, **changes})


def random(*shape: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = np.random.default_rng(len(shape)).standard_normal(shape) / 2
    return values.astype(dtype)


def forward_arguments(
    cell: str = "LSTM", *, packed: bool = False, proj_size: int = 0, bias: bool = True
) -> Arguments:
    """Arguments that fit: every one given that can be."""
    o = options(cell, proj_size=proj_size)
    out, rows, two = proj_size or H, GATES[cell] * H, cell == "LSTM"
    weights = []
    for layer in range(L):
        for _ in range(D):
            weights += [random(rows, D * out if layer else I), random(rows, out)]
            weights += [random(rows), random(rows)] if bias else []
            weights += [random(proj_size, H)] if proj_size else []
    data = (N,) if packed else (T, B)
    count = N if packed else T * B
    planes = o.saved_planes * -(-H // 16) * 16
    return {
        "input": random(*data, I),
        "h0": random(L * D, B, out),
        "c0": random(L * D, B, H) if two else None,
        "weights": weights,
        "batch_sizes": np.array([3, 3, 2, 1]) if packed else None,
        "lengths": None if packed else np.array([4, 0, 2]),
        "reset": None if packed else np.eye(T, B, dtype=bool),
        "hidden": np.zeros((L, *data, D * out), np.float32),
        "h_n": np.zeros((L * D, B, out), np.float32),
        "c_n": np.zeros((L * D, B, H), np.float32) if two else None,
        "cell": np.zeros((L, *data, D * H), np.float32) if two else None,
        "gates": np.zeros((L * D, count, planes), np.float32),
        "all_layers": True,
    }


def backward_arguments(cell: str = "LSTM", **changes: Any) -> Arguments:
    """Arguments that fit, from a forward pass that has run."""
    given = forward_arguments(cell, **changes)
    run_forward(given, options(cell, proj_size=changes.get("proj_size", 0)))
    two = cell == "LSTM"
    del given["all_layers"]
    return given | {
        "d_output": np.ones_like(given["hidden"][-1]),
        "d_hidden": np.ones_like(given["hidden"]),
        "d_cell": np.ones_like(given["cell"]) if two else None,
        "d_h_n": np.ones_like(given["h_n"]),
        "d_c_n": np.ones_like(given["c_n"]) if two else None,
        "d_input": np.zeros_like(given["input"]),
        "d_h0": np.zeros_like(given["h0"]),
        "d_c0": np.zeros_like(given["c0"]) if two else None,
        "d_weights": [np.zeros_like(w) for w in given["weights"]],
    }


def run_forward(given: Arguments, o: _C.Options | None = None, **more: Any) -> None:
    _C.forward(o or options(), *(given[name] for name in FORWARD), **more)


def run_backward(given: Arguments, o: _C.Options | None = None, **more: Any) -> None:
    _C.backward(o or options(), *(given[name] for name in BACKWARD), **more)


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view: npt.NDArray[Any] = array.view()
    view.flags.writeable = False
    return view


def spread(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same values with strides of their own."""
    wide = np.zeros([2 * n for n in array.shape], array.dtype)
    view: npt.NDArray[Any] = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


# ---- what fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bias", [True, False])
def test_everything_given_is_accepted_and_written(cell: str, packed: bool, bias: bool) -> None:
    given = backward_arguments(cell, packed=packed, bias=bias)
    run_backward(given, options(cell))
    for name in ("hidden", "h_n", "gates", "d_input", "d_h0"):
        assert np.any(given[name] != 0), name
    for gradient in given["d_weights"]:
        assert np.any(gradient != 0)


def test_projection_is_accepted() -> None:
    given = backward_arguments(proj_size=2)
    run_backward(given, options(proj_size=2))
    assert all(np.any(gradient != 0) for gradient in given["d_weights"])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_inputs_of_any_strides_and_read_only(packed: bool) -> None:
    plain, strided = backward_arguments(packed=packed), backward_arguments(packed=packed)
    reads = "input h0 c0 reset d_output d_hidden d_cell d_h_n d_c_n".split()
    for name in reads:
        if strided[name] is not None:
            strided[name] = read_only(spread(strided[name]))
    strided["weights"] = tuple(read_only(spread(w)) for w in strided["weights"])
    for given in (plain, strided):
        run_forward(given | {"all_layers": True})
        run_backward(given)
    for name in ("hidden", "h_n", "c_n", "cell", "d_input", "d_h0", "d_c0", "d_weights"):
        np.testing.assert_array_equal(
            np.concatenate([np.ravel(a) for a in plain[name]]),
            np.concatenate([np.ravel(a) for a in strided[name]]),
            err_msg=name,
        )


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_torch_arrays_give_what_numpy_arrays_give(fast: bool) -> None:
    torch = pytest.importorskip("torch")
    given = backward_arguments()
    run_backward(given)
    mirrored: Arguments = {
        name: [torch.from_numpy(w.copy()) for w in value]
        if isinstance(value, list)
        else value
        if value is None
        else torch.from_numpy(value.copy())
        for name, value in backward_arguments().items()
    }
    mirrored["weights"] = [w.requires_grad_() for w in mirrored["weights"]]
    before = _C._set_fast_dlpack(fast)
    try:
        run_forward(mirrored | {"all_layers": True})
        run_backward(mirrored)
    finally:
        _C._set_fast_dlpack(before)
    for name in ("hidden", "h_n", "c_n", "gates", "d_input", "d_h0", "d_c0"):
        np.testing.assert_array_equal(mirrored[name].numpy(), given[name], err_msg=name)
    for ours, theirs in zip(mirrored["d_weights"], given["d_weights"], strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_own_tensors_and_names_instead_of_positions() -> None:
    given = forward_arguments()
    expected = given["hidden"]
    run_forward(given)
    ours: Arguments = {
        k: _C.from_dlpack(v) if isinstance(v, np.ndarray) else v for k, v in given.items()
    }
    ours["hidden"] = _C.empty(expected.shape, "float32")
    _C.forward(options=options(), threads=1, workspace=None, **ours)
    np.testing.assert_array_equal(ours["hidden"].numpy(), expected)


def test_gradients_that_nobody_wants_are_left_out() -> None:
    given = backward_arguments()
    run_backward(given)
    expected = given["d_weights"][5].copy()
    alone: list[npt.NDArray[Any] | None] = [None] * len(given["weights"])
    alone[5] = np.zeros_like(expected)
    unwanted = dict.fromkeys(["d_input", "d_h0", "d_c0"])
    run_backward(given | unwanted | {"d_weights": alone})
    np.testing.assert_array_equal(alone[5], expected)
    run_backward(given | unwanted | {"d_weights": None})


def test_an_empty_batch() -> None:
    given = forward_arguments()
    for name, value in given.items():
        if isinstance(value, np.ndarray) and name != "gates":
            axis = {"lengths": 0}.get(name, value.ndim - 1 if name == "reset" else value.ndim - 2)
            given[name] = np.take(value, [], axis)
    given["gates"] = given["gates"][:, :0]
    run_forward(given)
    assert given["h_n"].shape == (L * D, 0, H)


def test_a_workspace_of_the_callers() -> None:
    expected, given = forward_arguments(), forward_arguments()
    run_forward(expected)
    run_forward(given, workspace=_C.empty((1 << 24,), "uint8"))
    np.testing.assert_array_equal(given["hidden"], expected["hidden"])
    with pytest.raises(ValueError, match=r"workspace: expected \d+ bytes, 64-byte aligned, got 1 "):
        run_forward(given, workspace=_C.empty((1,), "uint8"))


# ---- what does not fit: each argument, by name --------------------------------------------------

WRITTEN = {"hidden", "h_n", "c_n", "cell", "gates"}
GRADIENTS_OUT = {"d_input", "d_h0", "d_c0"}
ARRAYS = [
    name for name in BACKWARD if name not in ("weights", "d_weights", "batch_sizes", "lengths")
]


def refused(given: Arguments, error: type[Exception], message: str, **more: Any) -> None:
    run = run_forward if "all_layers" in given else run_backward
    with pytest.raises(error, match=message):
        run(given, **more)


@pytest.fixture(scope="module")
def fitting() -> Arguments:
    return backward_arguments()


@pytest.mark.parametrize("name", ARRAYS)
def test_wrong_shapes(fitting: Arguments, name: str) -> None:
    array = fitting[name]
    for bad in (array[..., :-1].copy(), array[None].copy(), array.reshape(-1)):
        if name == "input" and bad.ndim == array.ndim:
            continue  # another I: the weights then do not fit
        said = re.escape(str(bad.shape))
        refused(fitting | {name: bad}, ValueError, rf"^{name}: expected .*, got shape {said}")


@pytest.mark.parametrize("name", ARRAYS)
def test_wrong_dtypes(fitting: Arguments, name: str) -> None:
    bad = fitting[name].astype(np.int32)
    refused(fitting | {name: bad}, TypeError, rf"^{name}: expected dtype .*, got int32")


@pytest.mark.parametrize("name", ARRAYS)
def test_no_arrays(fitting: Arguments, name: str) -> None:
    refused(fitting | {name: "text"}, TypeError, rf"^{name}: expected an array .*, got str")


@pytest.mark.parametrize("name", sorted(WRITTEN | GRADIENTS_OUT))
def test_outputs_must_be_contiguous_and_writable(fitting: Arguments, name: str) -> None:
    given = fitting
    if name in WRITTEN:
        given = {k: fitting[k] for k in FORWARD[:-1]} | {"all_layers": True}
    bad = spread(given[name])
    refused(given | {name: bad}, ValueError, rf"^{name}: expected a contiguous array, got .*stride")
    bad = read_only(given[name])
    refused(given | {name: bad}, ValueError, rf"^{name}: expected an array to write to, got a read")


@pytest.mark.parametrize("name", ["input", "hidden", "h_n", "c_n"])
def test_what_must_be_given(name: str) -> None:
    refused(forward_arguments() | {name: None}, TypeError, rf"^{name}: .*, got NoneType")


def test_backward_needs_what_forward_saved(fitting: Arguments) -> None:
    refused(fitting | {"gates": None}, ValueError, "^gates: expected those that forward saved")
    refused(fitting | {"cell": None}, ValueError, "^cell: expected an array with gates, got None")
    given = forward_arguments()
    given |= {"hidden": given["hidden"][-1:], "all_layers": False}
    refused(given, ValueError, "^all_layers: expected True with gates, got False")


@pytest.mark.parametrize("name", ["c0", "c_n", "cell", "d_cell", "d_c_n", "d_c0"])
def test_cells_of_one_state_take_no_c(name: str) -> None:
    forward = name == "c_n"
    given = forward_arguments("GRU") if forward else backward_arguments("GRU")
    bad = given | {name: random(L * D, B, H)}
    with pytest.raises(ValueError, match=rf"^{name}: expected None for the GRU cell"):
        (run_forward if forward else run_backward)(bad, options("GRU"))


def test_misaligned_memory_is_refused() -> None:
    given = forward_arguments()
    shifted = np.zeros(given["input"].nbytes + 1, np.uint8)[1:].view(np.float32)
    given["input"] = shifted.reshape(given["input"].shape)
    refused(given, ValueError, "^input: expected elements aligned to their size")


def test_input_must_have_steps_and_a_dtype_of_floats() -> None:
    given = forward_arguments()
    refused(given | {"input": given["input"][:0]}, ValueError, "^input: expected at least one step")
    refused(given | {"input": random(T, B, I) > 0}, TypeError, "^input: .*float16, got bool")


# ---- weights ------------------------------------------------------------------------------------


def test_the_list_of_weights() -> None:
    given = forward_arguments()
    refused(given | {"weights": 3}, TypeError, "^weights: expected a list of arrays, got int")
    message = "^weights: expected 16 arrays, or 8 without biases, got 15"
    refused(given | {"weights": given["weights"][:-1]}, ValueError, message)
    refused(given | {"weights": []}, ValueError, "^weights: expected 16 arrays.* got 0")


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "weight_ih_l0"), (5, "weight_hh_l0_reverse"), (10, "bias_ih_l1"), (15, "bias_hh_l1_rev")],
)
def test_each_weight_is_named(index: int, name: str) -> None:
    for run in ("weights", "d_weights"):
        given = backward_arguments() if run == "d_weights" else forward_arguments()
        label = rf"^{run}\[{index}\] \({name}"
        good = given[run][index]

        def bad(array: Any, given: Arguments = given, run: str = run) -> Arguments:
            entries = list(given[run])
            entries[index] = array
            return given | {run: entries}

        refused(bad(good[..., :-1]), ValueError, label + r".*: expected shape .*, got shape")
        refused(bad(good.astype(np.float64)), TypeError, label + ".*float32, got float64")
        if run == "weights":
            refused(bad(None), TypeError, label + ".*got NoneType")
        else:
            refused(bad(read_only(good)), ValueError, label + ".*an array to write to")
            refused(bad(spread(good)), ValueError, label + ".*a contiguous array")


def test_the_rows_of_the_recurrent_weights_are_whole_gates() -> None:
    given = forward_arguments()
    given["weights"][1] = random(4 * H + 1, H)
    refused(given, ValueError, r"^weights\[1\] \(weight_hh_l0\): expected rows for 4 gates, got 25")
    given["weights"][1] = random(0, H)
    refused(given, ValueError, r"^weights\[1\] \(weight_hh_l0\): .*got 0 rows")


def test_as_many_gradients_as_weights(fitting: Arguments) -> None:
    bad = fitting | {"d_weights": fitting["d_weights"][:-1]}
    refused(bad, ValueError, "^d_weights: expected 16 arrays, as many as weights, got 15")


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3, 3, 2], "add up to the rows of input, 9, got others"),
        ([3, 3, 2, 2], "add up to the rows of input, 9, got others"),
        ([2, 3, 3, 1], "never increase, got 3 at step 1"),
        ([3, 3, 3, 0], "values of 1 or more that never increase, got 0 at step 3"),
        ([5, 5, -1], r"never increase, got -1 at step 2|add up"),
        ([2**62, 2**62, 9], "add up to the rows of input, 9, got others"),
        ([], "add up to the rows of input, 9, got none"),
    ],
)
def test_batch_sizes_that_cannot_be(values: list[int], message: str) -> None:
    given = forward_arguments(packed=True) | {"batch_sizes": np.array(values, np.int64)}
    refused(given, ValueError, f"^batch_sizes: expected .*({message})")


def test_batch_sizes_of_another_kind() -> None:
    given = forward_arguments(packed=True)
    sizes = given["batch_sizes"]
    refused(given | {"batch_sizes": sizes.astype(np.int32)}, TypeError, "^batch_sizes: .*int32")
    refused(given | {"batch_sizes": sizes[None]}, ValueError, "^batch_sizes: expected one axis")
    refused(given | {"batch_sizes": spread(sizes)}, ValueError, "^batch_sizes: .*contiguous")
    padded = forward_arguments()
    message = r"^input: expected two axes \(N, I\) with batch_sizes, got shape \(4, 3, 5\)"
    refused(padded | {"batch_sizes": sizes}, ValueError, message)
    message = r"^input: expected three axes \(T, B, I\), got shape \(9, 5\)"
    refused(given | {"batch_sizes": None}, ValueError, message)


@pytest.mark.parametrize("value", [-1, T + 1, 2**62])
def test_lengths_outside_of_the_steps(value: int) -> None:
    given = forward_arguments() | {"lengths": np.array([1, value, 2])}
    message = f"^lengths: expected values from 0 to the number of steps, 4, got {value} in row 1"
    refused(given, ValueError, message)


def test_lengths_and_resets_of_another_kind() -> None:
    given = forward_arguments()
    refused(given | {"lengths": np.ones(B)}, TypeError, "^lengths: expected dtype int64, got fl")
    refused(given | {"lengths": np.ones(B + 1, np.int64)}, ValueError, r"^lengths: .*\(3,\), got")
    refused(given | {"lengths": spread(given["lengths"])}, ValueError, "^lengths: .*contiguous")
    refused(given | {"reset": np.ones((T, B), np.uint8)}, TypeError, "^reset: expected dtype bool")
    packed = forward_arguments(packed=True)
    for name in ("lengths", "reset"):
        message = f"^{name}: expected None with batch_sizes"
        refused(packed | {name: given[name]}, ValueError, message)


# ---- options and the rest -----------------------------------------------------------------------


def test_options_tell_what_they_are() -> None:
    o = _C.Options(cell="GRU", num_layers=3, bidirectional=True, reset_after=False)
    assert (o.cell, o.num_layers, o.bidirectional, o.proj_size) == ("GRU", 3, True, 0)
    assert (o.activation, o.gate_activation, o.reset_after) == ("tanh", "sigmoid", False)
    assert (o.gates, o.states) == (3, 1)
    assert (options("LSTM").gates, options("LSTM").states) == (4, 2)
    assert (options("RNN").gates, options("RNN").states) == (1, 1)
    assert repr(o) == (
        "Options(cell='GRU', num_layers=3, bidirectional=True, proj_size=0, activation='tanh', "
        "gate_activation='sigmoid', reset_after=False, heads=1, recompute=False)"
    )
    with pytest.raises(AttributeError):
        o.cell = "LSTM"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": "SRU"}, "^cell: 'SRU'"),
        ({"num_layers": 0}, "^num_layers: expected 1 or more, got 0"),
        ({"proj_size": -1}, "^proj_size: expected 0 or more, got -1"),
        ({"activation": "gelu"}, "^activation: expected one of 'tanh', 'relu', .*, got 'gelu'"),
        (
            {"gate_activation": "tanh"},
            "^gate_activation: expected one of 'sigmoid', .*got 'tanh'",
        ),
        ({"heads": 0}, "^heads: expected 1 or more, got 0"),
        ({"heads": 2, "proj_size": 3}, "^heads: expected a divisor of proj_size, 3, got 2"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.Options(**{"cell": "LSTM", **changes})


def test_proj_size_beyond_the_hidden_size() -> None:
    given = forward_arguments(proj_size=H + 1)
    with pytest.raises(ValueError, match=r"^proj_size: expected at most the hidden size, 6, got 7"):
        run_forward(given, options(proj_size=H + 1))


def test_threads_below_zero() -> None:
    refused(forward_arguments(), ValueError, "^threads: expected 0 .* got -1", threads=-1)


def test_a_tensor_of_torch_without_memory_is_named() -> None:
    torch = pytest.importorskip("torch")
    given = forward_arguments() | {"h0": torch.empty(L * D, B, H, device="meta")}
    refused(given, TypeError, "^h0: the array cannot be read")


def test_the_build_tells_what_it_is() -> None:
    assert _C.isa() in _C.isas()
    assert "portable" in _C.isas()
    assert _C.max_threads() >= 1
    cuda = _C.cuda_info()
    if cuda is not None:
        assert re.fullmatch(r"\d+\.\d", cuda["build"])
        assert bool(cuda["devices"]) != bool(cuda["error"])
        assert cuda["cublaslt"]


# ---- nothing is left behind ---------------------------------------------------------------------


def test_every_array_is_let_go_after_the_call() -> None:
    given = forward_arguments()
    held = [value for value in given.values() if isinstance(value, np.ndarray)] + given["weights"]
    before = [sys.getrefcount(array) for array in held]
    for _ in range(3):
        run_forward(given)
        refused(given | {"reset": "text"}, TypeError, "^reset")
    gc.collect()
    assert [sys.getrefcount(array) for array in held] == before


# ---- ensembles ----------------------------------------------------------------------------------

MEMBERS = 3


def of_members(given: Arguments, shared: tuple[str, ...] = ()) -> Arguments:
    """The same arguments for each member, in memory of their own or shared."""

    def widen(name: str, x: Any) -> Any:
        if x is None or name in ("batch_sizes", "all_layers"):
            return x
        if isinstance(x, list):
            return [widen(name, w) for w in x]
        wide = np.broadcast_to(x, (MEMBERS, *x.shape))
        return wide if name in shared else wide.copy()

    return {name: widen(name, x) for name, x in given.items()}


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shared", [(), ("input", "weights", "h0", "gates", "hidden")])
def test_members_give_what_each_gives(cell: str, packed: bool, shared: tuple[str, ...]) -> None:
    one = backward_arguments(cell, packed=packed)
    run_backward(one, options(cell))
    read = tuple(name for name in shared if name not in ("gates", "hidden"))
    given = of_members(forward_arguments(cell, packed=packed), read)
    _C.forward_members(options(cell), MEMBERS, *(given[name] for name in FORWARD))
    for name in ("hidden", "h_n", "c_n", "cell", "gates"):
        assert one[name] is None or all(np.array_equal(part, one[name]) for part in given[name])
    given = of_members(backward_arguments(cell, packed=packed), shared)
    _C.backward_members(options(cell), MEMBERS, *(given[name] for name in BACKWARD))
    for name in ("d_input", "d_h0", "d_c0"):
        assert one[name] is None or all(np.array_equal(part, one[name]) for part in given[name])
    for d, expected in zip(given["d_weights"], one["d_weights"], strict=True):
        assert all(np.array_equal(part, expected) for part in d)


def test_members_that_do_not_fit_are_refused_by_name() -> None:
    given = of_members(forward_arguments())

    def refused(message: str, members: int = MEMBERS, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            _C.forward_members(
                options(), members, *({**given, **changes}[name] for name in FORWARD)
            )

    refused(r"members: expected 1 or more, got 0", members=0)
    refused(r"input: expected a leading axis of 2 members, got shape \(3, ", members=2)
    refused(r"h0: expected a leading axis of 3 members", h0=given["h0"][:2])
    refused(r"lengths: expected values from 0 to .* got 9", lengths=np.full((MEMBERS, B), 9))
    refused(r"reset: expected shape", reset=given["reset"][:, :, :1])
    weights = [w[:2] if k == 2 else w for k, w in enumerate(given["weights"])]
    refused(r"weights\[2\] \(bias_ih_l0\): expected a leading axis of 3 members", weights=weights)
    refused(r"hidden: expected an array to write to", hidden=read_only(given["hidden"]))


def reset_states_of_members(cell: str) -> tuple[npt.NDArray[Any] | None, ...]:
    """Those of each member."""
    anew = np.random.default_rng(7).standard_normal((2, MEMBERS, L * D, H)).astype(np.float32)
    return anew[0], anew[1] if cell == "LSTM" else None


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_members_have_reset_states_of_their_own(cell: str) -> None:
    anew = reset_states_of_members(cell)
    given = forward_arguments(cell)
    given["reset"] = np.ones((T, B), np.bool_)
    together = of_members(given)
    _C.forward_members(options(cell), MEMBERS, *(together[name] for name in FORWARD), reset_hx=anew)
    for k in range(MEMBERS):
        one = forward_arguments(cell) | {"reset": given["reset"]}
        run_forward(one, options(cell), reset_hx=tuple(x if x is None else x[k] for x in anew))
        for name in ("hidden", "h_n", "c_n"):
            assert one[name] is None or np.array_equal(together[name][k], one[name])
    assert not np.array_equal(together["hidden"][0], together["hidden"][1])


def test_reset_states_of_members_that_do_not_fit_are_refused_by_name() -> None:
    given = of_members(forward_arguments())
    fitting = reset_states_of_members("LSTM")
    for index, name in enumerate(("reset_h", "reset_c")):
        anew = [x[:2] if k == index else x for k, x in enumerate(fitting) if x is not None]
        with pytest.raises(ValueError, match=rf"^{name}: expected a leading axis of 3 members"):
            _C.forward_members(
                options(), MEMBERS, *(given[name] for name in FORWARD), reset_hx=anew
            )


def test_heads_in_host_memory_are_left_to_programs() -> None:
    given = forward_arguments()
    given["weights"] = [
        np.zeros((2, w.shape[0] // 2, w.shape[1] // 2), np.float32) if k % 4 == 1 else w
        for k, w in enumerate(given["weights"])
    ]
    with pytest.raises(ValueError, match=r"^heads: expected 1 in host memory, .*, got 2"):
        run_forward(given, options(heads=2))
