"""The route through torch's own call, the default on a GPU, tested with tensors on the CPU.

``torch._VF`` runs on a CPU too, so everything around it is testable without a GPU: equality with
torch.nn, lengths and resets as episodes, derivatives, graphs. cuDNN itself is replaced by doubles.
"""

from __future__ import annotations

import copy
import re
import threading
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.backends.cudnn.rnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from cases import LAYOUTS, STACKS
from fastrnn import _C
from fastrnn._engine import NO_EXTRAS
from fastrnn._options import Options
from fastrnn.calls import call, composed, episodes, operators, torch_kernels, torch_route
from fastrnn.calls.call import recurrent
from operators import opcheck
from pairs import CELLS, LAYERS, outcome, pair, tensors
from stacks import Arguments, as_function, make

# Their promises hold here too.
from test_sequences import (  # noqa: F401
    name,
    test_lengths_equal_each_sequence_run_alone,
    test_padding_gets_no_gradient_and_may_hold_anything,
    test_padding_is_zero_in_the_states_too,
    test_reset_beside_lengths,
    test_reset_cuts_the_gradient_in_both_directions,
    test_reset_equals_each_episode_run_alone,
    test_return_states_gives_every_layer_at_every_step,
    test_states_agree_with_output_and_final_states,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OURS = {k: options for k, options in STACKS.items() if options.in_torch_nn}
every_stack = pytest.mark.parametrize("options", OURS.values(), ids=OURS.keys())
every_step = pytest.mark.parametrize("steps", LAYOUTS)
every_layer = pytest.mark.parametrize("layer", LAYERS)
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"bidirectional": True, "num_layers": 3, "dropout": 0.4},
    {"num_layers": 2, "batch_first": True, "bias": False},
)
T, B, SIZE, H = 6, 4, 3, 5


@pytest.fixture(autouse=True)
def _in_the_place_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_ENGINE_DEVICES", frozenset({"meta"}))
    monkeypatch.setattr(_C, "layer", lambda *_: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of torch's calls, of which there is at least one."""
    made: list[tuple[Any, ...]] = []
    call = torch_route.call

    def noted(*arguments: Any) -> Any:
        made.append(arguments)
        return call(*arguments)

    monkeypatch.setattr(torch_route, "call", noted)
    yield made
    assert made


def run(case: Arguments, **more: Any) -> list[Tensor]:
    """Output, final states and all states."""
    output, hx_n, states = recurrent(
        case.options, case.input, case.hx, case.weights, **case.steps, extras=case.extras, **more
    )
    return [output, *hx_n, *(s for s in states or () if s is not None)]


def by_the_engine(case: Arguments, **more: Any) -> list[Tensor]:
    with patch.object(call, "_ENGINE_DEVICES", frozenset({"cpu"})):
        return run(case, **more)


def gradients(case: Arguments, values: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(y.pow(2).sum() for y in values), case.leaves, allow_unused=True)


def assert_as_the_engine(case: Arguments, **more: Any) -> None:
    actual, expected = run(case, **more), by_the_engine(case, **more)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    mine, theirs = gradients(case, actual), gradients(case, expected)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


# ---- torch.nn's numbers --------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_gives_torch_nns_bits(
    layer: str, kind: dict[str, Any], dtype: torch.dtype, calls: list[Any]
) -> None:
    """Of every output and gradient, with the masks that torch draws under the same seed."""
    theirs, ours = pair(layer, SIZE, H, dtype=dtype, **kind)
    x = torch.randn(T, B, SIZE, dtype=dtype)
    mine, other = outcome(ours, x), outcome(theirs, x)
    torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projected_lstm_gives_torch_nns_bits(calls: list[Any]) -> None:
    theirs, ours = pair("LSTM", SIZE, H, 2, proj_size=2, bidirectional=True)
    x = torch.randn(T, B, SIZE)
    torch.testing.assert_close(outcome(ours, x), outcome(theirs, x), rtol=0, atol=0)


@every_layer
@pytest.mark.parametrize("sort", [True, False])
def test_a_packed_sequence_gives_torch_nns_bits(layer: str, sort: bool, calls: list[Any]) -> None:
    theirs, ours = pair(layer, SIZE, H, 2, bidirectional=True)
    lengths = [5, 4, 2] if sort else [2, 5, 4]
    packed = pack_sequence([torch.randn(n, SIZE) for n in lengths], enforce_sorted=sort)
    mine, other = outcome(ours, packed), outcome(theirs, packed)
    torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@every_layer
