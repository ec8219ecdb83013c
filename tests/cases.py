"""What the tests run: stacks, the layout of their data, and options, alone and in pairs.

`Case` says which stack; problems.py makes its data in NumPy, stacks.py in torch.
`fastrnn.bench.cases.Case` is another thing: what is timed, as a suite's file names it.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrnn._options import Options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


LAYOUTS = ("padded", "lengths", "packed", "reset", "lengths-reset")
EXTRAS = ("reset_hx", "dropout", "zoneout_h", "zoneout_c")

STACKS = {
    "rnn": Options("RNN"),
    "rnn-sigmoid-2": Options("RNN", num_layers=2, activation="sigmoid"),
    "gru": Options("GRU"),
    "gru-bidirectional-2": Options("GRU", num_layers=2, bidirectional=True),
    "gru-before-no-bias": Options("GRU", bias=False, reset_after=False),
    "lstm": Options("LSTM"),
    "lstm-identity-hard": Options("LSTM", activation="identity", gate_activation="hardsigmoid"),
    "lstm-bidirectional-2": Options("LSTM", num_layers=2, bidirectional=True, bias=False),
    "lstm-projected": Options("LSTM", num_layers=2, bidirectional=True, proj_size=2),
}


class Case(NamedTuple):
    """A stack, the layout of its data, and which further arrays its options take."""

    options: Options
    layout: str = "lengths-reset"  # of LAYOUTS
    extras: tuple[str, ...] = ()  # of EXTRAS

    def __str__(self) -> str:
        own = [
            f"{name}={getattr(self.options, name)}"
            for name, field in self.options.__dataclass_fields__.items()
            if name != "cell" and getattr(self.options, name) != field.default
        ]
        return " ".join([self.options.cell, *own, self.layout, *self.extras])


def all_pairs(parameters: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations of one value of each parameter in which every two values meet at least once.

    Greedy: each new combination starts from two values that have not met, and takes for every other
    parameter the value that adds the most new meetings.
    """
    names = list(parameters)
    apart = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i in range(len(parameters[a]))
        for j in range(len(parameters[b]))
    }

    def meeting(a: tuple[str, int], b: tuple[str, int]) -> Any:
        return (a, b) if names.index(a[0]) < names.index(b[0]) else (b, a)

    found = []
    while apart:
        chosen = dict(min(apart))
        for name in names:
            if name not in chosen:
                chosen[name] = max(
                    range(len(parameters[name])),
                    key=lambda k: sum(
                        meeting((name, k), other) in apart for other in chosen.items()
                    ),
                )
        apart -= {meeting(a, b) for a, b in combinations(chosen.items(), 2)}
        found.append({name: parameters[name][chosen[name]] for name in names})
    return found


def _case(cell: Any, layout: str = "lengths-reset", **given: Any) -> Case:
    """A case from fields of `Options` and how zoneout, dropout and learned states are given."""
    extras = []
    if given.pop("learned", False):
        extras.append("reset_hx")
    if given.pop("dropout", False):
        extras.append("dropout")
    for name in ("zoneout_h", "zoneout_c"):
        how = given.pop(name, "off")
        if how == "mask":
            extras.append(name)
        if how != "off":
            given[name] = 0.3
    return Case(Options(cell, **given), layout, tuple(extras))


ALONE = [
    _case(cell, num_layers=2, bidirectional=True, **option)
    for cell in ("RNN", "LSTM", "GRU")
    for option in (
        {},
        {"layer_norm": True},
        {"heads": 2},
        {"zoneout_h": "expected"},
        {"zoneout_h": "mask"},
        {"dropout": True},
        {"learned": True},
        {"grad_clip": 0.1},
        {"recompute": True},
    )
]
ALONE += [
    _case("LSTM", num_layers=2, bidirectional=True, **option)
    for option in (
        {"peephole": True},
        {"zoneout_c": "expected"},
        {"zoneout_c": "mask"},
        {"zoneout_c": "mask", "grad_clip": 0.1},
        {"peephole": True, "grad_clip": 0.1},
        {"heads": 2, "proj_size": 4},
        {"layer_norm": True, "proj_size": 4},
    )
]
ALONE += [
    _case("GRU", num_layers=2, bidirectional=True, reset_after=False, **option)
    for option in ({"layer_norm": True}, {"heads": 2}, {"dropout": True})
]

_COMMON: dict[str, Sequence[Any]] = {
    "layout": LAYOUTS,
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "layer_norm": (False, True),
    "heads": (1, 2),
    "zoneout_h": ("off", "expected", "mask"),
    "dropout": (False, True),
    "learned": (False, True),
    "grad_clip": (0.0, 0.1),
    "recompute": (False, True),
    "activation": ("tanh", "sigmoid"),
}
_OF_CELL: dict[str, dict[str, Sequence[Any]]] = {
    "RNN": {},
    "LSTM": {
        "gate_activation": ("sigmoid", "hardsigmoid"),
        "peephole": (False, True),
        "proj_size": (0, 4),
        "zoneout_c": ("off", "expected", "mask"),
    },
    "GRU": {"gate_activation": ("sigmoid", "hardsigmoid"), "reset_after": (True, False)},
}
PAIRS = [
    _case(cell, **chosen)
    for cell, own in _OF_CELL.items()
    for chosen in all_pairs({**_COMMON, **own})
]
