"""`patch_torch`: torch.nn's names are ours while it is on, and are restored afterwards."""

from __future__ import annotations

import abc
import copy
import copyreg
import io
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.layers.layer import RecurrentLayer
from pairs import CELLS, LAYERS, assert_same, outcome
from programs import run_program

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = LAYERS + CELLS
BASES = ("RNNBase", "RNNCellBase")
HOMES = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
TORCHS = {name: getattr(torch.nn, name) for name in (*NAMES, *BASES)}


class Before(nn.LSTM):
    """A user's class from before."""


@pytest.fixture
def patched() -> Iterator[None]:
    with fastrnn.patch_torch():
        yield


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def bindings() -> list[Any]:
    """All that a patch may touch."""
    table = {cls: copyreg.dispatch_table.get(cls) for cls in TORCHS.values()}
    names = [getattr(home, name) for home in HOMES for name in TORCHS]
    entry = torch._dynamo.config._config["allow_rnn"]
    return [names, table, torch._dynamo.config.allow_rnn, entry.default]


def some_input(name: str) -> torch.Tensor:
    return torch.randn((5, 2, 3) if name in LAYERS else (2, 3))


# ---- the names --------------------------------------------------------------------------------


def test_torchs_names_are_ours_while_patched_and_restored_afterwards() -> None:
    before = bindings()
    with fastrnn.patch_torch():
        for home in HOMES:
            for name in NAMES:
                assert getattr(home, name) is getattr(fastrnn, name)
            assert issubclass(fastrnn.LSTM, home.RNNBase)
            assert issubclass(fastrnn.LSTMCell, home.RNNCellBase)
        assert torch._dynamo.config.allow_rnn
    assert bindings() == before


def test_patching_twice_is_patching_once() -> None:
    before = bindings()
    fastrnn.patch_torch()
    fastrnn.patch_torch()
    fastrnn.unpatch_torch()
    assert bindings() == before
    fastrnn.unpatch_torch()
    assert bindings() == before


def test_an_inner_block_leaves_the_outer_patched() -> None:
    before = bindings()
    with fastrnn.patch_torch():
        with fastrnn.patch_torch():
            pass
        assert nn.LSTM is fastrnn.LSTM
    assert bindings() == before
    fastrnn.patch_torch()
    with fastrnn.patch_torch():
        pass
    assert nn.LSTM is fastrnn.LSTM
    fastrnn.unpatch_torch()
    assert bindings() == before


def test_unpatching_inside_a_block_is_final_and_the_block_can_be_entered_again() -> None:
    before = bindings()
    patch = fastrnn.patch_torch()
    with patch:
        fastrnn.unpatch_torch()
        assert bindings() == before
    with patch:
        assert nn.GRU is fastrnn.GRU
    assert bindings() == before


def test_a_block_that_raises_unpatches() -> None:
    before = bindings()
    with pytest.raises(KeyError), fastrnn.patch_torch():
        raise KeyError
    assert bindings() == before


@pytest.mark.parametrize("allowed", [True, False])
def test_what_the_user_set_dynamo_to_is_put_back(allowed: bool) -> None:
    config = torch._dynamo.config
    with config.patch(allow_rnn=allowed):
        with fastrnn.patch_torch():
            assert config.allow_rnn
        assert config.allow_rnn == allowed


def test_another_reducer_of_torchs_class_is_kept() -> None:
    def reduce(layer: Any) -> Any:
        return nn.Identity, ()

    copyreg.pickle(TORCHS["GRU"], reduce)  # type: ignore[arg-type]
    try:
        layer = nn.GRU(3, 4)
        with fastrnn.patch_torch():
            assert type(pickle.loads(pickle.dumps(layer))) is nn.Identity
        assert copyreg.dispatch_table[TORCHS["GRU"]] is reduce
    finally:
        del copyreg.dispatch_table[TORCHS["GRU"]]


# ---- isinstance -------------------------------------------------------------------------------


