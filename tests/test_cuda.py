"""The CUDA kernels: the reference's numbers, and everything that torch may ask of a tensor there.

All of it needs a GPU and a build with CUDA, and is skipped elsewhere with the reason. What can be
known without one, the kernels' arithmetic, is tested by `make test-cuda` on the CPU.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import fastrnn
from cases import LAYOUTS, STACKS
from engine import DTYPES, EngineCall, assert_solutions_bitwise, check_against_reference, rounded
from fastrnn import _C, _engine
from fastrnn._engine import engine_options
from fastrnn._options import Options
from fastrnn.calls import operators
from fastrnn.calls.call import recurrent
from pairs import Outcome, outcome, pair
from problems import random_problem
from stacks import Arguments, as_function, make, moved, replayed
from tolerances import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL_STACKS = {**STACKS, "gru-heads-2": Options("GRU", num_layers=2, heads=3)}
every_stack = pytest.mark.parametrize("options", ALL_STACKS.values(), ids=ALL_STACKS.keys())
every_step = pytest.mark.parametrize("steps", LAYOUTS)
CELLS = (
    ("RNN", 0, True),
    ("LSTM", 0, True),
    ("LSTM", 7, True),
    ("GRU", 0, True),
    ("GRU", 0, False),
)


ROUTES = {"steps": "1", "persistent": "persistent"}  # what the environment says of each


def persistent_kernel(cell: str, hidden_size: int, dtype: str = "float32") -> tuple[bool, str]:
    """Whether forward of a small case has one on the current device, and which or why not."""
    options = engine_options(Options(cell))  # type: ignore[arg-type]
    device = torch.cuda.current_device()
    found = _C.cuda_kernels(options, dtype, 5, 4, 8, hidden_size, False, False, device)
    return found or (False, "this build of fastrnn has no CUDA kernels")


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    """A launch for each step, or one for each sequence where there is a kernel for it."""
    return str(request.param)


@pytest.fixture
def gpu(cuda: torch.device, route: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A CUDA device whose tensors take the kernels, with IEEE products; or a skip."""
    if not _engine.built_with_cuda():
        pytest.skip("this build of fastrnn has no CUDA kernels")
    why = persistent_kernel("RNN", 8)[1]
    if route == "persistent" and "FASTRNN_CUDA_PERSISTENT" in why:
        pytest.skip(why)
    monkeypatch.setenv(_engine.CUDA_SWITCH, ROUTES[route])
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.allow_tf32 = allowed


def run(case: Arguments, **extra: Any) -> list[Tensor]:
    output, hx_n, states = recurrent(
        case.options, case.input, case.hx, case.weights, **case.steps, **extra
    )
    return [output, *hx_n, *(s for s in states or () if s is not None)]


def gradients(case: Arguments, values: list[Tensor], **extra: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(y.pow(2).sum() for y in values), case.leaves, **extra)


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cell", "proj_size", "reset_after"), CELLS)
def test_matches_the_reference(
    gpu: torch.device,
    cell: Any,
    proj_size: int,
    reset_after: bool,
    dtype: str,
    layers: int,
    bidirectional: bool,
    layout: str,
) -> None:
    options = Options(cell, layers, bidirectional, proj_size=proj_size, reset_after=reset_after)
    problem = random_problem(options, layout=layout, d_states=True)
    check_against_reference(problem, dtype, device=gpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), (2, 33, 65, 31), (4, 70, 24, 100), (2, 9, 5, 530)])
@pytest.mark.parametrize(("cell", "proj_size", "reset_after"), CELLS)
def test_any_size_matches_the_reference(
    gpu: torch.device,
    cell: Any,
    proj_size: int,
    reset_after: bool,
    sizes: tuple[int, ...],
    dtype: str,
) -> None:
    T, B, input_size, hidden_size = sizes
    proj_size = min(proj_size, hidden_size - 1)
    options = Options(cell, 2, True, proj_size=proj_size, reset_after=reset_after)
    problem = random_problem(
        options, T=T, B=B, input_size=input_size, hidden_size=hidden_size, layout="lengths"
    )
    looser = max(1.0, (hidden_size / 64) ** 0.5)  # an error grows as the root of a sum's length
    check_against_reference(problem, dtype, device=gpu, looser=looser)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "B"), [(3, 5), (3, 70), (24, 5)])
