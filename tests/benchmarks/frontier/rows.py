"""The ways to make a network small: what one line of ONNX Runtime gives, what lrcompress gives, what its planner chooses.

Every way returns the bytes of one ONNX file, or says in one line why it cannot be had.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from lrcompress import api
from lrcompress.errors import LrcompressError
from lrcompress.export.graph import trace
from lrcompress.latency import LatencyTable

from .subjects import Subject

ONE_LINE, OURS, PLANNER = "one line", "lrcompress", "planner"
_SAMPLES = 64


@dataclass
class Row:
    """One way for one network. `ms` and `spread` by threads; `why_not` where it could not be had."""

    name: str
    group: str
    graph: bytes = b""
    value: float | None = None
    stderr: float | None = None
    n: int | None = None
    ms: dict[int, float] = field(default_factory=dict)
    spread: dict[int, float] = field(default_factory=dict)
    why_not: str = ""
    notes: str = ""

    @property
    def n_bytes(self) -> int:
        return len(self.graph)

    def as_json(self) -> dict[str, Any]:
        return {
            "row": self.name, "group": self.group, "bytes": self.n_bytes or None, "value": self.value, "stderr": self.stderr,
            "n": self.n, "p50_ms": {str(k): v for k, v in self.ms.items()}, "retest_spread": {str(k): v for k, v in self.spread.items()},
            "why_not": self.why_not, "notes": self.notes,
        }  # fmt: skip


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, subject: Subject) -> None:
        data = subject.calibration.take(slice(0, _SAMPLES))
        self._left = iter([{k: np.asarray(v) for k, v in b.inputs.items()} for b in data.batches(8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def dense_rows(subject: Subject) -> Iterator[Row]:
    """Yield the dense network as it is, and after one line of each of the runtime's quantizers."""
    assert subject.opened.module is not None
    model = trace(subject.opened, subject.opened.module, where="bench-frontier")
    yield Row("dense fp32", ONE_LINE, model.SerializeToString())
    with tempfile.TemporaryDirectory() as scratch:
        source, dest = Path(scratch) / "dense.onnx", Path(scratch) / "small.onnx"
        onnx.save(model, source)

        def dynamic() -> bytes:
            quantize_dynamic(source, dest, weight_type=QuantType.QInt8)
            return dest.read_bytes()

        def static() -> bytes:
            quantize_static(source, dest, _Feeds(subject), per_channel=True, weight_type=QuantType.QInt8)
            return dest.read_bytes()

        def packed(tables: bool) -> bytes:
            operators = ("MatMul", "Gather") if tables else ("MatMul",)
            config = DefaultWeightOnlyQuantConfig(
                block_size=32, is_symmetric=True, accuracy_level=4, op_types_to_quantize=operators,
                quant_axes=(("MatMul", 0), ("Gather", 1)),
            )  # fmt: skip
            quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
            quantizer.process()
            return bytes(quantizer.model.model.SerializeToString())

        convolves = any(n.op_type == "Conv" for n in model.graph.node)
        yield _tried("quantize_dynamic", ONE_LINE, dynamic)
        if convolves:
            yield _tried("quantize_static", ONE_LINE, static)
        else:
            yield _tried("MatMulNBits", ONE_LINE, lambda: packed(False))
            yield _tried("MatMulNBits, tables too", ONE_LINE, lambda: packed(True))


def our_rows(subject: Subject, ratio: float) -> Iterator[Row]:
    """Yield dense int8, and factors at a share of the numbers in each precision that `export` has."""
    from lrcompress.export.targets import target

    offered = [q for q in ("int8", "int4") if q in target("onnx").QUANTIZE]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for quantize in offered:
            yield _tried(f"dense {quantize}", OURS, lambda q=quantize: exported(subject, subject.opened, place, q))
        try:
            api.factorize(
                subject.opened, ratio=ratio, calib=subject.calibration, compute="cpu", output=place / "compressed"
            )
        except LrcompressError as e:
            yield Row(f"low rank {ratio:g}", OURS, why_not=str(e))
            return
        for quantize in ("none", *offered):
            name = f"low rank {ratio:g}" + ("" if quantize == "none" else f" + {quantize}")
            yield _tried(name, OURS, lambda q=quantize: exported(subject, place / "compressed", place, q))


def planned_row(subject: Subject, name: str, limits: dict[str, float], table: LatencyTable | Path, threads: int) -> Row:
    """Return what the planner chooses within a budget of bytes and milliseconds, applied and exported."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        row = Row(name, PLANNER)
        try:
            found = api.plan(
                subject.opened, max_bytes=int(limits["bytes"]), max_ms=limits.get("ms"), latency=table,
                calib=subject.calibration, compute="cpu", output=place / "plan.json",
            )  # fmt: skip
            row.notes = str(found.data["advice"])
            api.factorize(
                subject.opened,
                plan=place / "plan.json",
                calib=subject.calibration,
                compute="cpu",
                output=place / "compressed",
            )
            row.graph = exported(subject, place / "compressed", place, "plan")
        except LrcompressError as e:
            row.why_not = str(e)
        return row


def exported(subject: Subject, source: object, place: Path, quantize: str) -> bytes:
    """Export through the package and return the graph with its constants inside."""
    api.export(
        source,
        slots=("none",),
        quantize=quantize,
        calib=subject.calibration,
        name=subject.name,
        output=place / "exported",
    )  # type: ignore[arg-type]
    return bytes(onnx.load(place / "exported" / "model.onnx").SerializeToString())


def _tried(name: str, group: str, make: Any) -> Row:
    try:
        return Row(name, group, make())
    except Exception as e:  # a quantizer that cannot take a graph costs its own row only, which says so
        return Row(name, group, why_not=f"{type(e).__name__}: {' '.join(str(e).split())[:160]}")
