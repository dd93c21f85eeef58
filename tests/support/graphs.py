"""Small ONNX graphs with adapter slots, built node by node, and whole exported folders around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lrcompress.files import sha256_bytes
from lrcompress.manifest import base_id, slots_id
from lrcompress.runtime.session import EXACT_INT8


class Graph:
    """Build small graphs whose layers have slots the way the exporter writes them."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.slots: dict[str, list[int | str]] = {}

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        fan = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        return self.constant(name, (self.rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32))

    def slot(self, name: str, *shape: int | str, rank: int) -> str:
        self.slots[name] = list(shape)
        return self.constant(name, np.zeros([rank if isinstance(d, str) else d for d in shape], np.float32))

    def conv(self, name: str, x: str, inner: int, outer: int, slot: bool) -> str:
        geometry = {"pads": [1, 1, 1, 1], "strides": [2, 2], "kernel_shape": [3, 3]}
        bias = self.constant(f"{name}.bias", self.rng.standard_normal(outer).astype(np.float32) / 10)
        y = self.node("Conv", [x, self.weight(f"{name}.weight", outer, inner, 3, 3), bias], f"{name}.y", **geometry)
        if slot:
            a = self.slot(f"{name}.lora_A", f"r_{name}", inner, 3, 3, rank=1)
            b = self.slot(f"{name}.lora_B", outer, f"r_{name}", 1, 1, rank=1)
            h = self.node("Conv", [x, a], f"{name}.h", **geometry)
            y = self.node("Add", [y, self.node("Conv", [h, b], f"{name}.d", kernel_shape=[1, 1])], f"{name}.sum")
        return self.node("Relu", [y], f"{name}.out")

    def linear(self, name: str, x: str, inner: int, outer: int, slot: bool, form: str) -> str:
        bias = self.constant(f"{name}.bias", self.rng.standard_normal(outer).astype(np.float32) / 10)
        if form == "gemm":
            y = self.node("Gemm", [x, self.weight(f"{name}.weight", outer, inner), bias], f"{name}.y", transB=1)
        else:
            w = self.weight(f"{name}.weight", *((outer, inner) if form == "transposed" else (inner, outer)))
            if form == "transposed":
                w = self.node("Transpose", [w], f"{name}.weight_t", perm=[1, 0])
            y = self.node("Add", [self.node("MatMul", [x, w], f"{name}.p"), bias], f"{name}.y")
        if slot:
            a = self.slot(f"{name}.lora_A", inner, f"r_{name}", rank=0)
            b = self.slot(f"{name}.lora_B", f"r_{name}", outer, rank=0)
            h = self.node("MatMul", [x, a], f"{name}.h")
            y = self.node("Add", [y, self.node("MatMul", [h, b], f"{name}.d")], f"{name}.sum")
        return y

    def model(self, name: str, dtype: int, shape: list[int | str], output: str, classes: int) -> onnx.ModelProto:
        self.node("Identity", [output], "output")
        inputs = [helper.make_tensor_value_info(name, dtype, shape)]
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in self.slots.items()]
        outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", classes])]
        graph = helper.make_graph(self.nodes, "main", inputs, outputs, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="tests"
        )
        onnx.checker.check_model(model)
        return model


def cnn(slot: bool = True) -> tuple[onnx.ModelProto, list[str]]:
    g = Graph()
    x = g.conv("c2", g.conv("c1", g.conv("c0", "x", 3, 16, slot), 16, 32, slot), 32, 64, slot)
    x = g.node("Flatten", [g.node("GlobalAveragePool", [x], "pooled")], "flat")
    return g.model("x", TensorProto.FLOAT, ["batch", 3, 32, 32], g.linear("fc", x, 64, 10, slot, "matmul"), 10), list(
        g.slots
    )


