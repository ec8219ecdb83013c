"""The translation of fastrnn's operator to ONNX: one LSTM, GRU or RNN node for each layer.

An ONNX node has the weights W [D, G·H, I], R [D, G·H, H] and B [D, 2·G·H], the gates in the order
i, o, f, c (LSTM) or z, r, h (GRU), and an output of shape [T, D, B, H]; see
https://onnx.ai/onnx/operators/onnx__LSTM.html and the pages of GRU and RNN. Nodes in the graph
convert the weights to this layout; a runtime folds them into constants when it loads the model.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .._options import Options, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Value = Any  # onnx_ir.Value

ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # fastrnn's gates in ONNX's order
UNROLLED = (
    "export torch.export.export(model, args).run_decompositions(fastrnn.decompositions()), which "
    "unrolls the steps"
)
_FUNCTIONS: dict[str, tuple[str, tuple[float, float] | None]] = {  # name, alpha and beta
    "tanh": ("Tanh", None),
    "relu": ("Relu", None),
    "sigmoid": ("Sigmoid", None),
    "identity": ("Affine", (1.0, 0.0)),
    "hardsigmoid": ("HardSigmoid", (1 / 6, 0.5)),
}
# Arguments that ONNX supports, and states after a reset, which are unused because reset is refused.
_ARRAYS = ("input", "h0", "c0", "weights", "lengths", "reset_h", "reset_c")
_TRANSLATED = (  # options that ONNX supports
    "cell",
    "num_layers",
    "bidirectional",
    "bias",
    "activation",
    "gate_activation",
    "reset_after",
    "grad_clip",  # grad_clip and recompute have no effect on inference
    "recompute",
)


def onnx_translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the table with which ``torch.onnx.export`` exports programs with fastrnn's layers.

    You do not need it to export a model. You need it to export a program that
    ``torch.export.export`` has made from a model.

    Each layer of a stack becomes one LSTM, GRU or RNN node of standard ONNX, with both directions
    in one node; ``lengths`` becomes its ``sequence_lens``. T and B may be dynamic.

    ONNX has no equivalent for ``proj_size``, ``reset``, a PackedSequence (pass ``lengths``
    instead), and an LSTM's c of every step (``return_states``): the export then fails with an error
    that names the feature. Float64 and half types are valid ONNX, but ONNX Runtime computes these
    nodes only in float32.

    Returns:
        The ``custom_translation_table`` of ``torch.onnx.export(…, dynamo=True)``.

    Raises:
        ModuleNotFoundError: onnxscript is not installed; ``pip install onnxscript`` installs it.

    >>> import torch, fastrnn
    >>> layer = fastrnn.GRU(3, 4, num_layers=2).eval()
    >>> program = torch.onnx.export(
    ...     torch.export.export(layer, (torch.randn(5, 2, 3),)),
    ...     dynamo=True,
    ...     verbose=False,
    ...     custom_translation_table=fastrnn.onnx_translation_table(),
    ... )
    >>> [node.op_type for node in program.model.graph if node.op_type == "GRU"]
    ['GRU', 'GRU']
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "export to ONNX needs onnxscript: pip install onnxscript", name=error.name
        ) from error
    from ..calls.operators import forward_op

    return {forward_op: _translate}


def _translate(*arguments: Any) -> Any:
    """``fastrnn::forward`` as ONNX nodes, called by torch's exporter with the values of a graph."""
    from ..calls.operators import forward_op

    names = [argument.name for argument in forward_op._schema.arguments]
    given = dict(zip(names, arguments, strict=True))
    options = parse(given.pop("options"))
    states, save, _ = (given.pop(name) for name in ("states", "save", "by_torch"))
    check_options(options, states)
    check_arrays(given)
    stack = _Stack(options, given["weights"], given["lengths"])
    outputs, finals = stack.run(given["input"], given["h0"], given["c0"])
    nothing = stack.empty(given["input"])
    hidden = nothing
    if states or save:
        hidden = stack.joined([stack.op.Unsqueeze(y, [0]) for y in outputs])
    h_n, *c_n = (stack.joined(parts) for parts in zip(*finals, strict=True))
    return outputs[-1], h_n, c_n[0] if c_n else nothing, hidden, nothing, nothing


def check_options(options: Options, states: bool) -> None:
    for field in fields(Options):
        value = getattr(options, field.name)
        if field.name not in _TRANSLATED and value != field.default:
            raise ValueError(
                f"{field.name}={value!r} has no equal in ONNX's {options.cell}: {UNROLLED}"
            )
    if states and options.cell == "LSTM":
        raise ValueError(
            "return_states=True has no equal in ONNX's LSTM, which returns only the last c: "
            f"{UNROLLED}"
        )