@pytest.mark.parametrize(("cell", "proj_size", "reset_after"), CELLS)
def test_heads_match_the_reference(
    gpu: torch.device,
    cell: Any,
    proj_size: int,
    reset_after: bool,
    heads: int,
    B: int,
    dtype: str,
    layout: str,
) -> None:
    proj_size = 12 if proj_size and heads == 3 else 0
    options = Options(cell, 2, True, proj_size=proj_size, reset_after=reset_after, heads=heads)
    problem = random_problem(options, B=B, hidden_size=24, layout=layout, d_states=True)
    check_against_reference(problem, dtype, device=gpu)


def test_matches_the_reference_without_a_library(gpu: torch.device, route: str) -> None:
    """The engine's own matrix product, in a process that is told to look for no other."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", f"(matches_the_reference and not library) and {route}"],
        env={**os.environ, "FASTRNN_CUBLASLT": "none"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_cublaslt_is_found_beside_torch(gpu: torch.device) -> None:
    known = _C.cuda_info()
    assert known is not None
    assert "libcublasLt" in known["cublaslt"]


def worst(actual: Outcome, truth: Outcome) -> float:
    """The largest error of any array: its root mean square, as a share of the array's."""
    pairs = [*zip(actual.outputs, truth.outputs, strict=True)]
    pairs += zip(actual.d_inputs, truth.d_inputs, strict=True)
    pairs += [(actual.d_weights[name], d) for name, d in truth.d_weights.items()]
    return max(float((a.double().cpu() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_are_no_larger_than_cudnns(gpu: torch.device, cell: str, dtype: torch.dtype) -> None:
    """Beside float64 on the CPU; within a factor of two, as both are noise."""
    theirs, ours = pair(cell, 96, 256, num_layers=2, bidirectional=True)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    x = torch.randn(50, 32, 96).to(dtype)
    truth = outcome(copy.deepcopy(ours).double(), x.double())
    mine, other = outcome(ours.to(gpu), x.to(gpu)), outcome(theirs.to(gpu), x.to(gpu))
    assert worst(mine, truth) <= 2 * worst(other, truth) + torch.finfo(dtype).eps


def test_tf32_is_used_where_torch_allows_it(gpu: torch.device) -> None:
    """Coarser than IEEE, and off by no more than TF32's 2⁻¹¹."""
    if torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("this GPU has no TF32")
    layer = fastrnn.LSTM(512, 512, device=gpu)
    x = torch.randn(20, 128, 512, device=gpu)
    with torch.no_grad():
        exact = layer(x)[0]
        torch.backends.cudnn.allow_tf32 = True
        coarse = layer(x)[0]
    error = (exact - coarse).abs().max().item()
    assert 0 < error < 4e-3


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_hundred_thousand_steps(gpu: torch.device, cell: str) -> None:
    """cuDNN gives up from 65,536 on."""
    options = Options(cell)  # type: ignore[arg-type]
    case = make(options, dtype=torch.float32, sizes=(100_000, 2, 3, 8))
    # Small weights: large ones would make the recurrence chaotic, and any rounding grow.
    case = case._replace(weights=[w.detach().mul(0.3).requires_grad_() for w in case.weights])
    expected = run(case)
    device_case = moved(case, gpu)
    actual = run(device_case)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a.detach().cpu(), b.detach(), "float32", "d_input")
    for d in gradients(device_case, actual):
        assert bool(d.isfinite().all())


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 80])
def test_two_runs_give_the_same_bits(gpu: torch.device, dtype: str, rows: int, cell: Any) -> None:
    problem = random_problem(
        Options(cell, 2, True), T=20, B=rows, input_size=40, hidden_size=96, layout="lengths"
    )
    problem = rounded(problem, dtype)

    def solve() -> Any:
        call = EngineCall(problem, dtype, device=gpu)
        call.forward()
        call.backward()
        return call.solution()

    first = solve()
    for _ in range(3):
        assert_solutions_bitwise(solve(), first)


