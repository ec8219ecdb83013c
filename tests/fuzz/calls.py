"""The public functions, each called with valid arguments, some of which `Draw` then spoils.

A subject draws one call and returns it with what torch.nn makes of the same arguments, or None.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn

from .draw import JUNK, Draw

if TYPE_CHECKING:
    from collections.abc import Callable

CELLS = ("RNN", "LSTM", "GRU")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


class Call(NamedTuple):
    """One call: what is asked of fastrnn, of torch.nn (None: nothing), and what to compare."""

    title: str
    names: set[str]  # of the arguments, for the messages of errors
    ours: Callable[[], Any]
    expected: Callable[[], Any] | None = None
    exact: bool = False  # to the bit


def draw_call(draw: Draw) -> Call:
    subject = draw.choices(list(SUBJECTS), list(SUBJECTS.values()))[0]
    torch.set_num_threads(draw.choice((1, 1, 1, 2)))
    call: Call = subject(draw)
    return call


# ---- what layers and cells are made of ----------------------------------------------------------


def own_options(draw: Draw, cell: str, layer: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Options that torch.nn does not have, none in most calls."""
    if draw.chance(0.6) or dtype.is_complex:
        return {}
    lstm = cell == "LSTM"
    choices: dict[str, tuple[Any, ...]] = {
        "layer_norm": (True,),
        "heads": (2,),
        "zoneout": (0.1, (0.1, 0.2)) if lstm else (0.1,),
        "learn_initial_state": (True,),
        "grad_clip": (0.5,),
    }
    if cell == "RNN":
        choices["nonlinearity"] = ("relu", "sigmoid", "identity")
    else:
        choices |= {"activation": ("relu", "identity"), "gate_activation": ("hardsigmoid",)}
    if cell == "GRU":
        choices["reset_after"] = (False,)
    if lstm:
        choices |= {"peephole": (True,), "forget_bias": (1.0,)}
    if layer:
        choices |= {"recurrent_dropout": (0.2,), "recompute": (True,)}
    names = draw.sample(sorted(choices), draw.choice((1, 1, 2)))
    return {name: draw.choice(choices[name]) for name in names}