def test_isinstance_is_true_for_ours_and_for_torchs_from_before(name: str) -> None:
    theirs = getattr(nn, name)(3, 4)
    base, other = ("RNNBase", "RNNCellBase")[:: 1 if name in LAYERS else -1]
    with fastrnn.patch_torch():
        ours = getattr(nn, name)(3, 4)
        assert type(ours) is getattr(fastrnn, name)
        for layer in (ours, theirs):
            assert isinstance(layer, getattr(nn, name))
            assert isinstance(layer, getattr(nn, base))
            assert not isinstance(layer, getattr(nn, other))
            assert issubclass(type(layer), getattr(nn, name))
            for another in set(NAMES) - {name}:
                assert not isinstance(layer, getattr(nn, another))
    assert not isinstance(theirs, (getattr(fastrnn, name), RecurrentLayer))
    assert not isinstance(ours, getattr(nn, name))


def test_isinstance_of_users_classes_asks_nothing_else() -> None:
    theirs, before = nn.LSTM(3, 4), Before(3, 4)
    with fastrnn.patch_torch():

        class After(nn.LSTM):
            pass

        after = After(3, 4)
        assert isinstance(before, nn.LSTM)
        assert isinstance(before, Before)
        assert isinstance(after, nn.LSTM)
        assert not isinstance(after, Before)
        assert not isinstance(before, After)
        assert not isinstance(theirs, After)


def test_what_isinstance_answered_is_not_remembered(patched: None) -> None:
    class Recurrent(abc.ABC):  # ABCs remember their answers
        @abc.abstractmethod
        def step(self) -> None: ...

    Recurrent.register(fastrnn.GRU)
    theirs = TORCHS["LSTM"](3, 4)
    assert isinstance(theirs, nn.RNNBase)
    assert not isinstance(theirs, Recurrent)
    fastrnn.unpatch_torch()
    assert not isinstance(theirs, RecurrentLayer)


# ---- users' classes ---------------------------------------------------------------------------


def test_a_class_derived_while_patched_derives_from_ours(patched: None) -> None:
    class Doubled(nn.LSTM):
        def __init__(self, size: int) -> None:
            super().__init__(size, 4, 2, True, True, 0.0, True)  # torch's arguments, by position

        def forward(self, input: Any, hx: Any = None) -> Any:
            return super().forward(input, hx)[0] * 2

    layer = Doubled(3)
    input = torch.randn(2, 5, 3)
    assert type(copy.deepcopy(layer)) is Doubled
    torch.testing.assert_close(copy.deepcopy(layer)(input), layer(input), rtol=0, atol=0)
    theirs = TORCHS["LSTM"](3, 4, 2, True, True, 0.0, True)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(input), theirs(input)[0] * 2)


def test_a_users_class_may_have_abc_and_a_base_of_torch_beside_it(patched: None) -> None:
    class Base(abc.ABC, nn.RNNBase):
        @abc.abstractmethod
        def zeros(self) -> torch.Tensor: ...

        def forward(self, input: Any) -> Any:
            return super().forward(input, self.zeros())

    class Layer(Base, nn.GRU):
        def zeros(self) -> torch.Tensor:
            return torch.zeros(1, 2, 4)

    output, _ = Layer(3, 4)(torch.randn(5, 2, 3))
    assert output.shape == (5, 2, 4)
    with pytest.raises(TypeError, match="abstract"):
        Base("GRU", 3, 4)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_a_direct_subclass_of_rnnbase_has_weights_and_runs_its_own_forward(
    patched: None, mode: str
) -> None:
    class Layer(nn.RNNBase):
        def __init__(self) -> None:
            super().__init__(mode, 3, 4, bidirectional=True)

        def forward(self, input: Any, hx: Any) -> Any:
            self._update_flat_weights()
            self.check_input(input, None)
            engine = getattr(torch._VF, mode.lower())
            return engine(input, hx, self._flat_weights, True, 1, 0.0, False, True, False)

    theirs = TORCHS[mode.partition("_")[0]](
        3, 4, bidirectional=True, **({"nonlinearity": mode[4:].lower()} if "_" in mode else {})
    )
    layer = Layer()
    layer.load_state_dict(theirs.state_dict())
    input, h, c = torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    hx = (h, c) if mode == "LSTM" else h
    for copied in (layer, copy.deepcopy(layer)):
        torch.testing.assert_close(copied(input, hx)[0], theirs(input, hx)[0])
    assert repr(layer) == "Layer(3, 4, bidirectional=True)"