@pytest.mark.parametrize(
    "spoilt", ["sparse input", "nested input", "sparse state", "sparse weight"]
)
def test_the_short_way_refuses_what_the_long_way_refuses(layer: str, spoilt: str) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H)
    x, h = torch.randn(T, B, SIZE), torch.randn(1, B, H)
    if spoilt == "sparse weight":
        ours.weight_hh_l0 = torch.nn.Parameter(ours.weight_hh_l0.detach().to_sparse())
    elif spoilt == "sparse state":
        h = h.to_sparse()
    else:
        x = x.to_sparse() if spoilt == "sparse input" else torch.nested.nested_tensor(list(x))
    with pytest.raises(TypeError, match=r"must be a dense Tensor, got"):
        ours(x, (h, h) if layer == "LSTM" else h)


@every_layer
def test_states_of_any_strides_are_taken(layer: str, calls: list[Any]) -> None:
    """torch asks for contiguous ones on a GPU."""
    _, ours = pair(layer, SIZE, H)
    x, h = torch.randn(T, B, SIZE), torch.randn(1, H, B).transpose(1, 2)
    hx = (h, h) if layer == "LSTM" else h
    expected = ours(x, tuple(s.contiguous() for s in hx) if layer == "LSTM" else h.contiguous())
    torch.testing.assert_close(ours(x, hx), expected, rtol=0, atol=0)
    assert all(s.is_contiguous() for s in (calls[0][2] or ()))


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_gives_torch_nns_bits(cell: str) -> None:
    theirs, ours = pair(cell, SIZE, H)
    x = torch.randn(B, SIZE)
    with patch.object(torch_route, "cell", wraps=torch_route.cell) as spy:
        mine = outcome(ours, x)
    assert spy.call_count == 1
    torch.testing.assert_close(mine, outcome(theirs, x), rtol=0, atol=0)
    assert torch.autograd.gradgradcheck(copy.deepcopy(ours).double(), x.double().requires_grad_())
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x), rtol=0, atol=0)


