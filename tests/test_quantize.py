"""Layers with int8 weights: the formula at every step, the bits of a stream, torch's habits."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import _C
from test_stream import LAYERS, int8_product, steps, uniform

T, B, I, H = 7, 3, 20, 24  # noqa: E741
EXAMPLES = Path(__file__).parents[1] / "examples"
RESETS = torch.arange(T * B).reshape(T, B) % 4 == 1


def quantised(layer: Any) -> Any:
    return fastrnn.quantize_dynamic(layer)


def equal(a: Any, b: Any) -> bool:
    """Whether nested results have the same bits."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the formula --------------------------------------------------------------------------------

FUNCTIONS = {
    "tanh": np.tanh,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "hardsigmoid": lambda a: np.clip(a / 6 + 0.5, 0, 1),
    "relu": lambda a: np.maximum(a, 0),
}


def numpy_step(
    layer: Any, weights: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """One step of rows: products of int8, all else in float64."""
    act = FUNCTIONS[getattr(layer, "activation", getattr(layer, "nonlinearity", "tanh"))]
    gate = FUNCTIONS[getattr(layer, "gate_activation", "sigmoid")]
    a_x = int8_product(x, weights["weight_ih"]) + weights["bias_ih"]
    w_hh, b_hh = weights["weight_hh"], weights["bias_hh"]
    units = len(b_hh) // {"RNN": 1, "LSTM": 4, "GRU": 3}[layer._cell]
    if layer._cell == "RNN":
        return act(a_x + int8_product(h, w_hh) + b_hh), None
    if layer._cell == "LSTM":
        i, f, g, o = np.split(a_x + int8_product(h, w_hh) + b_hh, 4, axis=1)
        c_n = gate(f) * c + gate(i) * act(g)
        h_n = gate(o) * act(c_n)
        return int8_product(h_n, weights["weight_hr"]) if layer.proj_size else h_n, c_n
    r_x, z_x, n_x = np.split(a_x, 3, axis=1)
    r_h, z_h = np.split(int8_product(h, w_hh[: 2 * units]) + b_hh[: 2 * units], 2, axis=1)
    r, z = gate(r_x + r_h), gate(z_x + z_h)
    w_hn, b_hn = w_hh[2 * units :], b_hh[2 * units :]
    if layer.reset_after:
        n = act(n_x + r * (int8_product(h, w_hn) + b_hn))
    else:
        n = act(n_x + int8_product(r * h, w_hn) + b_hn)
    return (1 - z) * n + z * h, None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", ["all", "lengths", "reset"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_step_is_what_the_formula_says(name: str, rows: str, bidirectional: bool) -> None:
    """In NumPy, from the states that the layer returns: rounding of the float part is left."""
    float_layer = LAYERS[name](num_layers=2, bidirectional=bidirectional)
    layer = quantised(float_layer)
    directions = 2 if bidirectional else 1
    out = layer.proj_size or H
    lengths = [T, 2, 4] if rows == "lengths" else [T] * B
    reset = RESETS if rows == "reset" else torch.zeros(T, B, dtype=torch.bool)
    x = uniform(T, B, I)
    h_0, c_0 = uniform(2 * directions, B, out), uniform(2 * directions, B, H)
    lstm = layer._cell == "LSTM"
    options = {"lengths": lengths} if rows == "lengths" else {"reset": reset}
    output, hx_n, states = layer(x, (h_0, c_0) if lstm else h_0, return_states=True, **options)
    h_n, c_n = hx_n if lstm else (hx_n, None)
    # A second product rounds what was computed in float: a value there may round the other way.
    atol = 4e-3 if layer.proj_size or name == "gru-before" else 4e-6
    below = x.numpy()
    for k in range(2):
        for d in range(directions):
            suffix = f"_l{k}{'_reverse' if d else ''}"
            weights = {
                kind: getattr(float_layer, kind + suffix).detach().numpy()
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
                if hasattr(float_layer, kind + suffix)
            }
            for b in range(B):
                h, c = h_0[k * directions + d, b], c_0[k * directions + d, b]
                for s in range(lengths[b]):
                    t = lengths[b] - 1 - s if d else s
                    boundary = t + 1 if d else t
                    if boundary < T and reset[boundary, b]:
                        h, c = torch.zeros(out), torch.zeros(H)
                    got_h = states.h[k, t, b, d * out : (d + 1) * out]
                    got_c = states.c[k, t, b, d * H : (d + 1) * H] if lstm else None
                    before = h.numpy()[None], c.numpy()[None] if lstm else None
                    want_h, want_c = numpy_step(layer, weights, below[t, b][None], *before)
                    np.testing.assert_allclose(got_h[None], want_h, rtol=4e-6, atol=atol)
                    if lstm:
                        np.testing.assert_allclose(got_c[None], want_c, rtol=4e-6, atol=4e-6)
                    h, c = got_h, got_c if lstm else c
                assert torch.equal(h_n[k * directions + d, b], h)
                assert not lstm or torch.equal(c_n[k * directions + d, b], c)
        below = states.h[k].numpy()
    assert torch.equal(output, states.h[1])
    for b in range(B):
        assert not output[lengths[b] :, b].any()


@pytest.mark.parametrize("name", LAYERS)
def test_int8_is_close_to_float32(name: str) -> None:
    layer = LAYERS[name](num_layers=2, bidirectional=True)
    x = uniform(30, B, I)
    with torch.no_grad():
        expected = layer(x)[0]
    error = (quantised(layer)(x)[0] - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.03


# ---- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layers", [1, 3])
def test_one_direction_has_the_bits_of_a_stream(name: str, layers: int) -> None:
    layer = LAYERS[name](num_layers=layers)
    x = uniform(T, B, I)
    expected = quantised(layer)(x)[0]
    assert torch.equal(steps(fastrnn.Stream(layer, B, "int8"), x), expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_bits_do_not_depend_on_the_batch_or_on_threads(name: str, bidirectional: bool) -> None:
    layer = quantised(LAYERS[name](num_layers=2, bidirectional=bidirectional))
    x = uniform(40, 19, I)
    whole = layer(x)[0]
    for row in (0, 7, 18):
        assert torch.equal(layer(x[:, row : row + 1])[0], whole[:, row : row + 1])
    assert torch.equal(layer(x[:, ::2])[0], whole[:, ::2])


def test_threads_that_share_units_give_the_same_bits() -> None:
    layer = quantised(fastrnn.LSTM(512, 520, num_layers=2, bidirectional=True))
    x = uniform(9, 1, 512)
    expected = layer(x)[0]
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(layer(x)[0], expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_give_the_bits_of_the_whole(name: str) -> None:
    layer = quantised(LAYERS[name](num_layers=2))
    x = uniform(T, B, I)
    whole, final = layer(x)
    parts, hx = [], None
    for begin, end in ((0, 1), (1, 4), (4, T)):
        part, hx = layer(x[begin:end], hx)
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)
    assert equal(hx, final)


# ---- forms of the input -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_have_the_bits_of_lengths(name: str) -> None:
    layer = quantised(LAYERS[name](num_layers=2, bidirectional=True))
    x, lengths = uniform(T, B, I), [2, T, 5]
    expected, final = layer(x, lengths=lengths)
    packed, hx_n = layer(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
    assert torch.equal(pad_packed_sequence(packed)[0], expected)
    assert equal(hx_n, final)


def test_one_sequence_and_batch_first(cell: str) -> None:
    layer = quantised(getattr(fastrnn, cell)(I, H, bidirectional=True))
    first = quantised(getattr(fastrnn, cell)(I, H, bidirectional=True, batch_first=True))
    first.load_state_dict(layer.state_dict())
    x = uniform(T, B, I)
    output, hx_n = layer(x)
    assert torch.equal(first(x.transpose(0, 1))[0].transpose(0, 1), output)
    alone, hx_alone = layer(x[:, 1])
    assert torch.equal(alone, output[:, 1])
    assert equal(hx_alone, tuple(s[:, 1] for s in hx_n) if cell == "LSTM" else hx_n[:, 1])
    strided = torch.empty(T, I, B).transpose(1, 2).copy_(x)
    assert torch.equal(layer(strided)[0], output)
    assert layer(uniform(T, 0, I))[0].shape == (T, 0, 2 * H)


def test_a_reset_begins_an_episode(cell: str) -> None:
    layer = quantised(getattr(fastrnn, cell)(I, H, num_layers=1))
    x, reset = uniform(T, 1, I), torch.zeros(T, 1, dtype=torch.bool)
    reset[4] = True
    output, _ = layer(x, reset=reset)
    assert torch.equal(output[:4], layer(x[:4])[0])
    assert torch.equal(output[4:], layer(x[4:])[0])


def test_a_learned_initial_state_is_kept(cell: str) -> None:
    layer = getattr(fastrnn, cell)(I, H, bidirectional=True, learn_initial_state=True)
    for state in (layer.h_0, *([layer.c_0] if cell == "LSTM" else [])):
        nn.init.uniform_(state)
    small = quantised(layer)
    x = uniform(T, B, I)
    hx = [
        s.detach().expand(-1, B, -1)
        for s in (layer.h_0, getattr(layer, "c_0", None))
        if s is not None
    ]
    assert equal(small(x), small(x, tuple(hx) if cell == "LSTM" else hx[0]))
    assert "h_0" in small.state_dict()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    assert torch.equal(small(x, reset=reset)[0][3:, :, :H], small(x[3:])[0][..., :H])
    assert equal(copy.deepcopy(small)(x), small(x))


# ---- state dicts, pickles, copies ---------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_holds_torch_names_as_int8(name: str) -> None:
    layer = LAYERS[name](num_layers=2, bidirectional=True)
    small = quantised(layer)
    found = small.state_dict()
    assert [key for key in found if not key.endswith("_scale")] == list(layer.state_dict())
    for key, weight in layer.state_dict().items():
        if key.startswith("bias"):
            assert torch.equal(found[key], weight)
            continue
        scale = found[f"{key}_scale"]
        assert found[key].dtype == torch.int8
        assert torch.equal(scale, weight.abs().amax(1) / 127)
        error = (found[key] * scale[:, None] - weight).abs()
        assert (error <= scale[:, None] * 0.5001).all()
        assert (found[key].abs().amax(1) == 127).all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_restored_with_the_same_bits(name: str, bias: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True, "bias": bias}
    small, other = quantised(LAYERS[name](**options)), quantised(LAYERS[name](**options))
    x = uniform(T, B, I)
    expected = small(x)
    assert not equal(other(x), expected)
    assert not any(other.load_state_dict(small.state_dict()))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    restored = [
        other,
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(file, weights_only=False),
    ]
    for each in restored:
        assert equal(each(x), expected)
        assert repr(each) == repr(small)
        assert equal([*each.state_dict().values()], [*small.state_dict().values()])
    with torch.no_grad():
        restored[1].packed.zero_()  # a copy has memory of its own
    assert equal(small(x), expected)


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    layer = fastrnn.LSTM(I, H)
    small = quantised(layer)
    before = small(uniform(T, B, I))
    with pytest.raises(RuntimeError, match="weights of the float layer; load them into the float"):
        small.load_state_dict(layer.state_dict(), strict=False)
    found = small.state_dict()
    with pytest.raises(RuntimeError, match=r"weight_ih_l0 must be torch.int8 of shape \(96, 20\)"):
        small.load_state_dict({**found, "weight_ih_l0": found["weight_ih_l0"][1:]})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_hh_l0_scale"'):
        small.load_state_dict({k: v for k, v in found.items() if k != "weight_hh_l0_scale"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"other"'):
        small.load_state_dict({**found, "other": torch.zeros(1)})
    assert len(before) == 2
    assert small.load_state_dict({"bias_ih_l0": torch.ones(4 * H)}, strict=False) is not None
    assert (small.state_dict()["bias_ih_l0"] == 1).all()
    assert torch.equal(small.state_dict()["weight_hh_l0"], found["weight_hh_l0"])


def test_pickles_serve_other_instruction_sets_and_packed_weights_do_not(tmp_path: Path) -> None:
    small = quantised(fastrnn.LSTM(I, H, num_layers=2, bidirectional=True))
    x = uniform(T, B, I)
    torch.save({"layer": small, "packed": small.packed, "x": x, "y": small(x)[0]}, tmp_path / "f")
    program = """
        import sys, torch, fastrnn
        from fastrnn.calls import int8
        found = torch.load(sys.argv[1], weights_only=False)
        layer, x = found["layer"], found["x"]
        torch.testing.assert_close(layer(x)[0], found["y"], rtol=0, atol=0.01)
        try:
            int8.run(layer._options, x, None, found["packed"], layer.hidden_size)
        except ValueError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "f")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "FASTRNN_ISA": _C.isas()[-1]},
    )
    assert run.returncode == 0, run.stderr
    if _C.isas()[-1] != _C.isa():
        assert "quantise, or load the state dict, on the machine that runs them" in run.stdout


@pytest.mark.parametrize("name", ["lstm", "gru", "gru-before", "rnn"])
def test_memory_is_a_quarter(name: str) -> None:
    makers = {
        "lstm": lambda: fastrnn.LSTM(256, 256, num_layers=2, bidirectional=True),
        "gru": lambda: fastrnn.GRU(256, 256),
        "gru-before": lambda: fastrnn.GRU(256, 256, reset_after=False),
        "rnn": lambda: fastrnn.RNN(512, 512),
    }
    layer = makers[name]()
    small = quantised(layer)

    def size(tensors: Any) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    whole = size(layer.parameters())
    assert size(small.buffers()) < 0.29 * whole
    assert size(small.state_dict().values()) < 0.27 * whole
    assert len(pickle.dumps(small)) < 0.29 * whole
    assert not list(small.parameters())


# ---- errors -------------------------------------------------------------------------------------


def test_training_and_gradients_are_refused(cell: str) -> None:
    layer = quantised(getattr(fastrnn, cell)(I, H))
    x = uniform(T, B, I)
    line = rf"Quantized{cell}\(20, 24\)"
    with pytest.raises(RuntimeError, match=f"{line} has int8 weights and computes no gradient"):
        layer(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        layer(x.clone().requires_grad_(), lengths=[T] * B)
    with torch.no_grad():
        assert torch.equal(layer(x.clone().requires_grad_())[0], layer(x)[0])
    with pytest.raises(RuntimeError, match=rf"{line} .* cannot be trained: call .eval\(\)"):
        layer.train()(x)
    assert layer.eval()(x)[0].requires_grad is False


def test_errors_name_the_argument() -> None:
    layer = quantised(fastrnn.LSTM(I, H))
    x = uniform(T, B, I)
    with pytest.raises(ValueError, match=r"input must be float32 .* got torch.float64"):
        layer(x.double())
    with pytest.raises(ValueError, match=r"input must be float32 .* got torch.bfloat16"):
        layer(x.bfloat16())
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        layer(x[..., 1:])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        layer(x, (torch.zeros(1, B, H + 1), torch.zeros(1, B, H)))
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(x, (torch.zeros(1, B, H).double(), torch.zeros(1, B, H)))
    with pytest.raises(TypeError, match="hx must be a tuple or list of two tensors"):
        layer(x, torch.zeros(1, B, H))
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        layer(x[:0])
    with pytest.raises(TypeError, match="input must be a Tensor"):
        layer(None)
    with pytest.raises(RuntimeError, match=r"runs on the CPU, but input is on meta"):
        layer(x.to("meta"))
    with pytest.raises(TypeError, match=r"layer must be a fastrnn\.LSTM, got GRU"):
        fastrnn.nn.QuantizedLSTM.from_float(fastrnn.GRU(I, H))
    with pytest.raises(ValueError, match=r"float64: convert the layer with .float\(\)"):
        fastrnn.nn.QuantizedLSTM.from_float(fastrnn.LSTM(I, H).double())


def test_the_binding_checks_packed_weights() -> None:
    layer = quantised(fastrnn.LSTM(I, H))
    engine, x, packed = layer._engine, uniform(T, B, I), layer.packed
    with pytest.raises(ValueError, match="options: int8 has no gradient"):
        _C.Call(engine, x, None, None, (packed,)).forward(save=True)
    with pytest.raises(ValueError, match="expected one array of packed int8 weights, got 2"):
        _C.Call(engine, x, None, None, (packed, packed))
    with pytest.raises(ValueError, match="bytes after the header"):
        _C.Call(engine, x, None, None, (packed[:-1],))
    with pytest.raises(ValueError, match="packed int8 weights"):
        _C.Call(engine, x, None, None, (packed[:9],))
    with pytest.raises(TypeError, match="uint8"):
        _C.Call(engine, x, None, None, (packed.view(torch.int8),))
    with pytest.raises(ValueError, match="rows of 20 values"):
        _C.Call(engine, uniform(T, B, I + 1), None, None, (packed,))
    with pytest.raises(ValueError, match="float32 for int8 weights"):
        _C.Call(engine, x.double(), None, None, (packed,))
    with pytest.raises(ValueError, match="weights packed for"):
        _C.Call(quantised(fastrnn.GRU(I, H))._engine, x, None, None, (packed,))
    flat = [*layer.weights().values()]
    with pytest.raises(ValueError, match="expected more arrays, got 5"):
        _C.pack_int8(engine, I, H, flat[:-1], True)
    with pytest.raises(ValueError, match="expected 6 arrays, got 7"):
        _C.pack_int8(engine, I, H, [*flat, flat[0]], True)
    with pytest.raises(ValueError, match="weight_ih"):
        _C.pack_int8(engine, I, H + 1, flat, True)
    with pytest.raises(ValueError, match="131072 columns"):
        _C.pack_int8(engine, 2**17 + 1, H, flat, True)
    shifted = torch.empty(len(packed) + 1, dtype=torch.uint8)[1:].copy_(packed)  # not aligned
    got = _C.Call(engine, x, None, None, (shifted,)).forward()[0]
    assert torch.equal(got, layer(x)[0])


# ---- models -------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, package: Any) -> None:
        super().__init__()
        self.encode = package.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True)
        self.mix = nn.ModuleList([package.GRU(2 * H, H), package.RNN(H, H, nonlinearity="relu")])
        self.again = self.mix[0]
        self.head = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.encode(x)
        for layer in self.mix:
            x, _ = layer(x)
        return self.head(x)


@pytest.mark.parametrize("package", [fastrnn, nn], ids=["fastrnn", "torch.nn"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_is_quantised(package: Any, inplace: bool) -> None:
    model = Model(package).train()
    x = uniform(B, T, I)
    expected = copy.deepcopy(model).eval()(x).detach()
    head = model.head
    small = fastrnn.quantize_dynamic(model, inplace=inplace)
    assert (small is model) == inplace
    kinds = [type(m).__name__ for m in (small.encode, *small.mix, small.head)]
    assert kinds == ["QuantizedLSTM", "QuantizedGRU", "QuantizedRNN", "Linear"]
    assert small.again is small.mix[0]
    assert not small.training
    assert not small.encode.training
    assert (small.head is head) == inplace
    if not inplace:
        assert model.training
        assert type(model.encode) is package.LSTM
    got = small(x)
    assert 0 < (got - expected).abs().max() < 0.05
    assert got.requires_grad  # of the head, which can still be trained
    for attribute in ("input_size", "hidden_size", "num_layers", "bidirectional", "batch_first"):
        assert getattr(small.encode, attribute) == getattr(model.encode, attribute)
    assert small.mix[1].mode == "RNN_RELU"
    assert not isinstance(small.encode, (nn.LSTM, fastrnn.LSTM))
    assert isinstance(small.encode, fastrnn.nn.QuantizedLSTM)


def test_repr_is_the_float_layers_line() -> None:
    layer = fastrnn.GRU(3, 4, num_layers=2, dropout=0.5, batch_first=True, reset_after=False)
    assert repr(quantised(layer)) == "Quantized" + repr(layer)


class Halved(nn.LSTM):
    def forward(self, *arguments: Any) -> Any:
        output, hx = super().forward(*arguments)
        return output / 2, hx


def test_what_is_left_is_named_in_one_warning() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(nn.GRU(2, 2), "weight_hh_l0")
    model = nn.ModuleDict(
        {
            "fine": nn.LSTM(2, 3),
            "cell": nn.LSTMCell(2, 2),
            "own": Halved(2, 2),
            "peephole": fastrnn.LSTM(2, 2, peephole=True),
            "wide": fastrnn.GRU(2, 2).double(),
            "nowhere": fastrnn.RNN(2, 2, device="meta"),
            "normed": normed,
            "any": fastrnn.Recurrent(nn.GRUCell(2, 2)),
        }
    )
    with pytest.warns(UserWarning, match="quantize_dynamic left 8 recurrent modules") as caught:
        small = fastrnn.quantize_dynamic(model)
    assert len(caught) == 1
    text = str(caught[0].message)
    for part in (
        "'cell' (LSTMCell): a cell",
        "'own' (Halved): its class has a forward",
        "'peephole' (LSTM): int8 does not support peephole=True",
        "'wide' (GRU): weight_ih_l0 is torch.float64: convert the layer with .float()",
        "'nowhere' (RNN): weight_ih_l0 is on meta",
        "'normed'",
        "'any' (Recurrent): the maths",
    ):
        assert part in text
    assert isinstance(small["fine"], fastrnn.nn.QuantizedLSTM)
    assert type(small["own"]) is Halved


def test_a_model_without_layers_says_so() -> None:
    with pytest.warns(UserWarning, match="found no recurrent layer"):
        fastrnn.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        fastrnn.quantize_dynamic([])
    small = quantised(nn.Sequential(nn.GRU(2, 2)))
    assert isinstance(fastrnn.quantize_dynamic(small)[0], fastrnn.nn.QuantizedGRU)  # no warning


def test_hooks_are_kept() -> None:
    layer = nn.GRU(2, 2)
    seen: list[str] = []
    layer.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    small = quantised(nn.Sequential(layer))
    small(torch.zeros(1, 1, 2))
    assert seen == ["QuantizedGRU"]


def test_a_stream_takes_a_quantised_layer(cell: str) -> None:
    layer = getattr(fastrnn, cell)(I, H, num_layers=2)
    small, x = quantised(layer), uniform(T, B, I)
    stream = fastrnn.Stream(small, B)
    assert stream.dtype == "int8"
    expected = small(x)[0]
    assert torch.equal(steps(stream, x), expected)
    stream.reset()
    small.load_state_dict(quantised(getattr(fastrnn, cell)(I, H, num_layers=2)).state_dict())
    assert torch.equal(steps(stream, x), expected)  # until refresh
    stream.reset()
    stream.refresh()
    assert torch.equal(steps(stream, x), small(x)[0])
    with pytest.raises(ValueError, match="a quantised layer runs with int8 alone"):
        fastrnn.Stream(small, B, "float32")


# ---- torch's tools ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_and_export_give_the_same_bits(cell: str) -> None:
    model = quantised(nn.ModuleList([getattr(fastrnn, cell)(I, H, num_layers=2)]))[0]
    x = uniform(T, B, I)
    expected = model(x)
    with torch.no_grad():
        assert equal(torch.compile(model, fullgraph=True)(x), expected)
        rows = torch.export.Dim("rows", min=2)
        program = torch.export.export(model, (x,), dynamic_shapes=({1: rows},))
        assert equal(program.module()(x), expected)
        more = uniform(T, B + 2, I)
        assert equal(program.module()(more), model(more))


def test_the_operator_passes_opcheck() -> None:
    from fastrnn.calls import int8

    for layer in (fastrnn.LSTM(I, H, bidirectional=True), fastrnn.GRU(I, H, num_layers=2)):
        small = quantised(layer)
        for states in (False, True):
            arguments = (
                uniform(T, B, I), None, None, small.packed, None, torch.tensor([T, 0, 3]), RESETS,
                None, None, small._options.text, H, states,
            )  # fmt: skip
            torch.library.opcheck(int8.int8_forward_op, arguments)


def test_fx_keeps_a_layer_whole() -> None:
    model = quantised(nn.Sequential(fastrnn.LSTM(I, H)))
    graph = torch.fx.symbolic_trace(model).graph
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0"]


def test_autocast_leaves_float32_calls_alone() -> None:
    layer, x = quantised(fastrnn.GRU(I, H)), uniform(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[0], layer(x.clone())[0])
        assert layer(x)[0].dtype == torch.float32


# ---- the error on models ------------------------------------------------------------------------


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.usefixtures("examples")
def test_the_digit_model_keeps_its_accuracy() -> None:
    sklearn = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's")
    pytest.importorskip("matplotlib", reason="the example draws")
    import digits

    pixels, names = sklearn.load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 8, 8)
    labels = torch.tensor(names)
    held_out = torch.arange(len(labels)) % 5 == 0
    read, known = images[held_out], labels[held_out]
    run = digits.Run(fastrnn.LSTM, 8)
    for _ in range(8):
        run.train_epoch(images[~held_out], labels[~held_out])
    before = run.test(read, known)
    expected = run.predict(read).detach()
    run.layer = quantised(run.layer)
    after = run.test(read, known)
    with torch.no_grad():
        error = (run.predict(read) - expected).abs().max() / expected.abs().max()
    assert before > 0.85
    assert abs(after - before) <= 0.01
    assert 0 < error < 0.02


@pytest.mark.usefixtures("examples")
def test_the_character_model_keeps_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the example draws")
    import characters

    monkeypatch.setattr(characters, "UNITS", 96)
    manual = "\n".join(characters.topics[name] for name in sorted(characters.topics))[:200_000]
    alphabet = sorted(set(manual))
    text = torch.tensor([alphabet.index(character) for character in manual])
    model = characters.Writer(len(alphabet))
    losses = characters.train(model, text[5000:], 40)
    assert losses[-1] < losses[0] - 0.5
    small = fastrnn.quantize_dynamic(model)
    logits, _ = model.eval()(text[:4999, None])
    with torch.no_grad():
        rough, _ = small(text[:4999, None])
    before, after = (F.cross_entropy(y[:, 0], text[1:5000]).item() for y in (logits, rough))
    assert before != after
    assert abs(after - before) < 0.005


def test_as_close_as_torchs_own(cell: str) -> None:
    """Against torch's quantize_dynamic, which has one scale for a whole matrix and all of x."""
    if cell == "RNN" or not {"x86", "fbgemm"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("torch has no int8 layer of this kind here")
    layer = getattr(nn, cell)(64, 96, num_layers=2)
    x = torch.randn(50, 4, 64) * torch.logspace(-1, 1, 4)[:, None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = layer(x)[0]
        torchs = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})(x)[0]
    ours = quantised(layer)(x)[0]
    assert (ours - expected).norm() <= (torchs - expected).norm()
