"""Export to ONNX: standard nodes, one for each layer, that ONNX Runtime computes to our numbers."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fastrnn
from pairs import LAYERS, tensors

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning"  # of torch's exporter, about itself
)

T, B, I, H = 6, 3, 4, 5  # noqa: E741
every_layer = pytest.mark.parametrize("name", LAYERS)


def export(model: nn.Module, args: tuple[Any, ...], *, program: bool = False, **shapes: Any) -> Any:
    """The model in ONNX; with ``program`` by way of torch.export.export, and the table."""
    model.eval()
    if not program:
        return torch.onnx.export(model, args, dynamo=True, verbose=False, **shapes)
    return torch.onnx.export(
        torch.export.export(model, args, **shapes),
        dynamo=True,
        verbose=False,
        custom_translation_table=fastrnn.onnx_translation_table(),
    )


def run(program: Any, *args: Any) -> list[np.ndarray]:
    """What ONNX Runtime gives for the tensors among the arguments."""
    model = program.model_proto.SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    values = [x.numpy() for x in tensors(args)]
    return session.run(None, dict(zip(names, values, strict=True)))


def assert_equal(got: list[np.ndarray], want: Any) -> None:
    expected = [x.detach().numpy() for x in tensors(want)]
    assert len(got) == len(expected)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"output {k}")


def nodes(program: Any) -> Counter[str]:
    return Counter(node.op_type for node in program.model.graph)


def check(model: nn.Module, *args: Any, program: bool = False) -> Any:
    """The exported model gives what the model gives."""
    exported = export(model, args, program=program)
    with torch.no_grad():
        assert_equal(run(exported, args), model(*args))
    return exported


class _Side(nn.Module):
    """Layers on the same arguments: an export takes seconds, so one has to do for many."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, lengths: Tensor | None = None, hx: Any = None) -> list[Any]:
        steps = {} if lengths is None else {"lengths": lengths}
        return [layer(x, hx, **steps) for layer in self.layers]


@pytest.mark.parametrize(
    ("name", "by_program"), [("RNN", False), ("LSTM", False), ("LSTM", True), ("GRU", True)]
)
def test_stacks(name: str, by_program: bool) -> None:
    layers = [
        getattr(fastrnn, name)(I, H, count, bias=bias, bidirectional=bidirectional)
        for count in (1, 2)
        for bias in (False, True)
        for bidirectional in (False, True)
    ]
    program = check(_Side(layers), torch.randn(T, B, I), program=by_program)
    assert nodes(program)[name] == sum(layer.num_layers for layer in layers)


FUNCTIONS = ("tanh", "relu", "sigmoid", "identity")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "RNN": [{"nonlinearity": f} for f in FUNCTIONS],
    "LSTM": [
        {"activation": f, "gate_activation": g}
        for f in FUNCTIONS
        for g in ("sigmoid", "hardsigmoid")
    ],
    "GRU": [
        {"activation": f, "gate_activation": g, "reset_after": reset_after}
        for f in FUNCTIONS
        for g in ("sigmoid", "hardsigmoid")
        for reset_after in (True, False)
    ],
}