@every_layer
@pytest.mark.parametrize("kind", KINDS[:2])
def test_autocast_follows_torch(layer: str, kind: dict[str, Any], calls: list[Any]) -> None:
    theirs, ours = pair(layer, SIZE, H, **kind)
    x = torch.randn(T, B, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        try:
            other = theirs(x)
        except RuntimeError as e:  # oneDNN has no bfloat16 LSTM for some CPUs
            with pytest.raises(RuntimeError, match=re.escape(str(e))):
                ours(x)
            return
        torch.manual_seed(0)
        mine = ours(x)
    torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert calls[0][1].dtype == torch.float32


@every_layer
@pytest.mark.parametrize("lengths", [[6, 3, 1, 0], [0, 0, 0, 0]])
def test_under_autocast_lengths_leave_the_dtypes_as_they_are(
    layer: str, lengths: list[int]
) -> None:
    """Of the output and of the states: by torch's call, composed while a graph is captured, by the
    engine.
    """
    ours, x = getattr(fastrnn, layer)(SIZE, H), torch.randn(T, B, SIZE)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [y.dtype for y in tensors(ours(x, lengths=lengths))]

    by_torch = dtypes()
    with patch.object(torch_route, "_is_capturing", lambda _: True):
        assert dtypes() == by_torch
    with patch.object(call, "_ENGINE_DEVICES", frozenset({"cpu"})):
        assert dtypes() == by_torch


def test_a_call_without_a_gradient_asks_for_no_training_mode(calls: list[Any]) -> None:
    layer = fastrnn.GRU(SIZE, H).train()
    with torch.no_grad():
        layer(torch.randn(T, B, SIZE))
    assert calls[0][-2:] == (0.0, False)


@every_layer
def test_a_gradient_in_eval_works(layer: str, calls: list[Any]) -> None:
    """cuDNN has one in training mode alone: it is asked for that, without dropout."""
    theirs, ours = pair(layer, SIZE, H, 2, dropout=0.5)
    x = torch.randn(T, B, SIZE)
    mine, other = outcome(ours.eval(), x), outcome(theirs.eval(), x)
    torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert calls[0][-2:] == (0.0, True)


# ---- lengths and resets --------------------------------------------------------------------------


@every_stack
@every_step
def test_every_way_to_say_which_rows_run(options: Options, steps: str, calls: list[Any]) -> None:
    assert_as_the_engine(make(options, steps))


@every_stack
def test_what_a_reset_puts_in_place_of_the_state(options: Options, calls: list[Any]) -> None:
    assert_as_the_engine(make(options, "lengths-reset", extras=["reset_hx"]))


@st.composite
def cases(draw: st.DrawFn) -> Arguments:
    """Any pattern of lengths and resets: at step 0, at every step, in rows of no steps."""
    options = draw(st.sampled_from(list(OURS.values())))
    steps, rows = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    resets = draw(st.booleans())
    extras = ["reset_hx"] if resets and draw(st.booleans()) else []
    sizes = (steps, rows, 2, 3)
    case = make(options, "padded", sizes=sizes, extras=extras, seed=draw(st.integers(0, 99)))
    given: dict[str, Tensor] = {}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
        given["lengths"] = torch.tensor(lengths)
    if resets:
        flags = st.booleans() if draw(st.integers(0, 4)) else st.just(value=True)
        flat = draw(st.lists(flags, min_size=steps * rows, max_size=steps * rows))
        given["reset"] = torch.tensor(flat).view(steps, rows)
    return case._replace(steps=given)


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_any_lengths_and_resets(case: Arguments) -> None:
    with (
        patch.object(call, "_ENGINE_DEVICES", frozenset({"meta"})),
        patch.object(composed, "forward", wraps=composed.forward) as called,
    ):
        assert_as_the_engine(case)
    none_runs = "lengths" in case.steps and not case.steps["lengths"].any()
    assert called.called == none_runs


@every_layer
def test_a_padded_batch_is_packed_as_torch_packs_it(layer: str, calls: list[Any]) -> None:
    """Bit for bit, dropout's masks too."""
    theirs, ours = pair(layer, SIZE, H, 3, bidirectional=True, dropout=0.5)
    x, lengths = torch.randn(T, B, SIZE), torch.tensor([2, 6, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.manual_seed(5)
    other, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], total_length=T)
    torch.manual_seed(5)
    torch.testing.assert_close(ours(x, lengths=lengths)[0], other, rtol=0, atol=0)


def test_lengths_on_the_cpu_are_not_waited_for() -> None:
    """On meta no value can be read: that of an input, or of what was computed there."""
    lengths, device = torch.tensor([2, 0, 3]), torch.device("meta")
    found = episodes.find(torch.empty(4, 3, 2, device=device), lengths, None)
    assert found is not None
    assert found.batch_sizes.tolist() == [2, 2, 1]
    assert found.source.device == device
    with pytest.raises(NotImplementedError, match="meta"):
        episodes.find(torch.empty(4, 3, 2, device=device), lengths.to(device), None)


def test_nothing_of_a_reset_is_made_elsewhere() -> None:
    """From the CPU it would have to come over, and be waited for."""
    reset = torch.tensor([[False, True, False], [True, False, False]])
    with torch.device("meta"):  # where tensors are made that say no place
        found = episodes.find(torch.empty(2, 3, 1, device="cpu"), None, reset)
    assert found is not None
    assert found.batch_sizes.tolist() == [4, 2]


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_only_cuda_is_trusted_with_a_copy_that_is_not_waited_for(device: str) -> None:
    """Others may read memory of the host after it was freed (pytorch/pytorch#139550)."""
    asked = []

    def to(self: Tensor, *_: Any, non_blocking: bool = False) -> Tensor:
        asked.append(non_blocking)
        return self

    with patch.object(Tensor, "to", to):
        episodes._on(torch.device(device), torch.zeros(2))
    assert asked == [device == "cuda"]


@every_layer
def test_lengths_stay_on_the_cpu_until_the_episodes_are_known(layer: str) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H)
    seen = []
    with patch.object(episodes, "find", side_effect=lambda x, n, r: seen.append((n, r))):
        ours(torch.randn(T, B, SIZE), lengths=[1, 2, 3, 4])
    assert seen[0][0].device.type == "cpu"
    assert seen[0][1] is None


