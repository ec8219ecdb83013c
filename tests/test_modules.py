"""The layers as modules: whatever may be done to a torch.nn layer may be done to ours."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import pickletools
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import fastrnn
from ddp_worker import Net, model_and_batch
from pairs import CELLS, LAYERS, assert_same, backward, fresh, outcome, pair, tensors

NAMES = LAYERS + CELLS
F64 = torch.float64


def inputs(name: str, dtype: torch.dtype = F64) -> tuple[Any, Any]:
    """An input of size 3 and states of size 4 for a layer or cell."""
    input = torch.randn((5, 2, 3) if name in LAYERS else (2, 3)).to(dtype)
    h, c = torch.randn((2, 1, 2, 4) if name in LAYERS else (2, 2, 4)).to(dtype)
    return input, (h, c) if "LSTM" in name else h


def recurrent_weight(name: str) -> str:
    return "weight_hh_l0" if name in LAYERS else "weight_hh"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every layer and cell by its class's name."""
    return str(request.param)


# ---- copies -----------------------------------------------------------------------------------


def test_deepcopy_is_equal_and_independent(name: str) -> None:
    layer = pair(name, 3, 4, dtype=F64)[1]
    other, input = copy.deepcopy(layer), inputs(name)
    expected = outcome(layer, *input)
    assert_same(outcome(other, *input), expected, F64)
    with torch.no_grad():
        getattr(other, recurrent_weight(name)).mul_(2)
    assert_same(outcome(layer, *input), expected, F64)
    assert not torch.equal(outcome(other, *input).d_inputs[0], expected.d_inputs[0])


def test_pickle_and_torch_save(name: str) -> None:
    own = {} if "RNN" in name else {"activation": "relu"}
    layer, input = pair_of_ours(name, **own), inputs(name)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert repr(other) == repr(layer)
        assert_same(outcome(other, *input), outcome(layer, *input), F64)


def pair_of_ours(name: str, **own: Any) -> Any:
    torch.manual_seed(1)
    return getattr(fastrnn, name)(3, 4, dtype=F64, **own)


def test_a_pickle_from_before_an_option_existed() -> None:
    for name in LAYERS:
        theirs, ours = pair(name, 3, 4, 2, bidirectional=True, dtype=F64)
        for state in (ours.__getstate__().copy(), theirs.__getstate__()):
            for option in ("proj_size", "activation", "gate_activation", "reset_after"):
                state.pop(option, None)
            old = type(ours).__new__(type(ours))
            old.__setstate__(state)
            assert old.proj_size == 0
            input = inputs(name)[0]
            assert_same(outcome(old, input), outcome(theirs, input), F64)


DATA = Path(__file__).with_name("data")


@pytest.mark.parametrize("file", ["lstm_0_1.pt", "gru_0_1.pickle", "lstm_cell_0_1.pt"])
def test_a_file_written_by_0_1_gives_what_it_gave(file: str) -> None:
    if file.endswith(".pt"):
        saved = torch.load(DATA / file, weights_only=False)
    else:
        saved = pickle.loads((DATA / file).read_bytes())
    layer = saved["layer"]
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            torch.testing.assert_close(list(tensors(copied(saved["input"]))), saved["result"])
    if file == "gru_0_1.pickle":
        assert repr(layer) == (
            "GRU(3, 4, batch_first=True, activation=relu, reset_after=False, layer_norm=True, "
            "heads=2, recurrent_dropout=0.2, zoneout=0.1, learn_initial_state=True, grad_clip=1.0)"
        )


def test_a_pickle_names_the_layers_class_and_torchs_alone(name: str) -> None:
    layer = getattr(fastrnn, name)(3, 4)
    layer(inputs(name, torch.float32)[0])
    with torch.no_grad():
        layer(inputs(name, torch.float32)[0])
    strings = [a for _, a, _ in pickletools.genops(pickle.dumps(layer)) if isinstance(a, str)]
    assert [text for text in strings if "fastrnn" in text] == ["fastrnn.nn"]
    assert not {"_options", "_weight_shapes", "_prepared"} & set(layer.__getstate__())


