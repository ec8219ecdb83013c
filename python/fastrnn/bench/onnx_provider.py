"""ONNX Runtime on the CPU: one LSTM, GRU or RNN node per layer in a prepared session.

Gates are reordered for ONNX: LSTM i,o,f,c from i,f,g,o; GRU z,r,h from r,z,n, with
linear_before_reset=1, which is torch's GRU. I/O binding excludes copies from the timed calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastrnn.bench.prepare import Prepared, UnsupportedError, require_package

if TYPE_CHECKING:
    from fastrnn.bench.cases import Case, Pass
    from fastrnn.bench.data import Data

OPSET = 17
IR_VERSION = 8
GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # ONNX's gate from torch's


class OnnxRuntime:
    name: ClassVar[str] = "onnxruntime"

    def __init__(self) -> None:
        for package in ("onnxruntime", "onnx"):
            require_package(package, "pip install onnx onnxruntime")
        import onnxruntime

        self.version = str(onnxruntime.__version__)

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        _require_supported(case, data, pass_)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        session = onnxruntime.InferenceSession(
            build_model(case, data), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        arrays = [data.inputs[0], *data.hx]
        for name, tensor in zip(("input", "h0", "c0"), arrays, strict=False):
            binding.bind_ortvalue_input(
                name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
            )
        outputs = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
            for name, shape in _output_shapes(case).items()
        }
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)

        def run(i: int) -> None:
            session.run_with_iobinding(binding)

        def results() -> dict[str, Tensor]:
            run(0)
            return _torch_layout(case, {n: v.numpy() for n, v in outputs.items()})

        return Prepared(run, results, "ONNX Runtime CPU")


def _require_supported(case: Case, data: Data, pass_: Pass) -> None:
    if pass_ == "training":
        raise UnsupportedError("ONNX Runtime supports only inference")
    if data.d_output.device.type != "cpu":
        raise UnsupportedError("ONNX Runtime is compared only on the CPU")
    if case.dtype != "float32":
        raise UnsupportedError(f"ONNX Runtime's nodes support only float32, not {case.dtype}")
    if case.is_step:
        raise UnsupportedError("ONNX Runtime has no operator for this cell")
    if case.options:
        raise UnsupportedError(f"ONNX Runtime is not compared with {' and '.join(case.options)}")


def _output_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """`Y` is (T, D, B, H); the states of layer l are `h_n{l}` and `c_n{l}`, (D, B, H)."""
    directions, states = case.directions, ("h", "c") if case.cell == "LSTM" else ("h",)
    shapes: dict[str, tuple[int, ...]] = {"Y": (case.T, directions, case.B, case.H)}
    for layer in range(case.layers):
        shapes |= {f"{s}_n{layer}": (directions, case.B, case.H) for s in states}
    return shapes


def _torch_layout(case: Case, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    output = arrays["Y"].transpose(0, 2, 1, 3).reshape(case.T, case.B, -1)
    results = {"output": torch.from_numpy(output)}
    for s in ("h", "c") if case.cell == "LSTM" else ("h",):
        last = [arrays[f"{s}_n{layer}"] for layer in range(case.layers)]
        results[f"{s}_n"] = torch.from_numpy(np.concatenate(last))
    return results


def build_model(case: Case, data: Data) -> bytes:
    """The case as a serialised ONNX model of `input`, `h0`, `c0`; outputs as in _output_shapes."""
    from onnx import TensorProto, helper, numpy_helper

    float32 = TensorProto.FLOAT
    states = ("h", "c")[: len(data.hx)]
    group = case.directions
    nodes, constants = [], []

    def constant(name: str, value: npt.NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    if case.layers > 1:
        constant("split", np.full(case.layers, group, dtype=np.int64))
        constant("joined", np.array([0, 0, -1], dtype=np.int64))
        for s in states:
            parts = [f"{s}0_{layer}" for layer in range(case.layers)]
            nodes.append(helper.make_node("Split", [f"{s}0", "split"], parts, axis=0))

    sequence = "input"
    for layer in range(case.layers):
        last = layer == case.layers - 1
        weights = data.weights[4 * group * layer : 4 * group * (layer + 1)]
        w, r, b = (constant(f"{n}{layer}", v) for n, v in _onnx_weights(case, weights).items())
        hx = [f"{s}0" if case.layers == 1 else f"{s}0_{layer}" for s in states]
        y = "Y" if last else f"Y{layer}"
        outputs = [y, *(f"{s}_n{layer}" for s in states)]
        nodes.append(
            helper.make_node(case.cell, [sequence, w, r, b, "", *hx], outputs, **_attributes(case))
        )
        if not last:  # (T, D, B, H) to (T, B, D·H)
            nodes.append(helper.make_node("Transpose", [y], [f"{y}t"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"{y}t", "joined"], [f"{y}j"]))
            sequence = f"{y}j"

    shapes: dict[str, tuple[int, ...]] = {"input": (case.T, case.B, case.I)}
    shapes |= {f"{s}0": (case.layers * group, case.B, case.H) for s in states}
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info(n, float32, shape) for n, shape in shapes.items()],
        [helper.make_tensor_value_info(n, float32, s) for n, s in _output_shapes(case).items()],
        constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    return bytes(model.SerializeToString())


def _attributes(case: Case) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "hidden_size": case.H,
        "direction": "bidirectional" if case.bidirectional else "forward",
    }
    if case.cell == "GRU":
        attributes["linear_before_reset"] = 1
    if case.cell == "RNN":
        attributes["activations"] = [case.nonlinearity.capitalize()] * case.directions
    return attributes


def _onnx_weights(case: Case, weights: list[Tensor]) -> dict[str, npt.NDArray[Any]]:
    """W (D, G·H, I), R (D, G·H, H) and B (D, 2·G·H) of one layer, in ONNX's gate order."""
    order = list(GATE_ORDER[case.cell])

    def reorder(weight: Tensor) -> npt.NDArray[Any]:
        array = weight.numpy()
        return array.reshape(case.stack.gates, case.H, -1)[order].reshape(array.shape)

    parameters = [reorder(w) for w in weights]
    w_ih, w_hh, b_ih, b_hh = (parameters[k::4] for k in range(4))
    return {
        "W": np.stack(w_ih),
        "R": np.stack(w_hh),
        "B": np.stack([np.concatenate(pair) for pair in zip(b_ih, b_hh, strict=True)]),
    }