@every_layer
def test_a_graph_that_is_captured_composes_lengths(layer: str) -> None:
    """Whose values a capture cannot wait for."""
    ours = getattr(fastrnn, layer)(SIZE, H, dtype=torch.float64)
    x, lengths = torch.randn(T, B, SIZE, dtype=torch.float64), torch.tensor([2, 6, 1, 4])
    expected = ours(x, lengths=lengths)
    with (
        patch.object(torch_route, "_is_capturing", lambda _: True),
        patch.object(episodes, "find", side_effect=AssertionError),
    ):
        torch.testing.assert_close(ours(x, lengths=lengths), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layer", ["RNN", "GRU"])
@pytest.mark.parametrize("steps", ["padded", "lengths-reset"])
def test_returning_the_states_of_h_calls_torch_once_a_layer(
    layer: str, steps: str, calls: list[Any]
) -> None:
    case = make(Options(layer, 3, True), steps)  # type: ignore[arg-type]
    assert_as_the_engine(case, return_states=True)
    assert [arguments[0].num_layers for arguments in calls] == [1, 1, 1]


def test_returning_the_states_of_c_takes_the_composed_route() -> None:
    case = make(Options("LSTM", 2), "lengths-reset")
    with patch.object(torch_route, "call", side_effect=AssertionError):
        assert_as_the_engine(case, return_states=True)


# ---- derivatives ---------------------------------------------------------------------------------


@every_stack
@pytest.mark.parametrize("steps", ["padded", "packed", "lengths-reset"])
def test_gradcheck_and_gradgradcheck(options: Options, steps: str, calls: list[Any]) -> None:
    extras = ["reset_hx"] if "reset" in steps else []
    case = make(options, steps, sizes=(3, 2, 2, 3), extras=extras)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(case.with_leaves(*leaves)))

    assert torch.autograd.gradcheck(call, case.leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, case.leaves, fast_mode=True)


def test_a_gradient_of_the_gradient_is_not_torchs(calls: list[Any]) -> None:
    """cuDNN has none: torch's graph gets no gradient where one is to be differentiated."""
    case = make(Options("LSTM"))
    output = run(case)[0]
    nodes = cotangents_of_torchs_graph(output)
    torch.autograd.grad(output.sum(), case.leaves, create_graph=True)
    assert not any(nodes)
    torch.autograd.grad(run(case)[0].sum(), case.leaves)


def cotangents_of_torchs_graph(output: Tensor) -> list[bool]:
    """Whether torch's own graph is given any, as backward comes to its nodes."""
    function, nodes = output.grad_fn, list[bool]()
    assert function is not None
    for node, _ in function.next_functions:
        if node is not None and "Accumulate" not in node.name():
            node.register_hook(lambda _, given: nodes.append(any(d is not None for d in given)))
    return nodes


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode uses it
@every_stack
@pytest.mark.parametrize("steps", ["padded", "packed", "lengths-reset"])
def test_tangents_of_gradients_are_not_torchs(
    options: Options, steps: str, calls: list[Any]
) -> None:
    """Forward mode over backward, which cuDNN does not have."""
    case = make(options, steps, extras=["reset_hx"] if "reset" in steps else [])
    output = run(case)[0]
    d, tangent = torch.randn_like(output), torch.randn_like(output)
    expected = torch.autograd.grad(output, case.leaves, tangent, retain_graph=True)
    nodes = cotangents_of_torchs_graph(output)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(d, tangent)
        found = torch.autograd.grad(output, case.leaves, dual)
        tangents = [torch.autograd.forward_ad.unpack_dual(g).tangent for g in found]
    assert not any(nodes)
    torch.testing.assert_close(tangents, list(expected), rtol=1e-11, atol=1e-12)


@every_layer
def test_backward_unpacks_what_torch_saved_and_nothing_else(layer: str, calls: list[Any]) -> None:
    """So that what hooks have put elsewhere, or what is to be computed again, comes back once."""
    theirs, ours = pair(layer, SIZE, H, 2)
    unpacked = []
    for module in (theirs, ours):
        count = []

        def unpack(x: Tensor, count: list[int] = count) -> Tensor:
            count.append(1)
            return x

        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            output = module(torch.randn(T, B, SIZE))[0]
        output.sum().backward()
        unpacked.append(len(count))
    assert unpacked[0] == unpacked[1]