def test_load_state_dict_with_assign(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    loaded = {key: torch.randn_like(value, dtype=F64) for key, value in theirs.state_dict().items()}
    for layer in (theirs, ours):
        layer.load_state_dict(loaded, strict=True, assign=True)
    input = inputs(name)
    assert_same(outcome(ours, *input), outcome(theirs, *input), F64)


def test_meta_then_to_empty(name: str) -> None:
    theirs, _ = pair(name, 3, 4, dtype=F64)
    ours = getattr(fastrnn, name)(3, 4, device="meta", dtype=F64)
    assert all(p.device.type == "meta" for p in ours.parameters())
    shapes = [tuple(t.shape) for t in tensors(ours(inputs(name)[0].to("meta")))]
    with torch.no_grad():
        assert [t.shape for t in tensors(ours(inputs(name)[0].to("meta")))] == shapes
    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict())
    input = inputs(name)
    expected = outcome(theirs, *input)
    assert shapes == [tuple(t.shape) for t in expected.outputs]
    assert_same(outcome(ours, *input), expected, F64)


def test_to_another_dtype_and_back(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=F64)
    input, narrow = inputs(name), inputs(name, torch.float32)
    expected = outcome(theirs.float(), *narrow)
    assert_same(outcome(ours.float(), *narrow), expected, torch.float32)
    assert_same(outcome(ours.double(), *input), outcome(theirs.double(), *input), F64)


def test_share_memory(name: str) -> None:
    layer = pair(name, 3, 4, dtype=F64)[1]
    input = inputs(name)
    expected = outcome(layer, *input)
    assert layer.share_memory() is layer
    assert all(p.is_shared() for p in layer.parameters())
    assert_same(outcome(layer, *input), expected, F64)


# ---- weights that change ----------------------------------------------------------------------


def test_every_way_to_change_a_weight_is_seen(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=F64)
    input, weight = inputs(name), recurrent_weight(name)
    values = torch.randn(3, *getattr(ours, weight).shape, dtype=F64)
    for layer in (theirs, ours):
        getattr(layer, weight).data = values[0].clone()
    assert_same(outcome(ours, *input), outcome(theirs, *input), F64)
    for layer in (theirs, ours):
        setattr(layer, weight, torch.nn.Parameter(values[1].t().contiguous().t()))
    assert_same(outcome(ours, *input), outcome(theirs, *input), F64)
    for layer in (theirs, ours):
        with torch.no_grad():
            getattr(layer, weight).copy_(values[2])
    assert_same(outcome(ours, *input), outcome(theirs, *input), F64)


def test_frozen_weights_get_no_gradient(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=F64)
    input, weight = inputs(name), recurrent_weight(name)
    for layer in (theirs, ours):
        getattr(layer, weight).requires_grad_(False)
    expected = outcome(theirs, *input)
    assert weight not in expected.d_weights
    assert_same(outcome(ours, *input), expected, F64)
    assert getattr(ours, weight).grad is None
    for layer in (theirs, ours):
        layer.requires_grad_(False)
    assert_same(outcome(ours, *input), outcome(theirs, *input), F64)