def check_arrays(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in _ARRAYS and value is not None:
            known = {"batch_sizes": "a PackedSequence (pass lengths= instead)", "reset": "reset="}
            raise ValueError(f"{known.get(name, name)} has no equal in ONNX: {UNROLLED}")


def attributes(options: Options) -> dict[str, Any]:
    """The node's attributes, without those that equal ONNX's defaults."""
    found: dict[str, Any] = {"direction": "bidirectional"} if options.bidirectional else {}
    if options.cell == "GRU":
        found["linear_before_reset"] = int(options.reset_after)
    names = [options.activation]
    if options.cell != "RNN":
        names.insert(0, options.gate_activation)
    if options.cell == "LSTM":
        names.append(options.activation)  # first for the candidate, then for the cell's output
    if names not in (["tanh"], ["sigmoid", "tanh"], ["sigmoid", "tanh", "tanh"]):
        functions = [_FUNCTIONS[name] for name in names] * options.directions
        found["activations"] = [name for name, _ in functions]
        slopes = [numbers for _, numbers in functions if numbers]
        if slopes:
            found["activation_alpha"] = [alpha for alpha, _ in slopes]
            found["activation_beta"] = [beta for _, beta in slopes]
    return found


class _Stack:
    """The nodes of one call."""

    def __init__(self, options: Options, weights: Sequence[Value], lengths: Value | None) -> None:
        from onnxscript import opset18

        self.op: Any = opset18
        self.options = options
        self.directions = options.directions
        self.gates = len(ORDER[options.cell])
        each = len(weights) // (options.num_layers * self.directions)
        self.groups = [weights[k : k + each] for k in range(0, len(weights), each)]
        self.hidden = int(weights[0].shape[0]) // self.gates
        self.lengths = lengths

    def run(
        self, x: Value, h0: Value | None, c0: Value | None
    ) -> tuple[list[Value], list[list[Value]]]:
        """The output of each layer (T, B, D·H), and its final states (D, B, H)."""
        op, D, options = self.op, self.directions, self.options
        lengths = None if self.lengths is None else op.Cast(self.lengths, to=6)  # int32
        starts = [self.of_layers(state) for state in (h0, c0)]
        outputs, finals = [], []
        for layer in range(options.num_layers):
            initial = [None if start is None else start[layer] for start in starts]
            groups = self.groups[layer * D : (layer + 1) * D]
            inputs = [*self.weights(groups), lengths, *initial]
            inputs = inputs if options.cell == "LSTM" else inputs[:-1]
            node = getattr(op, options.cell)
            y, *last = node(x, *inputs, hidden_size=self.hidden, **attributes(options))
            x = self.side_by_side(y)
            outputs.append(x)
            finals.append([self.final(s, s0) for s, s0 in zip(last, initial, strict=False)])
        return outputs, finals

    def of_layers(self, state: Value | None) -> Sequence[Value] | None:
        """(L·D, B, H) split into one (D, B, H) per layer."""
        layers = self.options.num_layers
        if state is None or layers == 1:
            return None if state is None else [state]
        parts: Sequence[Value] = self.op.Split(state, axis=0, num_outputs=layers)
        return parts

    def weights(self, groups: Sequence[Sequence[Value]]) -> list[Value | None]:
        """W, R and B of a layer."""
        op = self.op
        matrices = [
            self.joined([op.Unsqueeze(self.ordered(group[k]), [0]) for group in groups])
            for k in range(2)
        ]
        if not self.options.bias:
            return [*matrices, None]
        biases = [self.joined([self.ordered(b) for b in group[2:4]]) for group in groups]
        return [*matrices, self.joined([op.Unsqueeze(b, [0]) for b in biases])]

    def ordered(self, weight: Value) -> Value:
        """(G·H, …) with the gates in ONNX's order."""
        order = ORDER[self.options.cell]
        if len(order) == 1:
            return weight
        rows = [gate * self.hidden + unit for gate in order for unit in range(self.hidden)]
        return self.op.Gather(weight, rows, axis=0)

    def side_by_side(self, y: Value) -> Value:
        """[T, D, B, H] as (T, B, D·H)."""
        op = self.op
        if self.directions == 1:
            return op.Squeeze(y, [1])
        return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, self.directions * self.hidden])

    def final(self, last: Value, initial: Value | None) -> Value:
        """The final state; for a sequence of length 0 the initial state, where ONNX has zeros."""
        op = self.op
        if self.lengths is None or initial is None:
            return last
        none = op.Equal(self.lengths, op.CastLike(0, self.lengths))
        return op.Where(op.Unsqueeze(none, [0, 2]), initial, last)

    def joined(self, parts: Sequence[Value]) -> Value:
        """The parts concatenated along the first axis."""
        return parts[0] if len(parts) == 1 else self.op.Concat(*parts, axis=0)

    def empty(self, like: Value) -> Value:
        """The placeholder for an unused output: shape (0,)."""
        return self.op.CastLike(self.op.ConstantOfShape([0]), like)