@every_layer
def test_states_may_be_detached_in_place(layer: str, calls: list[Any]) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H)
    _, hx_n = ours(torch.randn(T, B, SIZE))
    for state in hx_n if layer == "LSTM" else (hx_n,):
        state.detach_()
        assert not state.requires_grad


@every_layer
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_output_may_be_written_to_before_backward(
    layer: str, dropout: float, calls: list[Any]
) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H, 2, dropout=dropout)
    x = torch.randn(T, B, SIZE)

    def gradient(write: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return torch.autograd.grad(write(ours(x)[0]).pow(2).sum(), list(ours.parameters()))

    expected = gradient(lambda y: (y + 1) * 2)
    got = gradient(lambda y: y.add_(1).mul_(2))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp uses it
@every_layer
def test_transforms_are_composed(layer: str) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H, dtype=torch.float64)
    x = torch.randn(7, T, 2, SIZE, dtype=torch.float64)
    with patch.object(torch_route, "call", side_effect=AssertionError):
        mapped = torch.func.vmap(lambda one: ours(one)[0])(x)
        torch.func.jvp(lambda one: ours(one)[0], (x[0],), (x[1],))
    torch.testing.assert_close(mapped, torch.stack([ours(one)[0] for one in x]))


# ---- graphs --------------------------------------------------------------------------------------


@every_stack
@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
def test_compiled_equals_eager(options: Options, steps: str, calls: list[Any]) -> None:
    case = make(options, steps)
    call, arguments = as_function(case, run)
    expected = call(*arguments)
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    mine, theirs = gradients(case, got), gradients(case, expected)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@every_stack
@pytest.mark.parametrize("steps", ["padded", "lengths-reset"])
def test_operators_give_contiguous_tensors_of_any_strides(options: Options, steps: str) -> None:
    """As their fake kernels say; inductor asserts it."""
    case = make(options, steps)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in case.leaves]
    arguments = operator_arguments(case.with_leaves(*strided), False, True, True)
    output, h_n, c_n, hidden, cell, gates = operators.forward_op(*arguments)
    two = options.cell == "LSTM"
    d = [
        torch.randn(y.shape[::-1], dtype=y.dtype).permute(2, 1, 0)
        for y in (output, h_n, c_n)[: 2 + two]
    ]
    cotangents = (d[0], None, None, d[1], d[2] if two else None)
    needs = [True, True, two, False, False, *[True] * len(case.weights)]
    given = (*arguments[:12], hidden, cell, gates, *cotangents, options.text, needs, True)
    found = operators.backward_op(*given)
    assert all(y.is_contiguous() for y in (output, h_n, c_n, hidden, *found))


@every_layer
def test_a_program_holds_one_operator(layer: str, calls: list[Any]) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H, 2, bidirectional=True).eval()
    x = torch.randn(T, B, SIZE)
    dynamic = ({0: torch.export.Dim("T", min=2, max=64), 1: torch.export.Dim("B", min=2, max=64)},)
    program = torch.export.export(ours, (x,), dynamic_shapes=dynamic)
    nodes = [node for node in program.graph.nodes if node.target is operators.forward_op]
    assert len(nodes) == 1
    assert nodes[0].args[-1] is True
    longer = torch.randn(2 * T, B + 1, SIZE)
    torch.testing.assert_close(program.module()(longer), ours(longer))


def operator_arguments(
    case: Arguments, states: bool, save: bool, by_torch: bool
) -> tuple[Any, ...]:
    h0, c0 = (*case.hx, None)[:2]
    steps = [case.steps.get(key) for key in ("batch_sizes", "lengths", "reset")]
    flags = (case.options.text, states, save, by_torch)
    return (case.input, h0, c0, case.weights, *steps, *case.extras, *flags)