def test_an_unknown_mode_of_rnnbase_is_torchs_error() -> None:
    raised = []
    for base in (nn.RNNBase, RecurrentLayer):
        with pytest.raises(ValueError, match="Unrecognized RNN mode") as caught:
            base("STEP", 3, 4)
        raised.append(str(caught.value))
    assert raised[1] == raised[0]


def test_a_direct_subclass_of_rnncellbase_chooses_its_number_of_gates(patched: None) -> None:
    class Cell(nn.RNNCellBase):
        def __init__(self) -> None:
            super().__init__(3, 4, bias=True, num_chunks=5, dtype=torch.float64)

        def forward(self, input: Any) -> Any:
            return nn.functional.linear(input, self.weight_ih, self.bias_ih)

    torch.manual_seed(0)
    cell = copy.deepcopy(Cell())
    torch.manual_seed(0)
    theirs = TORCHS["RNNCellBase"](3, 4, True, 5, dtype=torch.float64)
    assert cell(torch.randn(2, 3, dtype=torch.float64)).shape == (2, 20)
    for key, weight in theirs.state_dict().items():
        assert torch.equal(cell.state_dict()[key], weight)
    assert repr(cell) == "Cell(3, 4)"


def test_a_users_attributes_may_have_the_names_of_our_options(patched: None) -> None:
    class Normed(nn.LSTM):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.layer_norm = nn.LayerNorm(4)
            self.activation = torch.tanh
            self.heads = 8
            self.recurrent_dropout = 0.9
            self.learn_initial_state = True
            self.cell = nn.Linear(4, 4)

        def forward(self, input: Any, hx: Any = None) -> Any:
            return self.cell(self.activation(self.layer_norm(super().forward(input, hx)[0])))

    layer, input = Normed(3, 4), torch.randn(5, 2, 3)
    output = layer(input)
    theirs = TORCHS["LSTM"](3, 4)
    theirs.load_state_dict(layer.state_dict(), strict=False)
    expected = layer.cell(torch.tanh(layer.layer_norm(theirs(input)[0])))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(copy.deepcopy(layer)(input), output, rtol=0, atol=0)
    assert repr(layer).startswith("Normed(\n  3, 4\n  (layer_norm)")


# ---- files and copies -------------------------------------------------------------------------


def saved(module: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def test_a_whole_model_of_torchs_is_loaded_with_our_layers(name: str) -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(getattr(nn, name)(3, 4))})
    file, input = saved(model), some_input(name)
    with fastrnn.patch_torch():
        loaded = torch.load(file, weights_only=False)["inner"][0]
    assert type(loaded) is getattr(fastrnn, name)
    expected = outcome(model["inner"][0], input)
    assert_same(outcome(loaded, input), expected, torch.float32)


def test_torchs_layers_from_before_are_pickled_without_us(name: str) -> None:
    theirs, input = getattr(nn, name)(3, 4), some_input(name)
    with fastrnn.patch_torch():
        pickled, file = pickle.dumps(theirs), saved(theirs)
        assert type(pickle.loads(pickled)) is getattr(fastrnn, name)
    for loaded in (pickle.loads(pickled), torch.load(file, weights_only=False)):
        assert type(loaded) is getattr(nn, name)
        assert_same(outcome(loaded, input), outcome(theirs, input), torch.float32)
    assert b"fastrnn" not in pickled


