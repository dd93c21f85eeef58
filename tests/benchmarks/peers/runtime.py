"""Every row's way into one ONNX file, and the dense rows that ONNX Runtime quantizes.

The axis of the comparison is the size of that one file, initializers included, written the same way for all. Networks
of the package's own layers go through `lrcompress.export`; those of other packages through `torch.onnx.export` of the
live module, which is what the package's exporter calls too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import nn

from lrcompress import api
from lrcompress.export.graph import trace
from lrcompress.export.quantize import quantize_int8
from lrcompress.metrics import Predict
from lrcompress.runtime.session import EXACT_INT8

from .networks import Network

_BLOCK = 32


def own_graph(network: Network, module: nn.Module, scratch: Path, quantize: str = "none") -> onnx.ModelProto:
    """Export through the package and return the graph with its constants inside."""
    opened = replace(network.opened, module=module)
    api.export(
        opened,
        slots=("none",),
        quantize=quantize,
        calib=network.calibration,
        name=network.name,
        output=scratch / "exported",
    )
    return onnx.load(scratch / "exported" / "model.onnx")


def foreign_graph(network: Network, module: nn.Module) -> onnx.ModelProto:
    """Trace a live module of another package with `torch.onnx.export`."""
    return trace(network.opened, module.eval(), where="bench-peers")


def int4_graph(network: Network, scratch: Path, *, tables: bool = False) -> onnx.ModelProto:
    """Return the dense network with 4-bit weights: products by MatMulNBits, convolutions by static QDQ.

    What has no 4-bit kernel is 8-bit. `tables`: the embedding tables too (GatherBlockQuantized).
    """
    model = _folded(own_graph(network, network.module, scratch), scratch)
    feeds = [dict(b.inputs) for b in network.calibration.take(slice(0, 256)).batches(8)]
    if any(n.op_type == "Conv" for n in model.graph.node):
        return _int4_convolutions(model, feeds, scratch)
    operators = ("MatMul", "Gather") if tables else ("MatMul",)
    config = DefaultWeightOnlyQuantConfig(
        block_size=_BLOCK, is_symmetric=True, accuracy_level=4, op_types_to_quantize=operators,
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )  # fmt: skip
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    found: onnx.ModelProto = quantizer.model.model
    # The rest in 8 bits: tables, where they are not done yet.
    return found if tables else quantize_int8(found, slots=(), calibration=None)


def _folded(model: onnx.ModelProto, scratch: Path) -> onnx.ModelProto:
    """Return the graph with its constants folded by ONNX Runtime: transposed weights become constants of their own."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(scratch / "folded.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(scratch / "folded.onnx")


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    """The calibration inputs, one batch after the other."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def _int4_convolutions(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], scratch: Path) -> onnx.ModelProto:
    onnx.save(model, scratch / "float.onnx")
    quantize_static(
        str(scratch / "float.onnx"), str(scratch / "int4.onnx"), _Feeds(feeds), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt4,
        calibrate_method=CalibrationMethod.MinMax,
    )  # fmt: skip
    return onnx.load(scratch / "int4.onnx")


def runner(model: onnx.ModelProto, threads: int) -> Predict:
    """Return ONNX Runtime's answers for one graph in memory."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry(*EXACT_INT8)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names, wanted = [o.name for o in session.get_outputs()], {i.name for i in session.get_inputs()}

    def predict(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers = session.run(names, {k: v for k, v in inputs.items() if k in wanted})
        return dict(zip(names, answers, strict=True))

    return predict
