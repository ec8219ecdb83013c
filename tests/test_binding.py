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
INPUTS = "input h0 c0 weights batch_sizes lengths reset".split()
SAVED = "hidden cell saved d_output d_hidden d_cell d_h_n d_c_n".split()
RESULTS = "output h_n c_n hidden cell saved".split()
GRADIENTS = "d_input d_h0 d_c0".split()

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
    out, rows, two = proj_size or H, GATES[cell] * H, cell == "LSTM"
    weights = []
    for layer in range(L):
        for _ in range(D):
            weights += [random(rows, D * out if layer else I), random(rows, out)]
            weights += [random(rows), random(rows)] if bias else []
            weights += [random(proj_size, H)] if proj_size else []
    data = (N,) if packed else (T, B)
    return {
        "input": random(*data, I),
        "h0": random(L * D, B, out),
        "c0": random(L * D, B, H) if two else None,
        "weights": weights,
        "batch_sizes": np.array([3, 3, 2, 1]) if packed else None,
        "lengths": None if packed else np.array([4, 0, 2]),
        "reset": None if packed else np.eye(T, B, dtype=bool),
    }


def backward_arguments(cell: str = "LSTM", **changes: Any) -> Arguments:
    """Arguments that fit, from a forward pass that has run."""
    given = forward_arguments(cell, **changes)
    given |= run_forward(given, options(cell, proj_size=changes.get("proj_size", 0)))
    two = cell == "LSTM"
    ones = {name: np.ones_like(given[name]) for name in ("output", "hidden", "h_n")}
    return given | {
        "d_output": ones["output"],
        "d_hidden": ones["hidden"],
        "d_cell": np.ones_like(given["cell"]) if two else None,
        "d_h_n": ones["h_n"],
        "d_c_n": np.ones_like(given["c_n"]) if two else None,
        "needs": (True,) * (3 + len(given["weights"])),
    }


def arrays(found: Any) -> list[Any]:
    return [x if x is None else x.numpy() for x in found]


def run_forward(
    given: Arguments, o: _C.Options | None = None, threads: int = 0, **flags: bool
) -> Arguments:
    call = _C.Call(o or options(), *(given[name] for name in INPUTS), threads=threads)
    results = call.forward(**{"states": True, "save": True, "zeros": True, **flags})
    return dict(zip(RESULTS, arrays(results), strict=True))


def run_backward(given: Arguments, o: _C.Options | None = None, threads: int = 0) -> Arguments:
    names = (*INPUTS, *SAVED, "needs")
    found = arrays(_C.backward(o or options(), *(given[n] for n in names), threads=threads))
    return {**dict(zip(GRADIENTS, found, strict=False)), "d_weights": found[len(GRADIENTS) :]}


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
def test_every_result_is_returned_and_written(cell: str, packed: bool, bias: bool) -> None:
    given = backward_arguments(cell, packed=packed, bias=bias)
    found = run_backward(given, options(cell))
    for name in ("output", "hidden", "h_n", "saved"):
        assert np.any(given[name] != 0), name
    for name in ("d_input", "d_h0"):
        assert np.any(found[name] != 0), name
    for gradient in found["d_weights"]:
        assert np.any(gradient != 0)


def test_only_what_is_asked_for_is_returned() -> None:
    given = forward_arguments()
    found = run_forward(given, states=False, save=False)
    assert [name for name in RESULTS if found[name] is not None] == ["output", "h_n", "c_n"]
    found = run_forward(given, states=True, save=False)
    assert found["saved"] is None
    assert found["hidden"] is not None
    found = run_forward(given, states=False, save=True)
    assert all(found[name] is not None for name in RESULTS)