def test_torchs_layers_from_before_are_copied_as_torchs(name: str) -> None:
    theirs, input = getattr(nn, name)(3, 4), some_input(name)
    with fastrnn.patch_torch():
        copies = [copy.copy(theirs), copy.deepcopy(theirs)]
        for copied in copies:
            assert type(copied) is type(theirs)
            assert_same(outcome(copied, input), outcome(theirs, input), torch.float32)
    shallow, deep = (next(copied.parameters()) for copied in copies)
    assert shallow is next(theirs.parameters())
    assert deep is not shallow
    before = Before(3, 4)
    with fastrnn.patch_torch():
        assert type(copy.deepcopy(before)) is Before
        assert type(pickle.loads(pickle.dumps(before))) is Before


# ---- dynamo, and torch's other modules --------------------------------------------------------


def test_compile_traces_the_whole_forward_in_every_thread(patched: None, name: str) -> None:
    layer, input = getattr(nn, name)(3, 4), some_input(name)
    torch._dynamo.reset()
    got: list[Any] = []

    def work() -> None:
        got.append(torch.compile(layer, fullgraph=True, backend="aot_eager")(input))

    work()
    torch._dynamo.reset()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for result in got:
        torch.testing.assert_close(result, layer(input), rtol=0, atol=0)
    assert len(got) == 2


def test_compile_traces_isinstance(patched: None) -> None:
    ours, theirs = nn.LSTM(3, 4), TORCHS["GRU"](3, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([ours])

        def forward(self, input: Any) -> Any:
            return [layer(input)[0] for layer in self.layers if isinstance(layer, nn.LSTM)]

    torch._dynamo.reset()
    input = torch.randn(5, 2, 3)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), [ours(input)[0]], rtol=0, atol=0)
    assert isinstance(theirs, nn.GRU)


def test_our_tools_know_torchs_layers_from_ours(patched: None) -> None:
    theirs = TORCHS["LSTM"](3, 4)
    with pytest.raises(TypeError, match=r"layer must be a fastrnn\.RNN, LSTM or GRU, got LSTM"):
        fastrnn.Stream(theirs)
    with pytest.raises(ValueError, match="recurrent"):
        fastrnn.gradient_flow(theirs)
    assert type(fastrnn.convert(theirs)) is fastrnn.LSTM
    assert type(fastrnn.to_torch(nn.LSTM(3, 4))) is TORCHS["LSTM"]


def test_torchs_modules_that_name_the_layers_work_while_patched() -> None:
    code = """
        import warnings
        warnings.simplefilter("ignore")
        import torch, fastrnn, sys
        fastrnn.patch_torch()
        for name in [n for n in sys.modules if n.startswith(("torch.ao", "torch.nn.quant"))]:
            del sys.modules[name]
        import torch.ao.quantization, torch.ao.ns.fx.mappings, torch.ao.pruning
        import torch.nn.quantized, torch.nn.quantized.dynamic, torch.nn.quantizable
        import torch.ao.nn.quantized.reference.modules.rnn as reference
        assert issubclass(reference.LSTM, fastrnn.layers.layer.RecurrentLayer)
        assert reference.LSTM(3, 4)(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)
        assert reference.GRUCell(3, 4)(torch.randn(2, 3)).shape == (2, 4)
        fastrnn.unpatch_torch()
        assert torch.nn.LSTM(3, 4)(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)
    """
    run_program(code)


def test_patching_first_and_converting_afterwards() -> None:
    code = """
        import torch
        theirs = torch.nn.LSTM(3, 4)
        import fastrnn
        fastrnn.patch_torch()
        assert type(fastrnn.convert(theirs)) is fastrnn.LSTM
        theirs = fastrnn.to_torch(torch.nn.GRU(3, 4))
        fastrnn.unpatch_torch()
        assert type(theirs) is torch.nn.GRU
    """
    run_program(code)