def dtype_of(draw: Draw) -> torch.dtype:
    more = (torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    return draw.choice((torch.float32,) * 4 + more)


def make_both(draw: Draw, name: str, given: dict[str, Any]) -> tuple[Any, Any]:
    """Our module and torch's with the same weights; None for torch's where it has none such."""
    torch.manual_seed(draw.getrandbits(30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = getattr(fastrnn, name)(**given)
        try:
            theirs = getattr(torch.nn, name)(**given)
            theirs.load_state_dict(ours.state_dict())
        except Exception:  # an option that torch.nn has not, or refuses
            theirs = None
    return ours, theirs


def constructor(name: str, made: dict[str, Any], title: str, names: set[str]) -> Call:
    """Construction alone, of our module and of torch's, whose error messages are right."""
    known = inspect.signature(getattr(fastrnn, name)).parameters
    ours = {option for option in made if known[option].kind is inspect.Parameter.KEYWORD_ONLY}

    def make(home: Any, given: dict[str, Any]) -> None:
        getattr(home, name)(**given)

    theirs = {option: value for option, value in made.items() if option not in ours}
    huge = any(isinstance(v, int) and abs(v) > 2**20 for v in theirs.values())
    expected = None if huge else lambda: make(torch.nn, theirs)
    return Call(title, names, lambda: make(fastrnn, made), expected)


def spoil_weights(draw: Draw, ours: Any, theirs: Any) -> None:
    """Now and then, something else in place of a weight; the same in both."""
    if not draw.chance(0.05):
        return
    name = draw.choice([name for name, _ in ours.named_parameters()])
    new = draw.wrong(name, getattr(ours, name).detach())
    if isinstance(new, Tensor) and not new.is_sparse and draw.chance(0.7):
        try:
            new = torch.nn.Parameter(new, requires_grad=False)
        except (RuntimeError, TypeError):
            return
    for module in (ours, theirs):
        if module is not None:
            module.__dict__.get("_parameters", {}).pop(name, None)
            setattr(module, name, new)


def results(output: Any) -> Any:
    """A call's tensors, those of packed sequences too."""
    if isinstance(output, PackedSequence):
        return output.data
    if isinstance(output, (tuple, list)):
        return tuple(map(results, output))
    return output


def with_gradients(module: Any, given: dict[str, Any], backward: bool) -> Any:
    """What a module gives, and the gradients of its parameters."""
    found = results(module(**given))
    leaves = [p for p in module.parameters() if p.requires_grad]
    if not backward or not leaves:
        return found
    tensors = [y for y in torch.utils._pytree.tree_leaves(found) if y is not None]
    loss = sum((y * y).sum() for y in tensors if y.requires_grad)
    if not isinstance(loss, Tensor):
        return found
    loss = loss.real if loss.is_complex() else loss
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return found, [g for g in gradients if g is not None]


# ---- layers and cells ---------------------------------------------------------------------------


def layer(draw: Draw) -> Call:
    cell = draw.choice(CELLS)
    dtype, proj = dtype_of(draw), cell == "LSTM" and draw.chance(0.2)
    batch_first, layers = draw.chance(0.3), draw.choice((1, 1, 2, 3))
    I, H = draw.choice((1, 3, 8)), draw.choice((4, 8, 18) if proj else (2, 4, 6, 18))  # noqa: E741
    options = own_options(draw, cell, True, dtype)
    made: dict[str, Any] = {
        "input_size": I,
        "hidden_size": H,
        "num_layers": layers,
        "bias": draw.chance(0.8),
        "batch_first": batch_first,
        "bidirectional": draw.chance(0.3),
        "dtype": dtype,
        **({"dropout": 0.3} if layers > 1 and not dtype.is_complex and draw.chance(0.2) else {}),
        **({"proj_size": H // 2} if proj else {}),
        **options,
    }
    if "forget_bias" in options:
        made["bias"] = True
    if proj and H == 18:
        made["proj_size"] = draw.choice((8, 16))
    names = {*made, "input", "hx", "hidden", "lengths", "reset", "return_states"}
    title = f"{cell}({made})"
    if draw.chance(0.1):
        name = draw.choice(tuple(made))
        made[name] = draw.wrong(name, made[name])
        return constructor(cell, made, title, names)
    ours, theirs = make_both(draw, cell, made)
    names |= {name for name, _ in ours.named_parameters()} | {"weight"}
    names |= {"batch_sizes", "sorted_indices", "unsorted_indices", "hidden states"}
    if options or draw.chance(0.3):
        for module in (ours, theirs):
            module.eval() if module is not None else None
    spoil_weights(draw, ours, theirs)

    T, B = draw.randint(1, 6), draw.choice((0, 1, 2, 5))
    D, O = 1 + made["bidirectional"], made.get("proj_size") or H  # noqa: E741
    x = draw.normal(T, B, I, dtype=dtype)
    given: dict[str, Any] = {}
    layout = draw.choice(("padded", "padded", "packed", "unbatched"))
    if layout == "packed" and B > 0:
        lengths = torch.tensor([draw.randint(1, T) for _ in range(B)])
        lengths[draw.randrange(B)] = T
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    elif layout == "unbatched":
        x, B = draw.normal(T, I, dtype=dtype), 0
    else:
        x = x.transpose(0, 1) if batch_first else x
        if draw.chance(0.2):
            given["lengths"] = torch.tensor([draw.randint(0, T) for _ in range(B)]).long()
        if draw.chance(0.2):
            reset = torch.rand(T, B, generator=draw.tensors) < 0.3
            given["reset"] = reset.T if batch_first else reset
    rows = () if layout == "unbatched" else (B,)
    if draw.chance(0.5):
        hx = [draw.normal(layers * D, *rows, O, dtype=dtype)]
        if cell == "LSTM":
            hx.append(draw.normal(layers * D, *rows, H, dtype=dtype))
        given["hx"] = tuple(draw.odd("hx", s) for s in hx) if cell == "LSTM" else hx[0]
    if draw.chance(0.1):
        given["return_states"] = draw.chance(0.7)
    given = draw.arguments({"input": x, **given}, wrong=0.5)
    return module_call(draw, title, names, ours, theirs, given)


def module_call(
    draw: Draw, title: str, names: set[str], ours: Any, theirs: Any, given: dict[str, Any]
) -> Call:
    """A layer or a cell as it is called: plainly, with gradients, or under a transform."""
    way = draw.choices(("plain", "no grad", "inference", "gradients", *TRANSFORMS), (4, 2, 1, 4, 1))
    title = f"{title} {way[0]}"

    def run(module: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if way[0] == "no grad":
                with torch.no_grad():
                    return with_gradients(module, given, False)
            if way[0] == "inference":
                with torch.inference_mode():
                    return with_gradients(module, given, False)
            if way[0] == "transform":
                return TRANSFORMS["transform"](module, given)
            return with_gradients(module, given, way[0] == "gradients")

    asks_more = theirs is None or {"lengths", "reset", "return_states"} & set(given)
    expected = None
    if way[0] != "transform" and not asks_more:
        expected = lambda: run(theirs)  # noqa: E731
    elif set(given) <= {"input", "lengths", "hx"} and theirs is not None and not draw.broken:
        drops = theirs.training and getattr(theirs, "dropout", 0) > 0  # other masks of packed data
        expected = by_packing(theirs, given) if way[0] == "plain" and not drops else None
    return Call(title, names, lambda: run(ours), expected)


def vjp_of_functional_call(module: Any, given: dict[str, Any]) -> Any:
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Any:
        found = results(torch.func.functional_call(module, parameters, (), given))
        total = sum((y * y).sum() for y in torch.utils._pytree.tree_leaves(found) if y is not None)
        return total.real if total.is_complex() else total

    return torch.func.grad(loss)(parameters)


TRANSFORMS = {"transform": vjp_of_functional_call}


def by_packing(module: Any, given: dict[str, Any]) -> Callable[[], Any] | None:
    """lengths= as torch.nn has them, by packing; for lengths of 1 and more."""
    lengths, x = given.get("lengths"), given["input"]
    if not isinstance(lengths, Tensor) or len(lengths) == 0 or int(lengths.min()) < 1:
        return None

    def run() -> Any:
        first = module.batch_first
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        output, hx_n = module(packed, given.get("hx"))
        steps = x.shape[1 if first else 0]
        return results((pad_packed_sequence(output, first, total_length=steps)[0], hx_n))

    return run


def cell(draw: Draw) -> Call:
    name = draw.choice(CELLS)
    dtype = dtype_of(draw)
    I, H = draw.choice((1, 3, 8)), draw.choice((2, 4, 6, 18))  # noqa: E741
    options = own_options(draw, name, False, dtype)
    made: dict[str, Any] = {"input_size": I, "hidden_size": H, "bias": draw.chance(0.8)}
    made |= {"dtype": dtype, **options}
    if "forget_bias" in options:
        made["bias"] = True
    names = {*made, "input", "hx", "hidden", "h_0", "hidden states", "weight", "bias"}
    names |= {"norm_", "c_0"}
    title = f"{name}Cell({made})"
    if draw.chance(0.1):
        option = draw.choice(tuple(made))
        made[option] = draw.wrong(option, made[option])
        return constructor(f"{name}Cell", made, title, names)
    ours, theirs = make_both(draw, f"{name}Cell", made)
    ours.eval() if options else None
    spoil_weights(draw, ours, theirs)
    rows = draw.choice(((), (1,), (4,), (0,)))
    given: dict[str, Any] = {"input": draw.normal(*rows, I, dtype=dtype)}
    if draw.chance(0.6):
        hx = tuple(draw.normal(*rows, H, dtype=dtype) for _ in range(1 + (name == "LSTM")))
        given["hx"] = hx if name == "LSTM" else hx[0]
    given = draw.arguments(given, wrong=0.5)
    return module_call(draw, title, names, ours, theirs, given)


# ---- functions ----------------------------------------------------------------------------------


def functional(draw: Draw) -> Call:
    """The functions on NumPy's arrays and on torch's tensors, forward and backward."""
    name = draw.choice(CELLS)
    T, B, I = draw.randint(1, 5), draw.randint(0, 4), draw.choice((1, 3))  # noqa: E741
    H = draw.choice((2, 6))
    L, D = draw.choice((1, 2)), draw.choice((1, 2))
    dtype = draw.choice((torch.float32, torch.float64))
    rows, bias = GATES[name] * H, draw.chance(0.7)
    weights = []
    for k in range(L * D):
        shapes = [(rows, I if k < D else D * H), (rows, H), *[(rows,)] * (2 if bias else 0)]
        weights += [draw.normal(*shape, dtype=dtype) / 3 for shape in shapes]
    batch_first = draw.chance(0.3)
    x = draw.normal(*((B, T) if batch_first else (T, B)), I, dtype=dtype)
    hx = tuple(draw.normal(L * D, B, H, dtype=dtype) for _ in range(1 + (name == "LSTM")))
    given: dict[str, Any] = {
        "input": x,
        "hx": draw.choice((None, hx if name == "LSTM" else hx[0])),
        "weights": weights,
        "num_layers": L,
        "bidirectional": D == 2,
        "bias": bias,
        "batch_first": batch_first,
    }
    if draw.chance(0.3):
        given["lengths"] = torch.tensor([draw.randint(0, T) for _ in range(B)]).long()
    if draw.chance(0.3):
        reset = torch.rand(T, B, generator=draw.tensors) < 0.3
        given["reset"] = reset.T if batch_first else reset
    more: tuple[tuple[str, Any], ...] = (
        ("return_states", True),
        ("grad_clip", 0.5),
        ("zoneout", 0.2),
        ("recompute", True),
        ("heads", 1),
    )
    given |= dict(draw.sample(more, draw.choice((0, 0, 1, 2))))
    as_numpy = draw.chance(0.5)
    both = dict(given)
    if as_numpy:
        given = torch.utils._pytree.tree_map(
            lambda v: v.numpy() if isinstance(v, Tensor) else v, given
        )
    given = draw.arguments(given, wrong=0.5)
    backward = draw.chance(0.5)
    output = torch.ones(*x.shape[:2], D * H, dtype=dtype)
    d_output = output.numpy() if as_numpy else output
    if backward and draw.chance(0.3):
        d_output = draw.wrong("d_output", d_output)
    function = getattr(fastrnn.functional, name.lower())
    gradient = getattr(fastrnn.functional, f"{name.lower()}_backward")

    def run(given: dict[str, Any], d_output: Any) -> Any:
        if not backward:
            return as_tensors(function(**given))
        *found, saved = function(**given, return_saved=True)
        return as_tensors((found, gradient(d_output, None, saved)))

    names = {*given, "h0", "c0", "h_0", "weight", "d_output", "d_", "saved", "bias_", "states"}
    # The two routes give the same bits.
    expected = (lambda: run(both, output)) if as_numpy and not draw.broken else None
    title = f"functional.{name.lower()}({'NumPy' if as_numpy else 'torch'}, {list(given)})"
    return Call(title, names, lambda: run(given, d_output), expected)


def as_tensors(found: Any) -> Any:
    if isinstance(found, fastrnn.Tensor):
        return found.torch()
    if isinstance(found, (tuple, list)):
        return tuple(as_tensors(x) for x in found if x is not None)
    return found


def stream(draw: Draw) -> Call:
    """A stream beside its layer over the same steps, with resets, states and refreshes between."""
    name, B, dtype = draw.choice(CELLS), draw.choice((1, 2, 5)), draw.choice((*REAL, None, "int8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = getattr(fastrnn, name)(3, draw.choice((2, 18)), draw.choice((1, 2)))
    made = draw.arguments({"layer": source, "batch_size": B, "dtype": dtype}, wrong=0.15)
    storage = torch.float32 if dtype in (None, "int8") else getattr(torch, str(dtype))
    steps: list[tuple[str, Any]] = []
    for _ in range(draw.randint(1, 5)):
        kind = draw.choice(("step", "step", "step", "reset", "state", "refresh", "pickle"))
        argument: Any = None
        if kind == "step":
            x = draw.normal(B, 3, dtype=storage)
            numpy = storage in (torch.float32, torch.float64) and draw.chance(0.5)
            argument = draw.arguments({"x": x.numpy() if numpy else x}, wrong=0.2)["x"]
        elif kind == "reset":
            rows = draw.choice((None, [0], np.arange(B) % 2 == 0, torch.zeros(B, dtype=torch.bool)))
            argument = draw.wrong("rows", rows) if draw.chance(0.3) else rows
        elif kind == "state" and draw.chance(0.5):
            argument = draw.choice(JUNK)
            draw.broken = True
        steps.append((kind, argument))

    def run() -> Any:
        stream = fastrnn.Stream(**made)
        for kind, argument in steps:
            if kind == "step":
                stream.step(argument)
            elif kind == "reset":
                stream.reset(argument)
            elif kind == "refresh":
                stream.refresh()
            elif kind == "pickle":
                stream = copy.deepcopy(stream)
            else:
                stream.state = stream.state if argument is None else argument
        return stream.step(torch.zeros(stream.batch_size, 3, dtype=storage)).clone()

    def expected() -> Any:
        same = all(isinstance(x, (Tensor, np.ndarray)) for kind, x in steps if kind == "step")
        if dtype == "int8" or not same or any(kind == "reset" for kind, _ in steps):
            raise LookupError("nothing to compare with")
        inputs = [torch.as_tensor(np.asarray(x) if isinstance(x, np.ndarray) else x).detach()
                  for kind, x in steps if kind == "step"]  # fmt: skip
        whole = torch.stack([*inputs, torch.zeros(B, 3, dtype=storage)])
        with torch.no_grad():
            return copy.deepcopy(source).eval().to(storage)(whole)[0][-1]

    names = {"layer", "batch_size", "dtype", "x", "rows", "state", "state[0]", "there is no row"}
    exact = None if draw.broken else expected
    return Call(
        f"Stream({name}, {B}, {dtype}) {[kind for kind, _ in steps]}", names, run, exact, exact=True
    )


REAL = ("float32", "float64", "bfloat16", "float16")


def from_dlpack(draw: Draw) -> Call:
    x: Any = draw.normal(3, 4)
    x = x.numpy() if draw.chance(0.6) else x
    given = draw.arguments({"x": x}, wrong=0.8)["x"]
    names = {"x", "torch has no negative strides", "read-only", "read_only", "NumPy"}
    if isinstance(given, np.ndarray) and (given.nbytes > 2**20 or not given.flags.writeable):
        return Call("from_dlpack", names, lambda: fastrnn.from_dlpack(given) is None)
    if isinstance(given, Tensor) and given.numel() > 2**20:
        return Call("from_dlpack", names, lambda: fastrnn.from_dlpack(given) is None)

    def run() -> Any:
        tensor = fastrnn.from_dlpack(given)
        repr(tensor)
        return torch.as_tensor(tensor.numpy().copy()) if tensor.dtype in REAL[:2] else 0

    expected = None if draw.broken else lambda: torch.as_tensor(np.array(plain(x)))
    return Call("from_dlpack", names, run, expected, exact=True)


def plain(x: Any) -> Any:
    return x.detach().numpy() if isinstance(x, Tensor) else x


# ---- whole models -------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """A recurrent layer or two inside something else."""

    def __init__(self, recurrent: list[Any]) -> None:
        super().__init__()
        self.recurrent = torch.nn.ModuleList(recurrent)
        self.cell = torch.nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for one in self.recurrent:
            x, _ = one(x)
        return self.cell(x[-1])


def convert(draw: Draw) -> Call:
    torch.manual_seed(draw.getrandbits(30))
    kinds = [draw.choice(CELLS) for _ in range(draw.randint(1, 2))]
    model = Model([getattr(torch.nn, kind)(4, 4) for kind in kinds])
    x = draw.normal(3, 2, 4)
    want = model(x).detach()
    there, back = draw.choice(((True, False), (True, True), (False, True)))
    given = draw.arguments({"model": model}, wrong=0.3)["model"]

    def run() -> Any:
        found = fastrnn.convert(given) if there else given
        found = fastrnn.to_torch(found) if back else found
        return found(x).detach() if isinstance(found, Model) else None

    expected = None if draw.broken else lambda: want
    return Call(f"convert and back ({there}, {back}), {kinds}", {"model"}, run, expected)


def gradient_flow(draw: Draw) -> Call:
    torch.manual_seed(draw.getrandbits(30))
    kinds = [draw.choice(CELLS) for _ in range(draw.randint(1, 2))]
    model = Model([getattr(fastrnn, kind)(4, 4) for kind in kinds])
    x, T = draw.normal(draw.randint(1, 4), 2, 4), None
    given = draw.arguments({"model": model}, wrong=0.3)["model"]
    backward = draw.chance(0.8)
    draw.broken |= not backward

    def run() -> Any:
        with fastrnn.gradient_flow(given) as flow:
            loss = model(x).square().sum()
            if backward:
                loss.backward()
        str(flow)
        str(flow.table())
        return T

    return Call(f"gradient_flow, {kinds}, backward: {backward}", {"model", "gradient"}, run)


# With how often each is drawn.
SUBJECTS: dict[Callable[[Draw], Call], int] = {
    layer: 40,
    cell: 20,
    functional: 20,
    stream: 10,
    from_dlpack: 5,
    convert: 3,
    gradient_flow: 2,
}