@every_layer
def test_options(name: str) -> None:
    """Half of them in both directions, in turns, so that every function is in such a half."""
    layers = [
        getattr(fastrnn, name)(I, H, bidirectional=(k + k // 2) % 2 == 1, **options)
        for k, options in enumerate(OPTIONS[name])
    ]
    check(_Side(layers), 2 * torch.randn(T, B, I), program=name == "GRU")


def initial(name: str, groups: int, rows: int = B) -> Any:
    h, c = torch.randn(groups, rows, H), torch.randn(groups, rows, H)
    return (h, c) if name == "LSTM" else h


@every_layer
@pytest.mark.parametrize("layers", [1, 2])
def test_initial_states_and_batch_first(name: str, layers: int) -> None:
    layer = getattr(fastrnn, name)(I, H, layers, batch_first=True, bidirectional=True)
    check(layer, torch.randn(B, T, I), initial(name, 2 * layers), program=layers == 2)


def test_one_sequence() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict(
                {name: getattr(fastrnn, name)(I, H, bidirectional=True) for name in LAYERS}
            )

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> list[Any]:
            states = {"RNN": h, "LSTM": (h, c), "GRU": h}
            return [layer(x, states[name]) for name, layer in self.layers.items()]

    check(Unbatched(), torch.randn(T, I), torch.randn(2, H), torch.randn(2, H))


@every_layer
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths(name: str, bidirectional: bool) -> None:
    """Of both integer dtypes, without initial states and with."""
    layers = [getattr(fastrnn, name)(I, H, 2, bidirectional=bidirectional) for _ in range(2)]
    dtype = torch.int64 if bidirectional else torch.int32
    args = [torch.randn(T, B, I), torch.tensor([4, 0, T], dtype=dtype)]
    if bidirectional != (name == "GRU"):
        args.append(initial(name, 2 * (1 + bidirectional)))
    check(_Side(layers), *args, program=bidirectional)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_batch_and_steps_are_dynamic(with_lengths: bool) -> None:
    layers = [
        getattr(fastrnn, name)(I, H, 2, bidirectional=True, batch_first=batch_first)
        for name in LAYERS
        for batch_first in (False, True)
    ]
    # Those that take the batch first see the same sizes the other way round.
    model = _Side([layer for layer in layers if layer.batch_first is with_lengths])
    one, two = Dim("one"), Dim("two")
    shapes: dict[str, Any] = {"x": {0: one, 1: two}}
    if with_lengths:
        shapes["lengths"] = {0: Dim.DYNAMIC}

    def args(b: int, t: int) -> tuple[Tensor, ...]:
        if with_lengths:
            return torch.randn(b, t, I), torch.arange(b) % (t + 1)
        return (torch.randn(t, b, I),)

    program = export(model, args(B, T), program=with_lengths, dynamic_shapes=shapes)
    for b, t in ((3, 6), (1, 1), (7, 20)):
        given = args(b, t)
        with torch.no_grad():
            assert_equal(run(program, given), model(*given))


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, I)
        self.encode = fastrnn.LSTM(I, H, 2, bidirectional=True, dropout=0.3)
        self.read = fastrnn.GRU(2 * H, H)
        self.cell = fastrnn.LSTMCell(H, H)
        self.tag = nn.Linear(H, 7)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = self.encode(self.embed(tokens), lengths=lengths)
        hidden, h_n = self.read(hidden)
        return self.tag(hidden).log_softmax(-1), self.cell(h_n[0])[0]


def test_a_model_of_several_layers() -> None:
    program = check(_Tagger(), torch.randint(0, 11, (T, B)), torch.tensor([6, 2, 3]))
    assert nodes(program)["LSTM"] == 3
    assert nodes(program)["GRU"] == 1


def test_cells() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleDict({n: getattr(fastrnn, f"{n}Cell")(I, H) for n in LAYERS})

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> list[Any]:
            states = {"RNN": h, "LSTM": (h, c), "GRU": h}
            return [cell(x, states[name]) for name, cell in self.cells.items()]

    program = check(Cells(), torch.randn(B, I), torch.randn(B, H), torch.randn(B, H))
    assert all(nodes(program)[name] == 1 for name in LAYERS)


def test_a_converted_model() -> None:
    check(fastrnn.convert(nn.Sequential(nn.GRU(I, H, 2))), torch.randn(T, B, I))


def test_all_states_of_cells_without_c() -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (getattr(fastrnn, n)(I, H, 3, bidirectional=True) for n in ("RNN", "GRU"))
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x, return_states=True)[2].h for layer in self.layers]

    check(States(), torch.randn(T, B, I))


def test_without_a_gradient_only_the_last_layer_is_given() -> None:
    layer, x = fastrnn.LSTM(I, H, 3), torch.randn(T, B, I)
    with torch.no_grad():
        program = check(layer, x, program=True)
    outputs = [y for node in program.model.graph if node.op_type == "LSTM" for y in node.outputs]
    joined = [n for n in program.model.graph if n.op_type == "Concat" and outputs[0] in n.inputs]
    assert not joined


