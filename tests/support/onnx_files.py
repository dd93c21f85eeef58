"""ONNX files built node by node: layers in every way they are stored, and graphs that must be refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

node = helper.make_node


def w(*shape: int, seed: int = 0, scale: float | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed + sum(shape))
    return (rng.standard_normal(shape) * (scale or 1 / np.sqrt(shape[-1]))).astype(np.float32)


def model(
    nodes: Sequence[NodeProto], constants: dict[str, np.ndarray], x: Sequence[int | str] = ("n", 8), *, dtype: int = TensorProto.FLOAT,
    output: str = "y", opset: int = 20, ir: int = 10, out_dtype: int = TensorProto.FLOAT,
) -> ModelProto:  # fmt: skip
    """One input x, one output."""
    graph = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", dtype, list(x))],
        [helper.make_tensor_value_info(output, out_dtype, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def save(made: ModelProto, path: Path) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def run(source: ModelProto | Path, **feeds: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    given = str(source) if isinstance(source, Path) else source.SerializeToString()
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def mlp(width: int = 48, classes: int = 6) -> ModelProto:
    """MatMul + bias, Relu, a Gemm of a transposed weight, Relu, MatMul: x (n, 32)."""
    nodes = [
        node("MatMul", ["x", "fc0.weight"], ["p0"], name="/fc0/MatMul"), node("Add", ["p0", "fc0.bias"], ["a0"], name="/fc0/Add"),
        node("Relu", ["a0"], ["h0"]), node("Gemm", ["h0", "fc1.weight", "fc1.bias"], ["a1"], name="/fc1/Gemm", transB=1),
        node("Relu", ["a1"], ["h1"]), node("MatMul", ["h1", "fc2.weight"], ["y"], name="/fc2/MatMul"),
    ]  # fmt: skip
    constants = {
        "fc0.weight": w(32, width), "fc0.bias": w(width, seed=1), "fc1.weight": w(width, width, seed=2),
        "fc1.bias": w(width, seed=3), "fc2.weight": w(width, classes, seed=4),
    }  # fmt: skip
    made = model(nodes, constants, ("n", 32))
    made.metadata_props.add(key="author", value="nobody here")
    made.graph.doc_string = "a small one"
    return made


def correlated(n: int, width: int, rank: int = 6, seed: int = 5) -> np.ndarray:
    """Rows of low rank with a mean and a little noise: what statistics are worth something on."""
    rng = np.random.default_rng(seed)
    mixed = np.random.default_rng(width).standard_normal((rank, width))
    rows = rng.standard_normal((n, rank)) @ mixed + 0.1 * rng.standard_normal((n, width)) + 0.5
    return rows.astype(np.float32)


def conv_net() -> ModelProto:
    """Two convolutions and a classifier: x (n, 3, 12, 12)."""
    nodes = [
        node("Conv", ["x", "c0.weight", "c0.bias"], ["a0"], pads=[1, 1, 1, 1], strides=[2, 2]), node("Relu", ["a0"], ["h0"]),
        node("Conv", ["h0", "c1.weight"], ["a1"], auto_pad="SAME_UPPER", strides=[2, 2]), node("Relu", ["a1"], ["h1"]),
        node("GlobalAveragePool", ["h1"], ["g"]), node("Flatten", ["g"], ["f"]), node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"]),
    ]  # fmt: skip
    constants = {
        "c0.weight": w(24, 3, 3, 3), "c0.bias": w(24), "c1.weight": w(32, 24, 3, 3, scale=0.1), "fc.weight": w(32, 10),
        "fc.bias": w(10),
    }  # fmt: skip
    return model(nodes, constants, ("n", 3, 12, 12))


def branching() -> ModelProto:
    """x (n, 8) goes through one of two layers, by its sign: weights are constants inside the branches."""

    def branch(name: str, seed: int) -> onnx.GraphProto:
        weight = helper.make_node(
            "Constant", [], [f"{name}.weight"], value=numpy_helper.from_array(w(8, 16, seed=seed), "v")
        )
        inner = [
            weight,
            node("Relu", ["x"], [f"{name}.in"]),
            node("MatMul", [f"{name}.in", f"{name}.weight"], [f"{name}.y"], name=name),
        ]
        return helper.make_graph(inner, name, [], [helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)])

    nodes = [
        node("ReduceSum", ["x"], ["sum"], keepdims=0), node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["z"], then_branch=branch("up", 1), else_branch=branch("down", 2)),
        node("MatMul", ["z", "last.weight"], ["y"]),
    ]  # fmt: skip
    return model(nodes, {"zero": np.float32(0), "last.weight": w(16, 8)}, ("n", 8))