def test_projection_is_accepted() -> None:
    found = run_backward(backward_arguments(proj_size=2), options(proj_size=2))
    assert all(np.any(gradient != 0) for gradient in found["d_weights"])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_inputs_of_any_strides_and_read_only(packed: bool) -> None:
    plain = backward_arguments(packed=packed)
    reads = "input h0 c0 reset d_output d_hidden d_cell d_h_n d_c_n".split()
    strided = dict(plain)
    for name in reads:
        if strided[name] is not None:
            strided[name] = read_only(spread(strided[name]))
    strided["weights"] = tuple(read_only(spread(w)) for w in strided["weights"])
    one, two = ({**run_forward(given), **run_backward(given)} for given in (plain, strided))
    for name in ("hidden", "h_n", "c_n", "cell", "d_input", "d_h0", "d_c0", "d_weights"):
        np.testing.assert_array_equal(
            np.concatenate([np.ravel(a) for a in one[name]]),
            np.concatenate([np.ravel(a) for a in two[name]]),
            err_msg=name,
        )


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_torch_arrays_give_what_numpy_arrays_give(fast: bool) -> None:
    torch = pytest.importorskip("torch")
    given = backward_arguments()
    expected = run_backward(given)
    mirrored: Arguments = {
        name: [torch.from_numpy(w.copy()) for w in value]
        if isinstance(value, list)
        else torch.from_numpy(value.copy())
        if isinstance(value, np.ndarray)
        else value
        for name, value in given.items()
    }
    mirrored["weights"] = [w.requires_grad_() for w in mirrored["weights"]]
    before = _C._set_fast_dlpack(fast)
    try:
        outputs, found = run_forward(mirrored), run_backward(mirrored)
    finally:
        _C._set_fast_dlpack(before)
    for name in ("hidden", "h_n", "c_n"):
        np.testing.assert_array_equal(outputs[name], given[name], err_msg=name)
    for name in ("d_input", "d_h0", "d_c0", "d_weights"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_own_tensors_and_names_instead_of_positions() -> None:
    given = forward_arguments()
    ours: Arguments = {
        k: _C.from_dlpack(v) if isinstance(v, np.ndarray) else v for k, v in given.items()
    }
    output = _C.Call(options=options(), threads=1, **ours).forward()[0]
    np.testing.assert_array_equal(output.numpy(), run_forward(given)["output"])


def test_gradients_that_are_not_needed_are_left_out() -> None:
    given = backward_arguments()
    expected = run_backward(given)["d_weights"][5]
    needs = tuple(i == 3 + 5 for i in range(len(given["needs"])))
    found = run_backward(given | {"needs": needs})
    np.testing.assert_array_equal(found["d_weights"][5], expected)
    assert sum(d is not None for d in found["d_weights"]) == 1
    assert all(found[name] is None for name in GRADIENTS)
    assert set(run_backward(given | {"needs": (False,) * len(needs)})["d_weights"]) == {None}


def test_an_empty_batch() -> None:
    given = forward_arguments()
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            axis = {"lengths": 0}.get(name, value.ndim - 1 if name == "reset" else value.ndim - 2)
            given[name] = np.take(value, [], axis)
    assert run_forward(given)["h_n"].shape == (L * D, 0, H)


# ---- what does not fit: each argument, by name --------------------------------------------------

ARRAYS = [n for n in (*INPUTS, *SAVED) if n not in ("weights", "batch_sizes", "lengths")]


def refused(given: Arguments, error: type[Exception], message: str, threads: int = 0) -> None:
    run = run_backward if "needs" in given else run_forward
    with pytest.raises(error, match=message):
        run(given, threads=threads)


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
    bad = np.zeros_like(fitting[name], np.int32)
    refused(fitting | {name: bad}, TypeError, rf"^{name}: expected dtype .*, got int32")


@pytest.mark.parametrize("name", ARRAYS)
def test_no_arrays(fitting: Arguments, name: str) -> None:
    refused(fitting | {name: "text"}, TypeError, rf"^{name}: expected an array .*, got str")


@pytest.mark.parametrize("name", ["hidden", "cell", "saved"])
def test_what_forward_saved_must_be_contiguous(fitting: Arguments, name: str) -> None:
    bad = fitting | {name: spread(fitting[name])}
    refused(bad, ValueError, rf"^{name}: expected a contiguous array, got .*stride")
    refused(fitting | {name: None}, TypeError, rf"^{name}: .*, got NoneType")


def test_saved_values_that_are_consumed_must_be_writable(fitting: Arguments) -> None:
    names = (*INPUTS, *SAVED, "needs")
    given = fitting | {"saved": read_only(fitting["saved"])}
    run_backward(given)
    with pytest.raises(ValueError, match=r"^saved: expected an array to write to, got a read"):
        _C.backward(options(), *(given[n] for n in names), consume_saved=True)


def test_input_must_be_given() -> None:
    refused(forward_arguments() | {"input": None}, TypeError, r"^input: .*, got NoneType")


@pytest.mark.parametrize("name", ["c0", "cell", "d_cell", "d_c_n"])
def test_cells_of_one_state_take_no_c(name: str) -> None:
    bad = backward_arguments("GRU") | {name: random(L * D, B, H)}
    with pytest.raises(ValueError, match=rf"^{name}: expected None for the GRU cell"):
        run_backward(bad, options("GRU"))


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
    given = forward_arguments()
    label, good = rf"^weights\[{index}\] \({name}", given["weights"][index]

    def bad(array: Any) -> Arguments:
        entries = list(given["weights"])
        entries[index] = array
        return given | {"weights": entries}

    refused(bad(good[..., :-1]), ValueError, label + r".*: expected shape .*, got shape")
    refused(bad(good.astype(np.float64)), TypeError, label + ".*float32, got float64")
    refused(bad(None), TypeError, label + ".*got NoneType")


def test_the_rows_of_the_recurrent_weights_are_whole_gates() -> None:
    given = forward_arguments()
    given["weights"][1] = random(4 * H + 1, H)
    refused(given, ValueError, r"^weights\[1\] \(weight_hh_l0\): expected rows for 4 gates, got 25")
    given["weights"][1] = random(0, H)
    refused(given, ValueError, r"^weights\[1\] \(weight_hh_l0\): .*got 0 rows")


def test_needs_say_of_each_argument_whether_its_gradient_is_wanted(fitting: Arguments) -> None:
    bad = fitting | {"needs": fitting["needs"][:-1]}
    refused(bad, ValueError, "^needs: expected 19 values, got 18")


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
        "gate_activation='sigmoid', reset_after=False, heads=1, recompute=False, int8=False)"
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


def test_build_information_is_complete() -> None:
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
        if x is None or name in ("batch_sizes", "needs"):
            return x
        if isinstance(x, list):
            return [widen(name, w) for w in x]
        wide = np.broadcast_to(x, (MEMBERS, *x.shape))
        return wide if name in shared else wide.copy()

    return {name: widen(name, x) for name, x in given.items()}


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shared", [(), ("input", "weights", "h0", "saved", "hidden")])
def test_members_give_what_each_gives(cell: str, packed: bool, shared: tuple[str, ...]) -> None:
    one = backward_arguments(cell, packed=packed)
    expected = run_backward(one, options(cell))
    given = of_members(one, shared)
    inputs = [given[name] for name in INPUTS]
    results = arrays(_C.forward_members(options(cell), MEMBERS, *inputs, None, True, True, 0, True))
    for name, result in zip(RESULTS, results, strict=True):
        assert one[name] is None or all(np.array_equal(part, one[name]) for part in result)
    saved = [given[name] for name in SAVED]
    found = arrays(_C.backward_members(options(cell), MEMBERS, *inputs, *saved, given["needs"]))
    wanted = [*(expected[name] for name in GRADIENTS), *expected["d_weights"]]
    for d, one_d in zip(found, wanted, strict=True):
        assert one_d is None or all(np.array_equal(part, one_d) for part in d)


def test_members_that_do_not_fit_are_refused_by_name() -> None:
    given = of_members(forward_arguments())

    def refused(message: str, members: int = MEMBERS, **changes: Any) -> None:
        inputs = [{**given, **changes}[name] for name in INPUTS]
        with pytest.raises(ValueError, match=message):
            _C.forward_members(options(), members, *inputs, None, True, True)

    refused(r"members: expected 1 or more, got 0", members=0)
    refused(r"input: expected a leading axis of 2 members, got shape \(3, ", members=2)
    refused(r"h0: expected a leading axis of 3 members", h0=given["h0"][:2])
    refused(r"lengths: expected values from 0 to .* got 9", lengths=np.full((MEMBERS, B), 9))
    refused(r"reset: expected shape", reset=given["reset"][:, :, :1])
    weights = [w[:2] if k == 2 else w for k, w in enumerate(given["weights"])]
    refused(r"weights\[2\] \(bias_ih_l0\): expected a leading axis of 3 members", weights=weights)