@pytest.mark.parametrize("rows", [9, 80])
def test_rows_do_not_influence_one_anothers_bits(gpu: torch.device, rows: int, cell: str) -> None:
    layer = getattr(fastrnn, cell)(24, 64, bidirectional=True, device=gpu)
    x = torch.randn(12, rows, 24, device=gpu)
    other = x.clone()
    other[:, 4] = float("nan")
    keep = [i for i in range(rows) if i != 4]
    with torch.no_grad():
        assert torch.equal(layer(x)[0][:, keep], layer(other)[0][:, keep])


# ---- autograd, compile, autocast -----------------------------------------------------------------


@every_stack
@every_step
def test_equals_the_cpu(gpu: torch.device, options: Options, steps: str) -> None:
    case = make(options, steps)
    device_case = moved(case, gpu)
    expected, actual = run(case, return_states=True), run(device_case, return_states=True)
    torch.testing.assert_close([y.cpu() for y in actual], expected, rtol=1e-12, atol=1e-12)
    mine = [d.cpu() for d in gradients(device_case, actual)]
    torch.testing.assert_close(mine, list(gradients(case, expected)), rtol=1e-11, atol=1e-11)


@every_stack
def test_gradcheck_and_gradgradcheck(gpu: torch.device, options: Options) -> None:
    case = moved(make(options, "lengths-reset", sizes=(3, 2, 2, 3)), gpu)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(case.with_leaves(*leaves)))

    assert torch.autograd.gradcheck(call, case.leaves)
    assert torch.autograd.gradgradcheck(call, case.leaves)


@every_stack
@every_step
def test_compiled_equals_eager(gpu: torch.device, options: Options, steps: str) -> None:
    case = moved(make(options, steps), gpu)
    call, arguments = as_function(case, run)
    expected = call(*arguments)
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(case, got), gradients(case, expected), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_as_torch(gpu: torch.device, cell: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(cell, 32, 64)
    theirs, ours = theirs.to(gpu), ours.to(gpu)
    x = torch.randn(9, 5, 32, device=gpu)
    with torch.autocast("cuda", dtype=dtype):
        mine, other = ours(x)[0], theirs(x)[0]
    assert mine.dtype == other.dtype == dtype
    mine, other = (y.detach().double().cpu() for y in (mine, other))
    assert_close(mine, other, "bfloat16", "output")


def test_the_operator_is_what_runs(gpu: torch.device, cell: str) -> None:
    case = moved(make(Options(cell)), gpu)  # type: ignore[arg-type]
    h0, c0 = (*case.hx, None)[:2]
    steps_and_extras = (None,) * 8
    output = operators.forward_op(
        case.input, h0, c0, case.weights, *steps_and_extras, case.options.text, False, False
    )[0]
    assert torch.equal(output, run(case)[0])


# ---- streams, graphs, devices --------------------------------------------------------------------


def test_runs_on_the_current_stream(gpu: torch.device, cell: str) -> None:
    """Work queued before the call on a stream of one's own is done before it."""
    layer = getattr(fastrnn, cell)(64, 64, device=gpu)
    x = torch.randn(30, 16, 64, device=gpu)
    with torch.no_grad():
        expected = layer(x)[0]
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            got = layer(late)[0]
        stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("steps", ["padded", "lengths", "reset", "lengths-reset", "packed"])
def test_nothing_waits_for_the_device(gpu: torch.device, steps: str, cell: str) -> None:
    case = moved(make(Options(cell, 2, True), steps, dtype=torch.float32), gpu)  # type: ignore[arg-type]
    gradients(case, run(case))  # what is made once is made
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, run(case))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
@pytest.mark.parametrize("rows", [3, 80])
def test_graph_capture(gpu: torch.device, cell: Any, steps: str, rows: int) -> None:
    """Forward and backward in one graph, replayed with other values."""
    options, sizes = Options(cell, 2, True), (6, rows, 8, 16)
    case = moved(make(options, steps, dtype=torch.float32, sizes=sizes), gpu)
    other = moved(make(options, steps, dtype=torch.float32, sizes=sizes, seed=1), gpu)
    outputs, found = replayed(case, other, run, gradients)
    expected = run(other)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    torch.testing.assert_close(found, gradients(other, expected), rtol=0, atol=0)


