"""Stacks with options: each option by itself, and few combinations in which all pairs meet."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrnn._options import Options
from problems import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class OptionCase(NamedTuple):
    """A stack, the layout of its data, one of `LAYOUTS`, and what its options ask for besides."""

    options: Options
    layout: str = "lengths and reset"
    extras: tuple[str, ...] = ()  # of problems.EXTRAS

    def __str__(self) -> str:
        own = [
            f"{name}={getattr(self.options, name)}"
            for name, field in self.options.__dataclass_fields__.items()
            if name != "cell" and getattr(self.options, name) != field.default
        ]
        return " ".join([self.options.cell, *own, self.layout.replace(" ", "-"), *self.extras])


def all_pairs(parameters: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations of one value of each parameter in which every two values meet at least once.

    Greedy: each new combination begins with two values that have not met, and takes for every other
    parameter the value that meets most of those it has not met.
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


def _case(cell: Any, layout: str = "lengths and reset", **given: Any) -> OptionCase:
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
    return OptionCase(Options(cell, **given), layout, tuple(extras))


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
