"""What a graph must still be before anyone gets it. Each gate raises `ModelError` or `ParityError` with the first miss.

1. Every tensor of the module is an initializer under its own name.
2. Every byte of it is the module's.
3. After ONNX Runtime's own optimizer the factors are still apart, and every slot is still an input.
4. The runtime answers what the live module answers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from torch import nn

from ..errors import ModelError, ParityError
from ..model.checkpoint import state_of
from .graph import tensors_of


def names_and_bytes(model: onnx.ModelProto, module: nn.Module, slots: Iterable[str]) -> None:
    """Gates 1 and 2: parameters that the forward pass uses are there, by name, byte for byte."""
    have = tensors_of(model)
    used = {n for node in model.graph.node for n in node.input}
    parameters = {n for n, _ in module.named_parameters() if ".adapters." not in f".{n}"}
    stored = state_of(module)
    for name in sorted(parameters & set(stored)):
        if name not in have:
            # A parameter may be dead in this forward pass (a pooler nobody reads); a factor never is.
            if any(name.rpartition(".")[0] == layer for layer in _factorized(module)):
                raise ModelError(f"export: {name}", "a factor under its own name in the graph", "it is gone")
            continue
        if not np.array_equal(have[name], stored[name].numpy()):
            raise ModelError(f"export: {name}", "the bytes of the module", "other values")
    for name in slots:
        if name not in used:
            raise ModelError(
                f"export: slot {name}",
                "an input that the graph reads",
                "nothing reads it",
                "leave the layer out with --slot-include",
            )


def _factorized(module: nn.Module) -> set[str]:
    from ..model.surgery import factorized_layers

    return {name for name, layer in factorized_layers(module) if layer.form != "dense"}


def factors_stay_apart(
    model_path: Path, factors: Sequence[str], slots: Sequence[str], rebuilt: int = 0, turned: int = 0, once: int = 0
) -> None:
    """Gate 3: ask ONNX Runtime for the graph it would run.

    `rebuilt`: numbers of the weights that are meant to be rebuilt when the model is loaded (small on disk only).
    `turned`: numbers of tied factors, which two layers read in two directions: the runtime may keep both.
    `once`: products with a basis that several layers share: the runtime does them once.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1")
        session = ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        overridable = {i.name for i in session.get_overridable_initializers()}
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    lost = sorted(set(slots) - overridable)
    if lost:
        raise ModelError(f"export: slot {lost[0]}", "an input that may be overridden", "ONNX Runtime does not offer it")
    # Folding one layer's factors makes a product disappear and the dense weight appear: either sign is enough.
    before = onnx.load(str(model_path), load_external_data=False)
    products, numbers = _weighty(before, factors)
    products_after, numbers_after = _weighty(optimized, ())
    turned += _both_ways(before)
    if numbers_after > numbers + rebuilt + turned or (
        not rebuilt
        and products_after < products - once
        and not _FUSES_PRODUCTS & {n.op_type for n in optimized.graph.node}
    ):
        raise ModelError(
            "export: factors", f"{products} products of {numbers:,} numbers in ONNX Runtime too",
            f"{products_after} of {numbers_after:,}: factors were multiplied out",
        )  # fmt: skip


#: Operators of ONNX Runtime that do several products at once without multiplying weights.
_FUSES_PRODUCTS = {"Attention", "MultiHeadAttention", "QAttention", "EmbedLayerNormalization"}
_PRODUCTS = {"Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "NhwcFusedConv", "TransposeMatMul"}


def _weighty(model: onnx.ModelProto, factors: Sequence[str]) -> tuple[int, int]:
    """Return how many products a graph has and how many floating-point numbers its initializers hold."""
    names = {t.name for t in model.graph.initializer}
    missing = sorted(set(factors) - names)
    if missing:
        raise ModelError(f"export: factor {missing[0]}", "a constant of its own in the graph", "none of that name")
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
    # A scalar is no product of factors: the runtime folds those of shapes and scales.
    constants = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    sizes = (math.prod(t.dims) for t in (*model.graph.initializer, *constants) if t.data_type in floating)
    return sum(n.op_type in _PRODUCTS for n in model.graph.node), sum(n for n in sizes if n > 1)


def _both_ways(model: onnx.ModelProto) -> int:
    """Return the numbers of dense weights that are read as they stand and transposed: the runtime may keep both."""
    turned = {n.input[0] for n in model.graph.node if n.op_type == "Transpose"}
    plain = {name for n in model.graph.node if n.op_type != "Transpose" for name in n.input}
    return sum(math.prod(t.dims) for t in model.graph.initializer if t.name in turned & plain)


def outputs_agree(
    expected: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray], tolerance: float, *, where: str
) -> dict[str, float]:
    """Gate 4: |a − b| ≤ tolerance·max(1, max|expected|) for every output; return the largest differences."""
    found = {}
    for name, value in expected.items():
        if name not in got or got[name].shape != value.shape:
            raise ParityError(
                where, f"output {name} of shape {value.shape}", got[name].shape if name in got else "none"
            )
        difference = float(np.max(np.abs(value.astype(np.float64) - got[name].astype(np.float64)), initial=0.0))
        limit = tolerance * max(1.0, float(np.max(np.abs(value), initial=0.0)))
        if not difference <= limit:
            raise ParityError(
                f"{where}: output {name}",
                f"a difference of at most {limit:.3g} from the live module",
                f"{difference:.3g}",
            )
        found[name] = difference
    return found