def test_threads_with_streams_of_their_own(gpu: torch.device, cell: Any) -> None:
    case = moved(make(Options(cell, 2), dtype=torch.float32, sizes=(20, 4, 16, 64)), gpu)
    expected = [*(values := run(case)), *gradients(case, values)]
    torch.cuda.synchronize()

    def work(_: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            found = [*(values := run(case)), *gradients(case, values)]
            torch.cuda.current_stream().synchronize()
        return all(map(torch.equal, found, expected))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(24)))


def test_the_device_of_the_arrays_not_the_current_one(gpu: torch.device, cell: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    layer = getattr(fastrnn, cell)(8, 16, device="cuda:0")
    x = torch.randn(5, 3, 8, device="cuda:0", requires_grad=True)
    expected = layer(x)[0]
    expected.sum().backward()
    d_x = x.grad
    there = getattr(fastrnn, cell)(8, 16, device="cuda:1")
    there.load_state_dict(layer.state_dict())
    y = x.detach().to("cuda:1").requires_grad_()
    with torch.cuda.device(0):
        got = there(y)[0]
        got.sum().backward()
        assert torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), expected.cpu())
    assert y.grad is not None
    assert d_x is not None
    assert torch.equal(y.grad.cpu(), d_x.cpu())


# ---- the route and errors ------------------------------------------------------------------------


def test_the_kernels_run_only_where_they_are_asked_for(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    call = _C.Call
    monkeypatch.setattr(_C, "Call", lambda *a, **k: seen.append(True) or call(*a, **k))
    layer, x = fastrnn.GRU(4, 5, device=gpu), torch.randn(3, 2, 4, device=gpu)
    monkeypatch.setenv(_engine.CUDA_SWITCH, "0")
    layer(x)
    assert seen == []
    monkeypatch.setenv(_engine.CUDA_SWITCH, "1")
    layer(x)
    assert seen == [True]


def test_a_persistent_kernel_is_there_for_usual_sizes(
    gpu: torch.device, route: str, cell: str
) -> None:
    if route != "persistent":
        pytest.skip("of the persistent kernels alone")
    for dtype in ("float32", "bfloat16", "float16"):
        for hidden_size in (16, 128, 512):
            assert persistent_kernel(cell, hidden_size, dtype)[0]
    assert persistent_kernel(cell, 16, "float64") == (False, "float64 has no persistent kernel")


def test_a_setting_that_is_not_known_is_an_error(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = fastrnn.GRU(4, 5, device=gpu), torch.randn(3, 2, 4, device=gpu)
    monkeypatch.setenv(_engine.CUDA_SWITCH, "fast")
    with pytest.raises(ValueError, match=r"^FASTRNN_CUDA_KERNELS: expected 0, 1"):
        layer(x)


def forward_on(gpu: torch.device, change: Callable[[EngineCall], None], *work: Any) -> None:
    call = EngineCall(random_problem(Options("LSTM"), layout="lengths"), device=gpu)
    change(call)
    if work:
        call.work = (*work, *call.work[1:])
    call.forward()


def test_arrays_on_several_devices_are_refused(gpu: torch.device) -> None:
    def state_on_the_host(call: EngineCall) -> None:
        call.read = (call.read[0], call.read[1].cpu(), *call.read[2:])

    with pytest.raises(
        ValueError, match=r"^h0: expected memory of cuda:\d, as input is in, got host"
    ):
        forward_on(gpu, state_on_the_host)


def test_a_workspace_on_the_device_is_needed(gpu: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^workspace: expected an array"):
        forward_on(gpu, lambda call: None, lambda size: None)
    small = torch.empty(64, dtype=torch.uint8, device=gpu)
    with pytest.raises(ValueError, match=r"^workspace: expected \d+ bytes, 256-byte aligned"):
        forward_on(gpu, lambda call: None, lambda size: small)


def test_lengths_out_of_range_are_clamped(gpu: torch.device, cell: str) -> None:
    """Their values are not read on the host; outside 0…T the nearest bound counts."""
    layer = getattr(fastrnn, cell)(3, 4, device=gpu)
    x = torch.randn(5, 3, 3, device=gpu)
    wild = layer(x, lengths=torch.tensor([-7, 3, 99], device=gpu))[0]
    tame = layer(x, lengths=torch.tensor([0, 3, 5], device=gpu))[0]
    assert torch.equal(wild, tame)
