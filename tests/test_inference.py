"""The short way without gradients: it equals the long one, and sees every change of a weight."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

import fastrnn
from fastrnn import _C

if TYPE_CHECKING:
    from collections.abc import Callable

T, B, I, H = 5, 3, 20, 24  # noqa: E741


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in flat(part)]


def long_way(module: torch.nn.Module, *arguments: Any) -> list[Tensor]:
    with patch.object(_C, "layer", return_value=None), torch.no_grad():
        return flat(module(*arguments))


def short_way(module: torch.nn.Module, *arguments: Any) -> list[Tensor]:
    """As users call it; whether the short way is then taken, `takes_the_short_way` says."""
    with torch.no_grad():
        return flat(module(*arguments))


def takes_the_short_way(module: torch.nn.Module, *arguments: Any) -> bool:
    answers = []

    def spy(*given: Any) -> Any:
        answers.append(original(*given))
        return answers[-1]

    original = _C.layer
    with patch.object(_C, "layer", spy):
        module(*arguments)
    return answers == [answers[-1]] and answers[-1] is not None


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- the same as the long way -------------------------------------------------------------------

LAYERS = {
    "lstm": lambda **o: fastrnn.LSTM(I, H, **o),
    "gru": lambda **o: fastrnn.GRU(I, H, **o),
    "gru-before": lambda **o: fastrnn.GRU(I, H, reset_after=False, **o),
    "rnn": lambda **o: fastrnn.RNN(I, H, nonlinearity="relu", **o),
    "lstm-projected": lambda **o: fastrnn.LSTM(I, H, proj_size=7, **o),
    "lstm-sigmoid": lambda **o: fastrnn.LSTM(I, H, activation="sigmoid", **o),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"bias": False}],
    ids=["plain", "stack", "batch-first", "no-bias"],
)
def test_layer_equals_the_long_way(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    layer = LAYERS[name](**options, dtype=dtype)
    shape = (B, T, I) if layer.batch_first else (T, B, I)
    input = torch.randn(shape).to(dtype)
    groups = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(groups, B, layer.proj_size or H).to(dtype)
    hx: Any = (h, torch.randn(groups, B, H).to(dtype)) if name.startswith("lstm") else h
    for arguments in [(input,), (input, hx), (input.transpose(0, 1).contiguous().transpose(0, 1),)]:
        expected = long_way(layer, *arguments)
        assert_same(short_way(layer, *arguments), expected)
        with torch.no_grad():
            assert takes_the_short_way(layer, *arguments)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell_equals_the_long_way(cell: str, bias: bool) -> None:
    module = getattr(fastrnn, cell)(I, H, bias=bias)
    input, h = torch.randn(B, I), torch.randn(B, H)
    hx: Any = (h, torch.randn(B, H)) if cell == "LSTMCell" else h
    for arguments in [(input,), (input, hx), (input[0],)]:
        assert_same(short_way(module, *arguments), long_way(module, *arguments))


def test_empty_batch_and_long_sequences() -> None:
    layer = fastrnn.GRU(I, H)
    for input in (torch.randn(T, 0, I), torch.randn(3000, 2, I)):
        assert_same(short_way(layer, input), long_way(layer, input))


@pytest.mark.parametrize(
    "bad",
    [
        torch.randn(T, B, I + 1),
        torch.randn(T, B, I).double(),
        torch.randn(0, B, I),
        torch.randn(T, B, I, device="meta"),
        "text",
        None,
    ],
    ids=["size", "dtype", "no-steps", "device", "text", "none"],
)
def test_errors_are_those_of_the_long_way(bad: Any) -> None:
    layer = fastrnn.LSTM(I, H)
    with pytest.raises(Exception) as expected:
        long_way(layer, bad)
    with pytest.raises(type(expected.value)) as got:
        short_way(layer, bad)
    assert str(got.value) == str(expected.value)


def test_tensors_with_a_pending_negation_go_the_long_way() -> None:
    layer = fastrnn.GRU(I, H)
    input = torch.randn(T, B, I, dtype=torch.complex64).conj().imag
    assert input.is_neg()
    assert_same(short_way(layer, input), long_way(layer, input.clone()))


@pytest.mark.parametrize("make", [lambda: fastrnn.GRU(I, H), lambda: fastrnn.GRUCell(I, H)])
def test_weights_with_a_pending_negation(make: Callable[[], torch.nn.Module]) -> None:
    module = make()
    input = torch.randn(T, B, I) if isinstance(module, fastrnn.GRU) else torch.randn(B, I)
    expected = long_way(module, input)
    pending = {name: torch._neg_view(-p.detach()) for name, p in module.named_parameters()}
    with torch.no_grad():
        assert_same(flat(torch.func.functional_call(module, pending, (input,))), expected)
    for name, weight in pending.items():
        setattr(module, name, torch.nn.Parameter(weight))
    assert_same(short_way(module, input), expected)


class Loud(Tensor):
    """A subclass that counts the calls that see it."""


def test_subclasses_go_the_long_way() -> None:
    layer = fastrnn.GRU(I, H)
    input = torch.randn(T, B, I).as_subclass(Loud)
    output, _ = layer(input)
    assert type(output) is Loud


def test_what_is_around_a_call_sends_it_the_long_way() -> None:
    layer, input = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    assert takes_the_short_way(layer, input)  # with a gradient too
    with torch.no_grad():
        assert takes_the_short_way(layer, input)
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes_the_short_way(layer, input)
        with torch.profiler.profile() as profile:
            assert not takes_the_short_way(layer, input)
        assert any("fastrnn::forward" in event.key for event in profile.key_averages())
        with torch.autograd.forward_ad.dual_level():
            assert not takes_the_short_way(layer, input)
        batched = torch.vmap(lambda x: layer(x)[0], in_dims=1, out_dims=1)(input.unsqueeze(2))
        torch.testing.assert_close(batched.squeeze(2), layer(input)[0])
    with torch.inference_mode():
        assert takes_the_short_way(layer, input)


def test_training_dropout_is_not_skipped() -> None:
    layer = fastrnn.GRU(I, H, num_layers=2, dropout=0.5)
    input = torch.randn(T, B, I)
    with torch.no_grad():
        assert not torch.equal(layer(input)[0], layer(input)[0])
        layer.eval()
        assert torch.equal(layer(input)[0], layer(input)[0])


def test_a_gradient_is_recorded_after_inference() -> None:
    layer = fastrnn.GRU(I, H)
    input = torch.randn(T, B, I)
    short_way(layer, input)
    layer(input)[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None


def test_inference_tensors_as_weights() -> None:
    with torch.inference_mode():
        layer = fastrnn.GRU(I, H)
        input = torch.randn(T, B, I)
        first = flat(layer(input))
        layer.weight_hh_l0.mul_(2)  # no version counter says so
        second = flat(layer(input))
    assert not torch.equal(first[0], second[0])
    assert_same(second, long_way(layer, input))


# ---- every change of a weight is seen -----------------------------------------------------------


def in_place_step(layer: Any) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def fused_step(layer: Any) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()


def copy_without_gradient(layer: Any) -> None:
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.rand_like(layer.weight_hh_l0) / 8)


def one_value(layer: Any) -> None:
    with torch.no_grad():
        layer.weight_hh_l0[3, 2] += 1


def data_replaced(layer: Any) -> None:
    layer.weight_hh_l0.data = torch.rand_like(layer.weight_hh_l0) / 8


def data_replaced_again_and_again(layer: Any) -> None:
    for _ in range(20):  # memory that is let go comes back
        layer.weight_hh_l0.data = torch.rand_like(layer.weight_hh_l0) / 8
        gc.collect()


def data_written(layer: Any) -> None:
    layer.weight_ih_l0.data.mul_(0.9)  # unseen by the version counter


def bias_written(layer: Any) -> None:
    layer.bias_ih_l0.data[2:5].fill_(1.0)  # unseen, a few values


def row_written(layer: Any) -> None:
    layer.weight_hh_l0.data[7] = 0.0  # unseen


def column_written(layer: Any) -> None:
    layer.weight_ih_l0.data[:, I - 1].add_(0.1)  # unseen


def numpy_written(layer: Any) -> None:
    layer.weight_hh_l0.detach().numpy()[...] *= 0.9  # unseen


def state_dict_loaded(layer: Any) -> None:
    layer.load_state_dict(fastrnn.LSTM(I, H).state_dict())


def state_dict_assigned(layer: Any) -> None:
    layer.load_state_dict(fastrnn.LSTM(I, H).state_dict(), assign=True)


def parameter_replaced(layer: Any) -> None:
    layer.weight_hh_l0 = torch.nn.Parameter(torch.rand_like(layer.weight_hh_l0) / 8)


def storage_resized(layer: Any) -> None:
    storage, size = layer.weight_hh_l0.untyped_storage(), layer.weight_hh_l0.nbytes
    storage.resize_(0)
    torch.empty(size, dtype=torch.uint8)
    storage.resize_(size)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(layer.weight_hh_l0):
        layer.weight_hh_l0.copy_(torch.rand_like(layer.weight_hh_l0) / 8)  # as FSDP gathers


def drawn_anew(layer: Any) -> None:
    layer.reset_parameters()


def transposed_view(layer: Any) -> None:
    old = layer.weight_hh_l0
    layer.weight_hh_l0.data = old.data.view(H, -1).t()


def one_value_unseen(layer: Any) -> None:
    layer.weight_hh_l0.data.view(-1)[5] += 30.0


def block_written_by_numpy(layer: Any) -> None:
    layer.weight_hh_l0.detach().numpy()[8:16, 2:9] = 3.0


def swapped_biases(layer: Any) -> None:
    layer.bias_ih_l0.data, layer.bias_hh_l0.data = (
        layer.bias_hh_l0.data.roll(1),
        layer.bias_ih_l0.data,
    )


CHANGES: list[Callable[[Any], None]] = [
    in_place_step, fused_step, copy_without_gradient, one_value, data_replaced,
    data_replaced_again_and_again, data_written, bias_written, row_written, column_written,
    numpy_written, one_value_unseen, block_written_by_numpy, state_dict_loaded,
    state_dict_assigned, parameter_replaced, storage_resized, drawn_anew, transposed_view,
    swapped_biases,
]  # fmt: skip


@pytest.mark.parametrize("steps", [1, T, 200])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_seen(change: Callable[[Any], None], steps: int) -> None:
    layer, input = fastrnn.LSTM(I, H), torch.randn(steps, B, I)
    hx = (torch.randn(1, B, H), torch.randn(1, B, H))
    for _ in range(3):
        before = short_way(layer, input, hx)
    change(layer)
    other = torch.nn.LSTM(I, H)
    other.load_state_dict(layer.state_dict())
    expected = flat(other(input, hx))
    assert not torch.allclose(before[0], expected[0], atol=1e-5)
    for got in (short_way(layer, input, hx), flat(layer(input, hx))):  # recorded, too
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("recorded", [False, True])
def test_finite_differences_through_data_are_the_gradient(cell: str, recorded: bool) -> None:
    module = getattr(fastrnn, cell)(6, 8).double()
    input = torch.randn(*((4,) if "Cell" in cell else (5, 3)), 6, dtype=torch.float64)

    def loss() -> Tensor:
        with torch.set_grad_enabled(recorded):
            return flat(module(input))[0].pow(2).sum()

    flat(module(input))[0].pow(2).sum().backward()
    for weight in module.parameters():
        values, gradient = weight.data.view(-1), weight.grad.view(-1)
        for at in torch.randperm(values.numel())[:20].tolist():
            kept, found = values[at].item(), []
            for shift in (1e-6, -1e-6):
                values[at] = kept + shift
                found.append(loss().item())
            values[at] = kept
            assert abs((found[0] - found[1]) / 2e-6 - gradient[at]) < 1e-6


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_masks_written_through_views_are_seen(cell: str) -> None:
    layer, input = getattr(fastrnn, cell)(8, 64), torch.randn(5, 2, 8)
    for write in (
        lambda w: w.data.mul_(torch.block_diag(*[torch.ones(16, 16)] * 4).repeat(len(w) // 64, 1)),
        lambda w: [gate.tril_() for gate in w.data.split(64)],
        lambda w: w.data.clamp_(-0.05, 0.05),
        lambda w: w.detach().numpy().__setitem__((slice(0, 8), slice(8, 16)), 1),
    ):
        before = short_way(layer, input)
        write(layer.weight_hh_l0)
        other = getattr(torch.nn, cell)(8, 64)
        other.load_state_dict(layer.state_dict())
        got, expected = short_way(layer, input), flat(other(input))
        assert not torch.allclose(before[0], expected[0], atol=1e-4)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_another_dtype_is_seen() -> None:
    layer, input = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        layer.to(dtype)
        assert_same(short_way(layer, input.to(dtype)), long_way(layer, input.to(dtype)))


class Double(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("way", ["parametrize", "weight-norm", "functional-call"])
def test_weights_that_are_computed(way: str) -> None:
    layer, input = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    before = short_way(layer, input)
    if way == "functional-call":
        other = {name: 2 * p.detach() for name, p in layer.named_parameters()}
        with torch.no_grad():
            inside = flat(torch.func.functional_call(layer, other, (input,)))
        assert not torch.equal(inside[0], before[0])
        assert_same(short_way(layer, input), before)
        layer.load_state_dict(other)
        assert_same(inside, long_way(layer, input))
        return
    if way == "parametrize":
        parametrize.register_parametrization(layer, "weight_hh_l0", Double())
    else:
        parametrizations.weight_norm(layer, "weight_hh_l0")
        with torch.no_grad():
            layer.parametrizations.weight_hh_l0.original0.mul_(2)  # type: ignore[index,union-attr]
    assert not torch.equal(short_way(layer, input)[0], before[0])
    assert_same(short_way(layer, input), long_way(layer, input))


# ---- the life of a layer ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: fastrnn.GRU(I, H), lambda: fastrnn.GRUCell(I, H)])
def test_copies_and_pickles_carry_nothing(make: Callable[[], torch.nn.Module]) -> None:
    module = make()
    input = torch.randn(T, B, I) if isinstance(module, fastrnn.GRU) else torch.randn(B, I)
    expected = short_way(module, input)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert other._prepared is not module._prepared
        assert_same(short_way(other, input), expected)
        with torch.no_grad():
            next(other.parameters()).mul_(2)
        assert_same(short_way(module, input), expected)


def test_a_call_keeps_no_weight_alive() -> None:
    layer = fastrnn.GRU(I, H)
    short_way(layer, torch.randn(T, B, I))
    weight = weakref.ref(layer.weight_hh_l0)
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros(3 * H, H))
    assert weight() is None


def test_many_threads_share_a_layer() -> None:
    layer = fastrnn.LSTM(64, 64)
    inputs = [torch.randn(T, B, 64) for _ in range(8)]
    expected = [long_way(layer, x) for x in inputs]

    def work(k: int) -> list[Tensor]:
        with torch.no_grad():
            for _ in range(50):
                found = flat(layer(inputs[k]))
        return found

    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(work, range(8)), expected, strict=True):
            assert_same(got, want)