def mlp(form: str, slot: bool = True) -> tuple[onnx.ModelProto, list[str]]:
    g = Graph()
    h = g.node("Relu", [g.linear("fc0", "x", 64, 256, slot, form)], "h")
    return g.model("x", TensorProto.FLOAT, ["batch", 64], g.linear("fc1", h, 256, 10, slot, form), 10), list(g.slots)


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry(*EXACT_INT8)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def adapter(model: onnx.ModelProto, slots: list[str], rank: int, seed: int = 3) -> dict[str, np.ndarray]:
    rng, out = np.random.default_rng(seed), {}
    for value in model.graph.input:
        if value.name in slots:
            shape = [rank if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
            out[value.name] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
    return out


def batches(x: np.ndarray, size: int = 8) -> list[dict[str, np.ndarray]]:
    return [{"x": x[i : i + size]} for i in range(0, len(x), size)]


def slot_entries(model: onnx.ModelProto, slots: Sequence[str]) -> list[dict[str, Any]]:
    """Return the manifest's entries of the slots of a graph made here."""
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    entries = []
    for layer in dict.fromkeys(s.rpartition(".")[0] for s in slots):
        tensors = []
        for name in (f"{layer}.lora_A", f"{layer}.lora_B"):
            axis = next(i for i, d in enumerate(shapes[name]) if isinstance(d, str))
            tensors.append(
                {
                    "name": name,
                    "dtype": "float32",
                    "shape": shapes[name],
                    "rank_symbol": shapes[name][axis],
                    "rank_axis": axis,
                }
            )
        conv = len(shapes[f"{layer}.lora_A"]) > 2
        entry = {
            "layer": layer,
            "kind": "lora",
            "op": "conv" if conv else "linear",
            "tensors": tensors,
            "r_min": 0,
            "r_max": 64,
        }
        entries.append(entry | {"default_rank": int(conv)})
    return entries


def write_exported(
    folder: Path, model: onnx.ModelProto, slots: Sequence[str], x: np.ndarray, *, precision: str = "fp32",
    tolerance: float = 1e-4, expected: np.ndarray | None = None, original: np.ndarray | None = None,
    edit: Callable[[dict[str, Any]], None] | None = None,
) -> Path:  # fmt: skip
    """Write an exported folder; its goldens are the graph's own answers unless `expected` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    (folder / "base.data").write_bytes(b"")
    golden: dict[str, np.ndarray] = {
        "input/x": x,
        "compressed/output": run(model, x=x) if expected is None else expected,
    }
    if original is not None:
        golden["original/output"] = original
    np.savez(folder / "golden.npz", **golden)  # type: ignore[arg-type]
    (folder / "device.json").write_text(
        json.dumps({"schema": 1, "max_payload_bytes": 1 << 20, "latency_factor": 20, "threads": 1})
    )
    entries = slot_entries(model, slots)
    files = {n: (folder / n).read_bytes() for n in ("model.onnx", "base.data", "golden.npz", "device.json")}
    hashes = {n: {"sha256": sha256_bytes(b), "bytes": len(b)} for n, b in files.items()}
    value: dict[str, Any] = {
        "schema": 1, "made_by": "lrcompress export", "model": "small", "factors_digest": "ab" * 32, "files": hashes,
        "base_id": base_id(graph=hashes["model.onnx"]["sha256"], data=hashes["base.data"]["sha256"], slots=entries),
        "slots_id": slots_id(slots=entries, factors="ab" * 32),
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", *x.shape[1:]]}],
        "outputs": [{"name": "output", "dtype": "float32", "shape": ["batch", golden["compressed/output"].shape[1]]}],
        "opset": 20, "ir": 10, "ort": {"min": "1.22.0", "max": None}, "precision": precision, "slots": entries,
        "tolerances": {"cpu": tolerance, "arm64": tolerance}, "factors": [], "params": 0, "compressed": None,
        "versions": {},
    }  # fmt: skip
    if edit is not None:
        edit(value)
    (folder / "manifest.json").write_text(json.dumps(value))
    return folder