@pytest.mark.parametrize("kind", ["rnn", "gru-bidirectional-2", "lstm-bidirectional-2"])
@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
def test_opcheck(kind: str, steps: str) -> None:
    options = OURS[kind]
    states = options.cell != "LSTM"
    case = make(options, steps, requires_grad=False)
    opcheck(operators.forward_op, operator_arguments(make(options, steps), states, True, True))
    arguments = operator_arguments(case, states, True, True)
    output, h_n, c_n, hidden, cell, gates = operators.forward_op(*arguments)
    assert hidden.shape[0] == (options.num_layers if states else 1)
    two = options.cell == "LSTM"
    d = (torch.randn_like(output), torch.randn_like(hidden) if states else None, None)
    d = (*d, torch.randn_like(h_n), torch.randn_like(c_n) if two else None)
    needs = [True, True, two, False, False, *[True] * len(case.weights)]
    given = (*arguments[:12], hidden, cell, gates, *d, options.text, needs, True)
    opcheck(operators.backward_op, given)


@every_stack
@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
@pytest.mark.parametrize("states", [False, True])
def test_a_graph_of_a_cpu_computes_where_kernels_are_not_trusted(
    options: Options, steps: str, states: bool
) -> None:
    """It asks for the engine, and gets what the engine would give it, but for the gates."""
    case = make(options, steps)
    expected = by_the_engine(case, return_states=states)
    wanted = gradients(case, expected)
    arguments = operator_arguments(case, states, False, False)
    with patch.object(torch_kernels, "leaves_to_engine", lambda *_: False):
        output, h_n, c_n, hidden, cell, _ = operators.forward_op(*arguments)
        got = [output, h_n, c_n, hidden, cell]
        got = [y for y in got if y.dim() > 1]
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
        found = gradients(case, got)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("device", ["CPU", "CUDA", "MPS", "XPU"])