def test_the_file_holds_a_valid_model(tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx")
    layer = fastrnn.LSTM(I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    export(layer, (x,)).save(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    with torch.no_grad():
        assert_equal(session.run(None, {session.get_inputs()[0].name: x.numpy()}), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_valid_onnx(dtype: Any, tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx")
    layer = fastrnn.LSTM(I, H, 2, bidirectional=True, dtype=dtype)
    export(layer, (torch.randn(T, B, I, dtype=dtype),)).save(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


# ---- what ONNX does not have ---------------------------------------------------------------------


def causes(error: BaseException) -> str:
    said = []
    cause: BaseException | None = error
    while cause is not None:
        said.append(str(cause))
        cause = cause.__cause__
    return "\n".join(said)


class _Call(nn.Module):
    def __init__(self, layer: nn.Module, **call: Any) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, **self.call)[0]


x = torch.randn(T, B, I)
REFUSED = {
    "proj_size": (fastrnn.LSTM(I, H, proj_size=2), (x,), "proj_size=2 has no equal in ONNX's LSTM"),
    "reset": (
        _Call(fastrnn.GRU(I, H), reset=torch.zeros(T, B, dtype=torch.bool)),
        (x,),
        "reset= has no equal in ONNX",
    ),
    "every c": (
        _Call(fastrnn.LSTM(I, H), return_states=True),
        (x,),
        "return_states=True has no equal in ONNX's LSTM",
    ),
}


@pytest.mark.parametrize(("model", "args", "said"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("by_program", [False, True])
def test_what_onnx_does_not_have_is_named(
    model: Any, args: Any, said: str, by_program: bool
) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        export(model, args, program=by_program)
    assert said in causes(caught.value)
    assert "run_decompositions(fastrnn.decompositions())" in causes(caught.value)


def test_the_way_out_is_one() -> None:
    layer, x = fastrnn.LSTM(I, H, proj_size=2, layer_norm=True).eval(), torch.randn(T, B, I)
    with torch.no_grad():
        lowered = torch.export.export(layer, (x,)).run_decompositions(fastrnn.decompositions())
        assert_equal(run(torch.onnx.export(lowered, dynamo=True, verbose=False), (x,)), layer(x))


# ---- the exporter by torch.jit -------------------------------------------------------------------


def check_old(model: nn.Module, *args: Any, **options: Any) -> Any:
    """What the older exporter gives computes what the model gives; the session."""
    file = io.BytesIO()
    torch.onnx.export(model.eval(), args, file, dynamo=False, **options)
    session = ort.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    assert_old(session, model, *args)
    return session


def assert_old(session: Any, model: nn.Module, *args: Any) -> None:
    names = [given.name for given in session.get_inputs()]
    values = [x.numpy() for x in tensors(args)]
    with torch.no_grad():
        want = model(*args)
    assert_equal(session.run(None, dict(zip(names, values, strict=True))), want)


by_jit = pytest.mark.filterwarnings("ignore")  # of the older exporter, about itself


@by_jit
@every_layer
def test_the_older_exporter_takes_layers(name: str) -> None:
    layer = getattr(fastrnn, name)(I, H, 2, bidirectional=True, batch_first=True)
    session = check_old(
        layer,
        torch.randn(B, T, I),
        input_names=["x"],
        dynamic_axes={"x": {0: "rows", 1: "steps"}},
    )
    assert_old(session, layer, torch.randn(7, 9, I))
    check_old(getattr(fastrnn, name)(I, H, bias=False), torch.randn(T, B, I), initial(name, 1))


@by_jit
@pytest.mark.parametrize("name", LAYERS)
def test_the_older_exporter_takes_cells(name: str) -> None:
    h, c = torch.randn(B, H), torch.randn(B, H)
    cell = getattr(fastrnn, f"{name}Cell")(I, H)
    check_old(cell, torch.randn(B, I), (h, c) if name == "LSTM" else h)


@by_jit
def test_the_older_exporter_takes_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastrnn.LSTM(I, H)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            output, _ = self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths))
            return nn.utils.rnn.pad_packed_sequence(output)[0]

    check_old(Packed(), torch.randn(T, B, I), torch.tensor([6, 4, 1]))


@by_jit
@pytest.mark.parametrize(
    ("layer", "call", "said"),
    [
        (fastrnn.GRU(I, H, reset_after=False), {}, "reset_after=False"),
        (fastrnn.RNN(I, H, nonlinearity="sigmoid"), {}, "activation='sigmoid'"),
        (fastrnn.LSTM(I, H, proj_size=2), {}, "proj_size=2"),
        (fastrnn.LSTM(I, H), {"lengths": torch.tensor([6, 4, 1])}, "lengths="),
        (fastrnn.LSTM(I, H), {"return_states": True}, "return_states="),
    ],
    ids=["reset_after", "nonlinearity", "proj_size", "lengths", "return_states"],
)
def test_the_older_exporter_says_what_it_does_not_have(layer: Any, call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"no equal for {said}.*dynamo=True.*decompositions"):
        check_old(_Call(layer, **call), torch.randn(T, B, I))


# ---- what has to be installed --------------------------------------------------------------------


def test_without_onnxscript_the_error_says_what_to_install() -> None:
    code = """
        import sys
        sys.modules["onnxscript"] = None
        import fastrnn
        try:
            fastrnn.onnx_translation_table()
        except ModuleNotFoundError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.strip() == "export to ONNX needs onnxscript: pip install onnxscript"
