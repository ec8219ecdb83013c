"""`gradient_flow`: the whole gradient of every state, step by step, and nothing else changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn.calls import composed
from pairs import LAYERS, assert_same, outcome, tensors

F64 = torch.float64
STEPS, ROWS = 6, 3


def by_cells(name: str, layer: nn.Module, input: Tensor) -> list[tuple[Tensor, ...]]:
    """The states of a layer of one layer at each step, by torch's cell, wanting their gradient."""
    cell = getattr(nn, f"{name}Cell")(layer.input_size, layer.hidden_size, dtype=F64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    state: Any = None
    states = []
    for x in input:
        state = cell(x, state)
        states.append(state if name == "LSTM" else (state,))
        for part in states[-1]:
            part.retain_grad()
    return states


def recorded(model: nn.Module, *args: Any, loss: Any = None, **options: Any) -> dict[str, Tensor]:
    with fastrnn.gradient_flow(model) as flow:
        outputs = model(*args, **options)
        (loss or (lambda y: sum(t.square().sum() for t in tensors(y))))(outputs).backward()
    return flow.norms


@pytest.mark.parametrize("at", ["last output", "every output", "h_n"])
@pytest.mark.parametrize("name", LAYERS)
def test_norms_are_those_of_a_loop_over_cells(name: str, at: str) -> None:
    layer = getattr(fastrnn, name)(4, 5, dtype=F64)
    input = torch.randn(STEPS, ROWS, 4, dtype=F64)
    states = by_cells(name, layer, input)
    h = torch.stack([state[0] for state in states])
    losses = {
        "last output": lambda y: y[0][-1].square().sum(),
        "every output": lambda y: y[0].square().sum(),
        "h_n": lambda y: next(tensors(y[1])).square().sum(),
    }
    (h if at == "every output" else h[-1]).square().sum().backward()
    norms = recorded(layer, input, loss=losses[at])
    expected = {f"{name}.h": torch.stack([s[0].grad.norm() for s in states])}
    if name == "LSTM":
        expected["LSTM.c"] = torch.stack([s[1].grad.norm() for s in states])
    assert norms.keys() == expected.keys()
    for key, want in expected.items():
        torch.testing.assert_close(norms[key], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_a_bidirectional_stack_is_seen_by_direction(name: str) -> None:
    layer = getattr(fastrnn, name)(3, 4, num_layers=2, bidirectional=True, dtype=F64)
    norms = recorded(layer, torch.randn(STEPS, ROWS, 3, dtype=F64), loss=lambda y: y[0][2].sum())
    assert [key.partition(".")[2] for key in norms] == (
        ["h", "c", "h_reverse", "c_reverse"] if name == "LSTM" else ["h", "h_reverse"]
    )
    # Of the loss at step 2 the upper layer's forward direction sees steps 0…2, the reverse one
    # 2…5; the lower layer's states at every step lie before one of the two.
    assert all(curve.shape == (STEPS,) and bool((curve > 0).all()) for curve in norms.values())
    one = getattr(fastrnn, name)(3, 4, bidirectional=True, dtype=F64)
    norms = recorded(one, torch.randn(STEPS, ROWS, 3, dtype=F64), loss=lambda y: y[0][2].sum())
    assert (norms[f"{name}.h"] > 0).tolist() == [True] * 3 + [False] * 3
    assert (norms[f"{name}.h_reverse"] > 0).tolist() == [False] * 2 + [True] * 4


def test_the_reverse_direction_is_the_forward_one_backwards() -> None:
    layer = fastrnn.LSTM(3, 4, bidirectional=True, dtype=F64)
    for key, weight in layer.named_parameters():
        if key.endswith("_reverse"):
            weight.data = layer.get_parameter(key.removesuffix("_reverse")).data
    input = torch.randn(STEPS, ROWS, 3, dtype=F64)
    forward = recorded(layer, input, loss=lambda y: y[0][-1, :, :4].sum())
    backward = recorded(layer, input.flip(0), loss=lambda y: y[0][0, :, 4:].sum())
    for kind in "hc":
        got = backward[f"LSTM.{kind}_reverse"].flip(0)
        torch.testing.assert_close(got, forward[f"LSTM.{kind}"], rtol=1e-12, atol=1e-14)


def test_the_norm_of_a_stack_is_that_of_its_layers_together() -> None:
    """The norm over two layers is that of the two norms, each from a layer by itself."""
    stack = fastrnn.GRU(4, 4, num_layers=2, dtype=F64)
    parts = nn.Sequential(*(fastrnn.GRU(4, 4, dtype=F64) for _ in range(2)))
    for k, part in enumerate(parts):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        part.load_state_dict({f"{n}_l0": stack.get_parameter(f"{n}_l{k}") for n in names})
    input = torch.randn(STEPS, ROWS, 4, dtype=F64)
    whole = recorded(stack, input, loss=lambda y: y[0][-1].sum())["GRU.h"]
    with fastrnn.gradient_flow(parts) as flow:
        parts[1](parts[0](input)[0])[0][-1].sum().backward()
    assert list(flow.norms) == ["0.h", "1.h"]
    both = torch.stack(list(flow.norms.values())).norm(dim=0)
    torch.testing.assert_close(whole, both, rtol=1e-12, atol=1e-14)


STEPS_GIVEN = {
    "padded": {},
    "lengths": {"lengths": [6, 0, 4]},
    "reset": {"reset": torch.arange(STEPS * ROWS).reshape(STEPS, ROWS) % 4 == 3},
    "unbatched": {},
    "packed": {},
    "return_states": {"return_states": True},
}


@pytest.mark.parametrize("steps", STEPS_GIVEN)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_results_and_gradients_are_those_outside(name: str, steps: str, dtype: Any) -> None:
    layer = getattr(fastrnn, name)(3, 4, 2, bidirectional=True, dropout=0.3, dtype=dtype)
    input: Any = torch.randn(STEPS, ROWS, 3, dtype=F64).to(dtype)
    if steps == "unbatched":
        input = input[:, 0]
    elif steps == "packed":
        input = pack_padded_sequence(input, [4, 6, 1], enforce_sorted=False)
    outside = outcome(layer, input, **STEPS_GIVEN[steps])
    flow = fastrnn.gradient_flow(layer)
    inside = outcome(layer, input, under=flow, **STEPS_GIVEN[steps])
    assert_same(inside, outside, dtype)
    assert all(len(curve) == STEPS and bool(curve.any()) for curve in flow.norms.values())


def test_lengths_are_seen_as_the_same_rows_packed() -> None:
    layer = fastrnn.LSTM(3, 4, 2, bidirectional=True, dtype=F64)
    input, lengths = torch.randn(STEPS, ROWS, 3, dtype=F64), [4, 6, 1]
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    padded = recorded(layer, input, lengths=lengths)
    for key, norms in recorded(layer, packed).items():
        torch.testing.assert_close(padded[key], norms, rtol=1e-12, atol=1e-14)


def test_a_reset_stops_the_gradient() -> None:
    layer = fastrnn.GRU(3, 4, dtype=F64)
    reset = torch.zeros(STEPS, ROWS, dtype=torch.bool)
    reset[4] = True
    norms = recorded(
        layer, torch.randn(STEPS, ROWS, 3, dtype=F64), reset=reset, loss=lambda y: y[0][-1].sum()
    )
    assert (norms["GRU.h"] > 0).tolist() == [False] * 4 + [True] * 2


def test_calls_before_one_backward_stand_one_after_another() -> None:
    """A sequence in chunks, and a loop over a cell, give the curve of the whole."""
    layer = fastrnn.LSTM(3, 4, dtype=F64)
    cell = fastrnn.LSTMCell(3, 4, dtype=F64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    input = torch.randn(STEPS, ROWS, 3, dtype=F64)
    whole = recorded(layer, input, loss=lambda y: y[0][-1].sum())
    with fastrnn.gradient_flow(layer) as flow:
        _, state = layer(input[:2])
        layer(input[2:], state)[0][-1].sum().backward()
    assert whole.keys() == flow.norms.keys()
    for key, norms in whole.items():
        torch.testing.assert_close(flow.norms[key], norms, rtol=1e-12, atol=1e-14)
    with fastrnn.gradient_flow(cell) as flow:
        state = None
        for x in input:
            state = cell(x, state)
        state[0].sum().backward()
    for kind in "hc":
        got, want = flow.norms[f"LSTMCell.{kind}"], whole[f"LSTM.{kind}"]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_every_backward_pass_is_kept_and_the_last_one_shown() -> None:
    layer = fastrnn.RNN(3, 4, dtype=F64)
    input = torch.randn(STEPS, ROWS, 3, dtype=F64)
    with fastrnn.gradient_flow(layer) as flow:
        loss = layer(input)[0][-1].sum()
        loss.backward(retain_graph=True)
        (3 * loss).backward()
        layer(input)[0][2].sum().backward()
    first, second, third = (one["RNN.h"] for one in flow.passes)
    torch.testing.assert_close(second, 3 * first, rtol=1e-12, atol=0)
    assert (third > 0).tolist() == [True] * 3 + [False] * 3
    assert torch.equal(flow.norms["RNN.h"], third)


def test_backward_may_follow_the_block() -> None:
    layer = fastrnn.RNN(3, 4)
    with fastrnn.gradient_flow(layer) as flow:
        loss = layer(torch.randn(STEPS, ROWS, 3))[0].sum()
    assert flow.norms == {}
    loss.backward()
    assert bool((flow.norms["RNN.h"] > 0).all())


def test_only_the_layers_of_the_model_are_recorded() -> None:
    model = nn.ModuleDict({"encode": fastrnn.GRU(3, 4), "theirs": nn.GRU(4, 4)})
    other = fastrnn.GRU(4, 2)
    with fastrnn.gradient_flow(model) as flow:
        y = model["theirs"](model["encode"](torch.randn(STEPS, ROWS, 3))[0])[0]
        other(y)[0].sum().backward()
    assert list(flow.norms) == ["encode.h"]


def test_flows_may_be_nested() -> None:
    model = nn.Sequential(fastrnn.GRU(3, 4), fastrnn.RNN(4, 4))
    input = torch.randn(STEPS, ROWS, 3)
    with fastrnn.gradient_flow(model) as outer, fastrnn.gradient_flow(model[1]) as inner:
        model[1](model[0](input)[0])[0].sum().backward()
    assert list(outer.norms) == ["0.h", "1.h"]
    assert torch.equal(outer.norms["1.h"], inner.norms["RNN.h"])
    with pytest.raises(RuntimeError, match="open already"), outer, outer:
        pass


def hooks(layer: nn.Module) -> int:
    registries = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._forward_hooks_always_called,
    )
    return sum(map(len, registries))


class _InterruptError(BaseException):
    """What the exceptions of a program do not catch, as KeyboardInterrupt."""


@pytest.mark.parametrize("error", [ValueError, _InterruptError])
@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_an_exception_leaves_everything_as_it_was(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = fastrnn.LSTM(3, 4)
    input = torch.randn(STEPS, ROWS, 3)
    before, state = hooks(layer), set(vars(layer))

    def fail(*_: Any) -> None:
        raise error

    def use() -> None:
        if where == "before":
            fail()
        if where == "inside":
            monkeypatch.setattr(composed, "step", fail)
        layer(input)
        fail()

    with pytest.raises(error), fastrnn.gradient_flow(layer):
        use()
    monkeypatch.undo()
    assert composed.watchers.get() == ()
    assert hooks(layer) == before == 0
    assert set(vars(layer)) - {"_prepared"} == state - {"_prepared"}
    assert type(layer(input)[0].grad_fn).__name__ == "RecurrenceBackward"  # the engine again


def test_a_failed_call_inside_does_not_disturb_the_next() -> None:
    layer = fastrnn.LSTM(3, 4)
    with fastrnn.gradient_flow(layer) as flow:
        with pytest.raises(RuntimeError, match="input"):
            layer(torch.randn(STEPS, ROWS, 7))
        assert composed.watchers.get() == ()
        layer(torch.randn(STEPS, ROWS, 3))[0].sum().backward()
    assert len(flow.norms["LSTM.h"]) == STEPS


def test_what_records_no_gradient_is_not_recorded() -> None:
    layer = fastrnn.GRU(3, 4)
    input = torch.randn(STEPS, ROWS, 3)
    with fastrnn.gradient_flow(layer) as flow:
        with torch.no_grad():
            layer(input)
        torch.func.grad(lambda x: layer(x)[0].sum())(input)
        frozen = copy.deepcopy(layer).requires_grad_(False)
        frozen(input)
    assert flow.norms == {}
    for use in (flow.table, flow.figure, lambda: flow.log(None)):
        with pytest.raises(RuntimeError, match="no gradient has been recorded"):
            use()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_inside_is_not_recorded(copied: Any) -> None:
    layer, input = fastrnn.GRU(3, 4), torch.randn(STEPS, ROWS, 3)
    with fastrnn.gradient_flow(layer) as flow:
        copied(layer)(input)[0].sum().backward()
    assert flow.norms == {}


def test_a_compiled_model_runs_uncompiled_and_is_recorded() -> None:
    model = nn.Sequential(fastrnn.GRU(3, 4))
    model.forward = lambda x: model[0](x)[0].sum()  # type: ignore[method-assign]
    input = torch.randn(STEPS, ROWS, 3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        with fastrnn.gradient_flow(model) as flow:
            compiled(input).backward()
        assert list(flow.norms) == ["0.h"]
    assert counter.frame_count == 0
    compiled(input).backward()
    compiled(input).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_recorded_where_backward_runs_inside(reentrant: bool) -> None:
    layer = fastrnn.GRU(3, 4, dtype=F64)
    input = torch.randn(STEPS, ROWS, 3, dtype=F64, requires_grad=True)
    expected = recorded(layer, input, loss=lambda y: y[0].sum())
    (d_input,) = torch.autograd.grad(layer(input)[0].sum(), input)
    input.grad = None

    def run(x: Tensor) -> Tensor:
        return layer(x)[0].sum()

    with fastrnn.gradient_flow(layer) as flow:
        checkpoint(run, input, use_reentrant=reentrant).backward()
    torch.testing.assert_close(flow.norms["GRU.h"], expected["GRU.h"], rtol=1e-12, atol=0)
    torch.testing.assert_close(input.grad, d_input, rtol=1e-10, atol=1e-12)


def test_a_model_without_recurrent_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must contain a recurrent layer .* got Linear"):
        fastrnn.gradient_flow(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        fastrnn.gradient_flow(None)  # type: ignore[arg-type]


# ---- what is made of it --------------------------------------------------------------------------


def scaled_identity(factor: float) -> Any:
    """h_t = factor · h_{t-1} + x_t: the gradient changes by this factor at each step."""
    layer = fastrnn.RNN(2, 2, nonlinearity="identity", bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(2, dtype=F64))
        layer.weight_hh_l0.copy_(factor * torch.eye(2, dtype=F64))
    with fastrnn.gradient_flow(layer) as flow:
        layer(torch.ones(51, 1, 2, dtype=F64))[0][-1].sum().backward()
    return flow


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(0.8, "vanishing"), (0.99, "steady"), (1.01, "steady"), (2, "exploding")],
)
def test_the_verdict_follows_the_factor_of_a_step(factor: float, verdict: str) -> None:
    flow = scaled_identity(factor)
    found = flow.summary["RNN.h"]
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(factor**50, rel=1e-9)
    assert found.last == found.entering == pytest.approx(2**0.5)
    assert found.first == pytest.approx(2**0.5 * factor**50, rel=1e-9)
    assert found.steps == 51
    header, line = flow.table().splitlines()
    assert header.split() == "state steps first step last step entering ratio verdict".split()
    assert line.split()[:2] == ["RNN.h", "51"]
    assert line.split()[-1] == verdict
    assert float(line.split()[-2]) == pytest.approx(factor**50, rel=0.01)


def test_the_verdict_is_about_the_layer_and_not_about_the_ones_above() -> None:
    """A lower layer that gets its gradient at one end alone, as the layer above has lost it."""
    model = nn.Sequential(fastrnn.LSTM(3, 8, bidirectional=True), fastrnn.RNN(16, 8))
    with fastrnn.gradient_flow(model) as flow:
        model[1](model[0](torch.randn(60, ROWS, 3))[0])[0][-1].sum().backward()
    assert {name: found.verdict for name, found in flow.summary.items()} == {
        "0.h": "vanishing",
        "0.c": "vanishing",
        "0.h_reverse": "steady",
        "0.c_reverse": "steady",
        "1.h": "vanishing",
    }


@pytest.mark.parametrize("factor", [0.8, 0.99, 2])
def test_the_verdict_of_a_loop_over_a_cell_is_that_of_the_layer(factor: float) -> None:
    cell = fastrnn.RNNCell(2, 2, nonlinearity="identity", bias=False, dtype=F64)
    with torch.no_grad():
        cell.weight_hh.copy_(factor * torch.eye(2, dtype=F64))
    with fastrnn.gradient_flow(cell) as flow:
        h = None
        for _ in range(51):
            h = cell(torch.ones(1, 2, dtype=F64), h)
        h.sum().backward()
    found, of_layer = flow.summary["RNNCell.h"], scaled_identity(factor).summary["RNN.h"]
    assert found.verdict == of_layer.verdict
    assert found.ratio == pytest.approx(of_layer.ratio)


def test_a_gradient_that_left_the_range_is_exploding() -> None:
    assert scaled_identity(1e80).summary["RNN.h"].verdict == "exploding"
    assert scaled_identity(0.0).summary["RNN.h"].verdict == "vanishing"


def test_a_layer_that_does_not_matter_has_no_gradient() -> None:
    layer = fastrnn.GRU(3, 4)
    with fastrnn.gradient_flow(layer) as flow:
        (layer(torch.randn(STEPS, ROWS, 3))[0] * 0).sum().backward()
    assert flow.summary["GRU.h"].verdict == "no gradient"
    assert "no gradient" in flow.table()


def test_the_picture_is_a_png_with_a_line_for_each_curve(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    layer = fastrnn.LSTM(3, 4, bidirectional=True)
    with fastrnn.gradient_flow(layer) as flow:
        layer(torch.randn(STEPS, ROWS, 3))[0].sum().backward()
    flow.plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = flow.figure().axes
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == list(flow.norms)
    for line, norms in zip(axes.lines, flow.norms.values(), strict=True):
        assert torch.equal(torch.as_tensor(line.get_ydata()), norms)


class _Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.figures: list[tuple[str, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = (value, step)

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        assert figure.axes
        self.figures.append((tag, step))


def test_log_writes_scalars_and_a_figure() -> None:
    pytest.importorskip("matplotlib")
    flow, writer = scaled_identity(0.5), _Writer()
    flow.log(writer, 7)
    found = flow.summary["RNN.h"]
    assert writer.scalars == {
        f"gradient_flow/RNN.h/{name}": (getattr(found, name), 7)
        for name in ("first", "last", "entering", "ratio")
    }
    assert writer.figures == [("gradient_flow", 7)]
    flow.log(writer, 8, figure=False)
    assert len(writer.figures) == 1
    assert writer.scalars["gradient_flow/RNN.h/last"][1] == 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_log_writes_what_tensorboard_reads(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    flow = scaled_identity(0.5)
    with SummaryWriter(tmp_path) as writer:
        flow.log(writer, 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("gradient_flow/RNN.h/ratio")
    assert (event.step, event.value) == (3, pytest.approx(0.5**50, rel=1e-6))
    assert events.Tags()["images"] == ["gradient_flow"]