@pytest.mark.parametrize("kind", ["forward", "backward", "forward_members", "backward_members"])
def test_operators_run_on_every_device_that_graphs_may_name(device: str, kind: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrnn::{kind}", device)


@pytest.mark.parametrize(("device", "engine"), [("cpu", True), ("mps", False), ("xpu", False)])
def test_no_graph_leaves_memory_of_another_device_to_the_engine(device: str, engine: bool) -> None:
    """One that was made on a CPU asks for the engine wherever it is moved to."""
    x: Any = SimpleNamespace(device=torch.device(device), is_cuda=False)
    arguments = operator_arguments(make(Options("GRU")), False, False, False)
    given = (x, *arguments[1:12])
    assert torch_kernels.leaves_to_engine(given, Options("GRU"), False) is engine


# ---- what is cuDNN's alone -----------------------------------------------------------------------


class Cudnn:
    """Doubles of cuDNN's own functions, which say what they were asked for."""

    modes = ("RNN_RELU", "RNN_TANH", "LSTM", "GRU")  # as cuDNN numbers them

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flattened: list[tuple[Any, ...]] = []
        monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", self._flatten)
        monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
        monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", self.modes.index)

    def _flatten(self, weights: list[Tensor], *sizes: Any) -> Tensor:
        """Weights in one buffer, matrices before biases; the tensors become views of it."""
        self.flattened.append(sizes)
        buffer = torch.cat([w.flatten() for w in sorted(weights, key=lambda w: -w.dim())])
        place = 0
        for w in sorted(weights, key=lambda w: -w.dim()):
            w.set_(buffer[place : place + w.numel()].view(w.shape))
            place += w.numel()
        return buffer


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Cudnn:
    return Cudnn(monkeypatch)


@every_layer
def test_weights_are_copied_into_one_piece_without_touching_them(layer: str, cudnn: Cudnn) -> None:
    options = Options(layer, 2, True)  # type: ignore[arg-type]
    case = make(options)
    places = [w.data_ptr() for w in case.weights]
    flat = list(torch_route._Flat.apply(options, SIZE, *case.weights))
    assert [w.data_ptr() for w in case.weights] == places
    assert len({w.untyped_storage().data_ptr() for w in flat}) == 1
    torch.testing.assert_close(flat, case.weights, rtol=0, atol=0)
    mode = {"RNN": 1, "LSTM": 2, "GRU": 3}[layer]
    assert cudnn.flattened == [(4, SIZE, mode, 3, 0, 2, False, True)]
    expected = gradients(case, run(case))
    flat_case = case._replace(weights=flat)
    found = torch.autograd.grad(sum(y.pow(2).sum() for y in run(flat_case)), case.leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def laid(cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether torch's call would be given copies of weights, for an input said to be on a GPU."""
    monkeypatch.setattr(torch_route, "_places", {})
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda _: True)

    def copied(options: Options, weights: list[Tensor]) -> bool:
        x: Any = SimpleNamespace(is_cuda=True, shape=(T, B, SIZE))
        before = len(cudnn.flattened)
        given = torch_route._laid_flat(options, weights, x)
        torch.testing.assert_close(given, weights, rtol=0, atol=0)
        copied = len(cudnn.flattened) > before
        assert copied or all(a is b for a, b in zip(given, weights, strict=True))
        return copied

    return copied


def in_one_piece(weights: list[Tensor], order: list[int]) -> list[Tensor]:
    """The same values, laid one behind the other in this order."""
    whole = torch.cat([weights[i].flatten() for i in order])
    pieces = dict(zip(order, whole.split([weights[i].numel() for i in order]), strict=True))
    return [pieces[i].view_as(w) for i, w in enumerate(weights)]


def test_weights_as_cudnn_lays_them_stay_where_they_are(laid: Callable[..., bool]) -> None:
    """How that is, the first copies tell."""
    options = Options("GRU", 2)
    weights = make(options, requires_grad=False).weights
    matrices_first = [0, 1, 4, 5, 2, 3, 6, 7]
    assert laid(options, weights)
    assert laid(options, weights)
    assert not laid(options, in_one_piece(weights, matrices_first))


def test_weights_in_one_piece_of_another_order_are_copied(laid: Callable[..., bool]) -> None:
    """As after vector_to_parameters, in a replica of DataParallel, or of one layer of a stack."""
    options = Options("GRU", 2)
    weights = make(options, requires_grad=False).weights
    laid(options, weights)
    assert laid(options, in_one_piece(weights, list(range(8))))
    flat = in_one_piece(weights, [0, 1, 4, 5, 2, 3, 6, 7])
    one = Options("GRU")
    laid(one, weights[4:])
    assert laid(one, flat[4:])
    tied = [*flat[:5], flat[1], *flat[6:]]
    assert laid(options, tied)


def test_a_transposed_weight_in_its_old_place_is_copied(laid: Callable[..., bool]) -> None:
    """torch looks at where weights begin, not at their strides, and would read it untransposed."""
    options = Options("RNN", bias=False)
    weights = [torch.randn(H, SIZE), torch.randn(H, H)]
    laid(options, weights)
    flat = in_one_piece(weights, [0, 1])
    assert not laid(options, flat)
    assert laid(options, [flat[0], flat[1].t()])


def test_a_weight_with_a_negation_pending_is_copied_as_it_is(laid: Callable[..., bool]) -> None:
    options = Options("RNN", bias=False)
    weights = [torch.randn(H, SIZE), torch.randn(H, H)]
    laid(options, weights)
    flat = in_one_piece(weights, [0, 1])
    assert laid(options, [flat[0], torch._neg_view(flat[1])])


@pytest.mark.parametrize(
    ("weights", "autocast", "copied"),
    [
        (torch.float32, torch.float16, False),
        (torch.float16, torch.float16, True),
        (torch.float64, torch.float16, True),
        (torch.bfloat16, torch.bfloat16, True),
    ],
)
def test_autocast_copies_the_weights_that_it_casts(
    laid: Callable[..., bool], weights: torch.dtype, autocast: torch.dtype, copied: bool
) -> None:
    options = Options("RNN", bias=False)
    given = [torch.randn(H, SIZE, dtype=weights), torch.randn(H, H, dtype=weights)]
    with (
        patch.object(torch, "is_autocast_enabled", lambda _: True),
        patch.object(torch, "get_autocast_dtype", lambda _: autocast),
    ):
        assert laid(options, given) is copied


def test_layers_lay_their_weights_when_made_and_moved() -> None:
    with patch.object(torch_route, "_flatten") as flatten:
        layer = fastrnn.LSTM(SIZE, H)
        assert flatten.call_count == 1
        layer.double()
        assert flatten.call_count == 2
        layer.flatten_parameters()
        assert flatten.call_count == 3
        fastrnn.LSTM(SIZE, H, peephole=True)  # cuDNN would not know the other weights
        torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        layer.float()
        assert flatten.call_count == 3


@pytest.mark.parametrize("steps", ["padded", "packed"])
@every_layer
def test_cudnns_backward_receives_the_reserve_of_its_forward(
    layer: str, steps: str, cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph: the reserve goes from operator to operator, and backward gets a copy to write."""
    options = Options(layer, 2, True)  # type: ignore[arg-type]
    case = make(options, steps)
    expected = gradients(case, run(case))
    left = torch.arange(7, dtype=torch.uint8)
    monkeypatch.setattr(torch_kernels, "_reserve", lambda _: left)
    operator, asked = torch.ops.aten._cudnn_rnn_backward.default, []

    def double(**given: Any) -> Any:
        asked.append(given)
        leaves = [x.detach().requires_grad_() for x in case.leaves]
        twin = case.with_leaves(*leaves)
        with torch_kernels.recording(), torch.enable_grad():
            output, *hx_n = by_the_engine(twin)
            torch.testing.assert_close(given["output"], output.detach())
            cotangents = (given["grad_output"], given["grad_hy"], given["grad_cy"])
            pairs = [(y, d) for y, d in zip([output, *hx_n], cotangents, strict=False)]
            d_input, *others = torch.autograd.grad(
                [y for y, _ in pairs], leaves, [d for _, d in pairs]
            )
        states, weights = others[: len(case.hx)], others[len(case.hx) :]
        return d_input, states[0], states[1] if len(states) > 1 else None, weights

    monkeypatch.setattr(torch.ops.aten, "_cudnn_rnn_backward", double)
    output, h_n, c_n, *_ = operators.forward_op(*operator_arguments(case, False, False, True))
    values = [output, h_n, c_n][: 1 + len(case.hx)]
    torch.testing.assert_close(gradients(case, values), expected, rtol=1e-10, atol=1e-11)
    (given,) = asked
    assert given["reserve"].equal(left)
    assert given["reserve"].data_ptr() != left.data_ptr()
    assert sorted(given) == sorted(argument.name for argument in operator._schema.arguments)
    assert given["weight_stride0"] == 4
    assert given["batch_sizes"] == case.steps.get("batch_sizes", torch.tensor([])).tolist()
    assert given["output_mask"] == [True, True, layer == "LSTM", True]


def test_torchs_graph_keeps_the_reserve_where_it_is_looked_for() -> None:
    assert hasattr(torch._C._functions.CudnnRnnBackward0, "_saved_result3")


def test_long_sequences_are_cut_to_the_steps_that_cudnn_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def double(*_: Any) -> tuple[Tensor, Tensor]:
        seen.append(torch._C._get_cudnn_enabled())
        return torch.zeros(1), torch.zeros(1)

    weights = [torch.zeros(3, 1), torch.zeros(3, 1)]
    monkeypatch.setattr(torch_route, "CUDNN_STEPS", 4)
    monkeypatch.setattr(torch_route, "_laid_flat", lambda *_: weights)
    monkeypatch.setattr(torch_route._VF, "gru", double)
    for steps in (3, 4):
        x: Any = SimpleNamespace(is_cuda=True, shape=(steps, 1, 1), new_zeros=torch.zeros)
        torch_route.call(Options("GRU", bias=False), x, None, weights, None, 0.0, False)
    assert seen == [True, False]
    assert torch._C._get_cudnn_enabled()


def test_threads_leave_cudnn_as_they_found_it() -> None:
    entered = threading.Event()

    def other() -> None:
        with torch_route._without_cudnn():
            entered.set()

    thread = threading.Thread(target=other)
    with torch_route._without_cudnn():
        thread.start()
        assert not entered.wait(0.2)
    thread.join()
    assert entered.is_set()
    assert torch._C._get_cudnn_enabled()


def test_nothing_warns_about_weights_apart() -> None:
    layer = fastrnn.LSTM(SIZE, H, 2)
    layer.weight_hh_l1 = torch.nn.Parameter(torch.randn(4 * H, H))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(T, B, SIZE))[0].sum().backward()


def test_extras_are_of_no_use_without_a_reset() -> None:
    assert torch_route.has(Options("GRU"), NO_EXTRAS, return_states=True)
    assert not torch_route.has(Options("LSTM"), NO_EXTRAS, return_states=True)