def test_functional_call(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=F64)
    input = inputs(name)
    before = outcome(ours, *input)
    gradients = []
    for layer in (theirs, ours):
        torch.manual_seed(5)
        weights = {n: torch.randn_like(p).requires_grad_() for n, p in layer.named_parameters()}
        outputs = list(tensors(functional_call(layer, weights, input)))
        backward(outputs)
        gradients.append([*(o.detach() for o in outputs), *(w.grad for w in weights.values())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-11)
    assert_same(outcome(ours, *input), before, F64)


class Scaled(torch.nn.Module):
    """A parametrization: the weight is half of what is stored."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def test_parametrize(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=F64)
    weight = recurrent_weight(name)
    parametrize.register_parametrization(ours, weight, Scaled())
    input = inputs(name)
    expected = outcome(theirs, *input)
    with parametrize.cached():
        cached = outcome(ours, *input)
    assert_same(outcome(copy.deepcopy(ours), *input), cached, F64)
    original = ours.parametrizations[weight].original
    ours_now = outcome(ours, *input)
    assert_same(ours_now, cached, F64)
    key = f"parametrizations.{weight}.original"
    renamed = {weight if n == key else n: g for n, g in ours_now.d_weights.items()}
    renamed[weight] = renamed[weight] * 2  # d stored = d weight / 2
    renamed = {n: renamed[n] for n in expected.d_weights}
    assert_same(ours_now._replace(d_weights=renamed), expected, F64)
    with torch.no_grad():
        original.zero_()
        getattr(theirs, weight).zero_()
    torch.testing.assert_close(
        outcome(ours, *input).outputs, outcome(theirs, *input).outputs, rtol=1e-12, atol=1e-12
    )
    parametrize.remove_parametrizations(ours, weight)
    assert type(ours) is getattr(fastrnn, name)
    assert_same(outcome(ours, *input), outcome(theirs, *input), F64)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, parametrizations.weight_norm])
def test_weight_norm(name: str, norm: Any) -> None:
    layers = [norm(layer, recurrent_weight(name)) for layer in pair(name, 3, 4, dtype=F64)]
    input = inputs(name)
    for _ in range(2):
        expected = outcome(layers[0], *input)
        assert_same(outcome(layers[1], *input), expected, F64)
        for layer in layers:
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(0.1)


def test_replicas_of_data_parallel_use_the_weights_they_were_given(name: str) -> None:
    layer = pair(name, 3, 4, dtype=F64)[1]
    replica, input = layer._replicate_for_data_parallel(), inputs(name)
    for key, parameter in layer.named_parameters():
        setattr(replica, key, parameter.detach() * 1)
    torch.testing.assert_close(replica(*input), layer(*input), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "device", "none"])
def test_weights_that_do_not_fit_are_refused(name: str, wrong: str) -> None:
    layer, weight = pair(name, 3, 4)[1], recurrent_weight(name)
    old = getattr(layer, weight)
    new: dict[str, Any] = {
        "shape": torch.nn.Parameter(old[:, :2].detach().clone()),
        "dtype": torch.nn.Parameter(old.detach().double()),
        "device": torch.nn.Parameter(old.detach().to("meta")),
        "none": None,
    }
    setattr(layer, weight, new[wrong])
    said = {"shape": weight, "dtype": "same dtype", "device": "device", "none": weight}
    with pytest.raises(TypeError if wrong == "none" else RuntimeError, match=said[wrong]):
        layer(*inputs(name, torch.float32))


def test_a_cell_that_lost_one_bias() -> None:
    for name in CELLS:
        theirs, ours = pair(name, 3, 4, dtype=F64)
        for cell in (theirs, ours):
            cell.bias_ih = None
        input = inputs(name)
        assert_same(outcome(ours, *input), outcome(theirs, *input), F64)


# ---- the surface of torch.nn's bases ----------------------------------------------------------


def raised(call: Any, *args: Any) -> tuple[type, str] | None:
    try:
        call(*args)
    except (ValueError, RuntimeError) as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("own", [{}, {"bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("cell", [*LAYERS, "projected"])
def test_the_checks_of_rnnbase_accept_and_refuse_what_torchs_do(
    cell: str, own: dict[str, Any]
) -> None:
    name = "LSTM" if cell == "projected" else cell
    theirs, ours = pair(name, 3, 4, 2, **own, **({"proj_size": 2} if cell == "projected" else {}))
    sizes, told = torch.tensor([3, 2]), []
    shapes = [(5, 2, 3), (5, 2, 4), (5, 3), (3,), (2, 5, 3)]
    states = [(L, B, H) for L in (2, 4) for B in (2, 3, 5) for H in (2, 4)] + [(2, 4)]
    for layer in (theirs, ours):
        said: list[Any] = []
        for shape, dtype in itertools.product(shapes, (torch.float32, F64)):
            input = torch.zeros(shape, dtype=dtype)
            said += [raised(layer.check_input, input, given) for given in (None, sizes)]
        for batch_sizes, input in ((None, torch.zeros(5, 2, 3)), (sizes, torch.zeros(5, 3))):
            said.append(layer.get_expected_hidden_size(input, batch_sizes))
            if name == "LSTM":
                said.append(layer.get_expected_cell_size(input, batch_sizes))
            for shape in states:
                state: Any = torch.zeros(shape)
                expected = layer.get_expected_hidden_size(input, batch_sizes)
                said.append(raised(layer.check_hidden_size, state, expected))
                hidden = (state, state) if name == "LSTM" else state
                for check in (layer.check_forward_args, getattr(torch.nn, name).check_forward_args):
                    bound = () if check == layer.check_forward_args else (layer,)
                    said.append(raised(check, *bound, input, hidden, batch_sizes))
        told.append(said)
    assert told[1] == told[0]
    assert any(told[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_permute_hidden_is_torchs(layer: str) -> None:
    theirs, ours = pair(layer, 3, 4)
    h, c = torch.randn(2, 1, 3, 4)
    hx = (h, c) if layer == "LSTM" else h
    for order in (None, torch.tensor([2, 0, 1])):
        expected = list(tensors(theirs.permute_hidden(hx, order)))
        assert all(map(torch.equal, tensors(ours.permute_hidden(hx, order)), expected))
    assert ours.permute_hidden(hx, None) is hx


def test_only_the_lstm_has_get_expected_cell_size() -> None:
    for layer in LAYERS:
        for home in (torch.nn, fastrnn):
            assert hasattr(getattr(home, layer), "get_expected_cell_size") == (layer == "LSTM")


def test_torchs_unbound_methods_work_on_ours(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=F64)
    torchs, base = getattr(torch.nn, name), "RNNBase" if name in LAYERS else "RNNCellBase"
    for layer in (theirs, ours):
        torch.manual_seed(5)
        getattr(torch.nn, base).reset_parameters(layer)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert torchs.extra_repr(ours) == "3, 4"
    input = inputs(name)
    if name in LAYERS:
        assert torchs.flatten_parameters(ours) is None
        assert [len(weights) for weights in torchs.all_weights.fget(ours)] == [4]
        expected = (1, 2, 4)
        assert torchs.get_expected_hidden_size(ours, input[0], None) == expected
        if name == "LSTM":
            assert torchs.get_expected_cell_size(ours, input[0], None) == expected
    torch.testing.assert_close(
        list(tensors(torchs.forward(ours, *input))), list(tensors(theirs(*input)))
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_weights_written_to_flat_weights_are_used_until_the_parameter_changes(layer: str) -> None:
    input = inputs(layer)[0]
    theirs, ours = pair(layer, 3, 4, dtype=F64)

    def both() -> None:
        for graph in (torch.no_grad(), torch.enable_grad()):
            with graph:
                torch.testing.assert_close(ours(input), theirs(input), rtol=1e-12, atol=1e-12)

    for written in (theirs, ours):
        written._flat_weights = [weight * 2 for weight in written._flat_weights]
    both()
    copied = copy.deepcopy(torch.nn.ParameterList(ours.parameters()))
    assert all(map(torch.equal, copied, theirs.parameters()))  # the parameters are as they were
    for written in (theirs, ours):
        written._flat_weights[1] = written._flat_weights[1].detach() * 3
        assert torch.equal(written._flat_weights[1], written.weight_hh_l0 * 6)
    both()
    weight = torch.nn.Parameter(torch.randn_like(theirs.weight_hh_l0))
    for written in (theirs, ours):
        written.weight_hh_l0 = weight
        written._flat_weights = [getattr(written, n) for n in written._flat_weights_names]
    both()
    for written in (theirs, ours):
        written._flat_weights = [weight * 2 for weight in written._flat_weights]
        written.to(torch.float64)
    both()
    for written in (theirs, ours):
        written._flat_weights[0:2] = [w.detach() * 2 for w in written._flat_weights[0:2]]
    both()
    with pytest.raises(ValueError, match=r"_flat_weights must hold 4 tensors, .*; got 1"):
        ours._flat_weights = [weight]


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_reach_what_was_written_to_flat_weights(layer: str) -> None:
    gradients = []
    input = inputs(layer)[0]
    for written in pair(layer, 3, 4, dtype=F64):
        scale = torch.tensor(1.5, dtype=F64, requires_grad=True)
        written._flat_weights = [weight * scale for weight in written._flat_weights]
        next(tensors(written(input))).sum().backward()
        gradients.append([scale.grad, *(p.grad for p in written.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-11)


# ---- odd cells --------------------------------------------------------------------------------


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_without_hidden_units(cell: str, bias: bool, unbatched: bool) -> None:
    theirs, ours = pair(cell, 3, 0, bias=bias)
    input = torch.randn(3) if unbatched else torch.randn(2, 3)
    state = torch.randn((*input.shape[:-1], 0))
    for hx in (None, (state, state) if cell == "LSTMCell" else state):
        assert_same(outcome(ours, input, hx), outcome(theirs, input, hx), torch.float32)
        with torch.no_grad():
            shapes = [[t.shape for t in tensors(c(input, hx))] for c in (theirs, ours)]
        assert shapes[1] == shapes[0]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_that_lost_its_training_attribute(cell: str) -> None:
    theirs, ours = pair(cell, 3, 4, dtype=F64)
    zoned = getattr(fastrnn, cell)(3, 4, zoneout=0.5, dtype=F64)
    input = inputs(cell)
    expected = list(tensors(zoned.eval()(*input)))
    for module in (theirs, ours, zoned):
        del module.training
    assert_same(outcome(ours, *input), outcome(theirs, *input), F64)
    assert all(map(torch.equal, tensors(zoned(*input)), expected))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("input", "state", "said"),
    [
        ((3,), (4, 4), "must be 1-D beside a 1-D input, got 2-D of shape (4, 4)"),
        ((3,), (2, 4), "has inconsistent hidden_size: got 2, expected 4"),
        ((4, 3), (4,), "must be 2-D beside a 2-D input, got 1-D of shape (4,)"),
        ((2, 3), (2,), "must be 2-D beside a 2-D input, got 1-D of shape (2,)"),
        ((2, 3), (4,), "Input batch size 2 doesn't match hidden0 batch size 4"),
    ],
    ids=str,
)
def test_rows_beside_batches_are_refused_in_words_that_agree(
    cell: str, input: tuple[int, ...], state: tuple[int, ...], said: str
) -> None:
    h = torch.randn(state)
    with pytest.raises(RuntimeError, match=re.escape(said)):
        getattr(fastrnn, cell)(3, 4)(torch.randn(input), (h, h) if cell == "LSTMCell" else h)


@pytest.mark.parametrize("cell", CELLS)
def test_errors_of_a_users_cell_name_torchs_class(cell: str) -> None:
    users = type("Mine", (getattr(fastrnn, cell),), {})
    with pytest.raises(ValueError, match=f"^{cell}: Expected input to be 1D or 2D, got 3D"):
        users(3, 4)(torch.randn(1, 2, 3))


# ---- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
def test_optimiser_steps_follow_torchs(name: str, optimiser: Any) -> None:
    input, losses = inputs(name), []
    for layer in pair(name, 3, 4, dtype=F64):
        optim = optimiser(layer.parameters(), lr=0.05)
        losses.append([])
        for _ in range(10):
            optim.zero_grad()
            loss = sum((o - 0.3).square().mean() for o in tensors(layer(*input)))
            loss.backward()
            optim.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[1][-1] < losses[1][0]


def test_backward_twice_with_retain_graph(name: str) -> None:
    layer = pair(name, 3, 4, dtype=F64)[1]
    input = fresh(inputs(name))
    loss = sum(t.square().sum() for t in tensors(layer(*input)))
    loss.backward(retain_graph=True)
    leaves = [*tensors(input), *layer.parameters()]
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    for tensor, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient, rtol=1e-15, atol=0)


def test_backward_a_second_time_without_it_is_torchs_error(name: str) -> None:
    for layer in pair(name, 3, 4, dtype=F64):
        loss = next(tensors(layer(*inputs(name)))).square().sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_backward_in_eval(name: str) -> None:
    theirs, ours = (layer.eval() for layer in pair(name, 3, 4, dtype=F64))
    input = inputs(name)
    assert_same(outcome(ours, *input), outcome(theirs, *input), F64)


def test_new_states_of_a_cell_are_detached_in_place() -> None:
    for name in CELLS:
        for state in tensors(getattr(fastrnn, name)(3, 4)(torch.randn(2, 3))):
            state.detach_()  # as in truncated backpropagation; torch refuses it to a view
            assert not state.requires_grad


def test_no_grad_and_inference_mode_give_the_same_values(name: str) -> None:
    layer, input = pair(name, 3, 4, dtype=F64)[1], inputs(name)
    expected = [t.detach() for t in tensors(layer(*input))]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            actual = list(tensors(layer(*input)))
        assert not any(t.requires_grad for t in actual)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_double_backward(name: str) -> None:
    layer = pair(name, 2, 3, dtype=F64)[1]
    input = torch.randn((3, 2, 2) if name in LAYERS else (2, 2), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: next(tensors(layer(x))), input)
    assert torch.autograd.gradgradcheck(lambda x: next(tensors(layer(x))), input)


def test_two_processes_of_ddp_give_the_gradients_of_one(tmp_path: Path) -> None:
    result = tmp_path / "gradients.pt"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    worker = Path(__file__).with_name("ddp_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(tmp_path / "rendezvous"), result],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    layers, batch = model_and_batch()
    Net(layers)(batch).square().mean().backward()
    for key, gradient in torch.load(result).items():
        torch.testing.assert_close(gradient, layers.get_parameter(key).grad, rtol=1e-12, atol=1e-14)


def test_compile_traces_the_whole_forward(name: str) -> None:
    layer = pair(name, 3, 4, dtype=F64)[1]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = inputs(name)
    torch.testing.assert_close(compiled(*input), layer(*input), rtol=0, atol=0)
    if name in LAYERS:
        arguments = {
            "lengths": torch.tensor([5, 2]),
            "reset": torch.rand(5, 2) < 0.3,
            "return_states": True,
        }
        expected = layer(*input, **arguments)
        torch.testing.assert_close(compiled(*input, **arguments), expected, rtol=0, atol=0)


def test_compile_traces_the_whole_forward_under_autocast(name: str) -> None:
    layer, (input, _) = getattr(fastrnn, name)(3, 4), inputs(name)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = compiled(input.to(dtype)), layer(input.to(dtype))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---- warnings and options ---------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_of_one_layer_warns_as_torch_does_where_it_is_constructed(layer: str) -> None:
    said = []
    for home in (torch.nn, fastrnn):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as caught:
            getattr(home, layer)(3, 4, dropout=0.5)
        said.append((caught[0].category, str(caught[0].message)))
    assert said[1] == said[0]
    assert caught[0].filename == __file__


def test_nothing_warns_of_weights_that_are_not_contiguous() -> None:
    for name in LAYERS:
        theirs, ours = pair(name, 3, 4, 2, dtype=F64)
        for layer in (theirs, ours):
            for weight in layer.parameters():
                if weight.dim() == 2:
                    weight.data = weight.data.t().contiguous().t()
        input = inputs(name)[:1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = outcome(ours, *input)
        assert not caught
        assert_same(actual, outcome(theirs, *input), F64)


def test_repr_shows_the_options_that_are_on() -> None:
    assert repr(fastrnn.LSTM(3, 4, activation="relu")) == "LSTM(3, 4, activation=relu)"
    shown = "GRU(3, 4, num_layers=2, gate_activation=hardsigmoid, reset_after=False)"
    assert repr(fastrnn.GRU(3, 4, 2, gate_activation="hardsigmoid", reset_after=False)) == shown
    assert repr(fastrnn.RNN(3, 4, nonlinearity="sigmoid")) == "RNN(3, 4, nonlinearity=sigmoid)"
    assert repr(fastrnn.RNN(3, 4, nonlinearity="relu")) == "RNN(3, 4)"
    assert repr(fastrnn.GRUCell(3, 4, reset_after=False)) == "GRUCell(3, 4, reset_after=False)"


def test_unknown_options_are_refused_by_name() -> None:
    for make in (fastrnn.LSTM, fastrnn.GRU, fastrnn.LSTMCell, fastrnn.GRUCell):
        with pytest.raises(ValueError, match=r"activation must be one of .*'step'"):
            make(3, 4, activation="step")
        with pytest.raises(ValueError, match=r"gate_activation must be one of .*'step'"):
            make(3, 4, gate_activation="step")
    with pytest.raises(ValueError, match="Unknown nonlinearity 'step'"):
        fastrnn.RNN(3, 4, nonlinearity="step")
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        fastrnn.GRU(3, 4, proj_size=2)


def test_a_cell_is_one_step_of_its_layer(name: str) -> None:
    if name in LAYERS:
        own: list[dict[str, Any]] = [{}]
        if name == "RNN":
            own += [{"nonlinearity": n} for n in ("relu", "sigmoid", "identity")]
        else:
            own += [{"activation": a} for a in ("relu", "sigmoid", "identity")]
            own += [{"gate_activation": "hardsigmoid"}]
        if name == "GRU":
            own += [{"reset_after": False}]
        for options in own:
            layer = getattr(fastrnn, name)(3, 4, dtype=F64, **options)
            cell = getattr(fastrnn, f"{name}Cell")(3, 4, dtype=F64, **options)
            cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
            input, hx = inputs(name)
            state = hx[0] if name != "LSTM" else tuple(s[0] for s in hx)
            for x in input:
                state = cell(x, state)
            flat = [t.squeeze(0) for t in tensors(layer(input, hx)[1])]
            torch.testing.assert_close(list(tensors(state)), flat, rtol=1e-13, atol=1e-13)
