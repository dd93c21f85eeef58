"""The ways to make a network small: what one line of ONNX Runtime gives, what lrcompress gives, what its planner chooses.

Every way returns the bytes of one ONNX file, or says in one line why it cannot be had.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from lrcompress import api
from lrcompress.errors import LrcompressError
from lrcompress.files import write_json
from lrcompress.latency import LatencyTable
from lrcompress.plan import RankPlan, write_plan
from lrcompress.plan.candidates import Limits
from lrcompress.plan.prices import Prices
from lrcompress.progress import Silent
from lrcompress.verbs.budgeting import Market, device_plan
from lrcompress.verbs.planning import prepare

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


class Kept:
    """Rows on disk, with what they were judged to be: a run that is repeated makes none of them again, and only times them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, name: str, suffix: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.{suffix}"

    def get(self, name: str) -> Row | None:
        """Return a row that is there, without times."""
        about, graph = self._file(name, "json"), self._file(name, "onnx")
        if not about.is_file():
            return None
        kept = json.loads(about.read_text())
        fields = {k: kept[k] for k in ("group", "value", "stderr", "n", "why_not", "notes")}
        return Row(name, **fields, graph=graph.read_bytes() if graph.is_file() else b"")

    def put(self, row: Row) -> None:
        if row.graph:
            self._file(row.name, "onnx").write_bytes(row.graph)
        write_json(self._file(row.name, "json"), row.as_json())


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, subject: Subject) -> None:
        data = subject.calibration.take(slice(0, _SAMPLES))
        self._left = iter([{k: np.asarray(v) for k, v in b.inputs.items()} for b in data.batches(8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def dense_rows(subject: Subject) -> Iterator[Row]:
    """Yield the dense network as `export` writes it, and what one line of each of the runtime's quantizers makes of that."""
    with tempfile.TemporaryDirectory() as scratch:
        source, dest = Path(scratch) / "dense.onnx", Path(scratch) / "small.onnx"
        source.write_bytes(exported(subject, subject.opened, Path(scratch), "none"))
        model = onnx.load(source)
        yield Row("dense fp32", ONE_LINE, source.read_bytes())

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


def our_rows(subject: Subject, ratio: float, kept: Callable[[str], Row | None]) -> Iterator[Row]:
    """Yield dense int8, and factors at a share of the numbers in each precision that `export` has; `kept`: rows by name."""
    from lrcompress.export.targets import target

    offered = [q for q in ("int8", "int4") if q in target("onnx").QUANTIZE]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for quantize in offered:
            name = f"dense {quantize}"
            yield kept(name) or _tried(name, OURS, lambda q=quantize: exported(subject, subject.opened, place, q))
        names = {q: f"low rank {ratio:g}" + ("" if q == "none" else f" + {q}") for q in ("none", *offered)}
        found = {q: kept(name) for q, name in names.items()}
        try:
            if not all(found.values()):
                api.factorize(
                    subject.opened, ratio=ratio, calib=subject.calibration, compute="cpu", output=place / "compressed"
                )
        except LrcompressError as e:
            yield Row(names["none"], OURS, why_not=str(e))
            return
        for quantize, name in names.items():
            yield found[quantize] or _tried(
                name, OURS, lambda q=quantize: exported(subject, place / "compressed", place, q)
            )


class Planner:
    """What `plan`, `factorize --plan` and `export --quantize plan` make of a network, budget by budget.

    What the layers can become is measured once; budgets that end in the same plan share its file.
    """

    def __init__(self, subject: Subject, table: LatencyTable, threads: int) -> None:
        self.subject, self.prices = subject, Prices(table, threads)
        self.multiple = min(table.rank_multiple.values(), default=1)
        self._made: dict[str, bytes] = {}

    @functools.cached_property
    def market(self) -> Market:
        prepared = prepare(
            self.subject.opened, include=(), exclude=(), calib=self.subject.calibration, seed=0, compute="cpu", cache=True,
            progress=Silent(), verb="plan",
        )  # fmt: skip
        return Market.of(
            prepared, method="auto", prices=self.prices, multiple=self.multiple, progress=Silent()
        )  # fmt: skip

    def row(self, name: str, *, n_bytes: float, ms: float | None = None) -> Row:
        """Return the best choice within a budget of bytes and milliseconds, applied and exported."""
        row = Row(name, PLANNER)
        try:
            plan = device_plan(self.market, Limits(int(n_bytes), ms))
            row.notes = str(plan.about["advice"])
            key = json.dumps(
                [[p["name"], p["form"], p["rank"], p["bits"], p.get("block")] for p in plan.as_json()["layers"]]
            )
            if key not in self._made:
                self._made[key] = self._applied(plan)
            row.graph = self._made[key]
        except LrcompressError as e:
            row.why_not = str(e)
        return row

    def _applied(self, plan: RankPlan) -> bytes:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            write_plan(place / "plan.json", plan)
            api.factorize(
                self.subject.opened, plan=place / "plan.json", calib=self.subject.calibration, compute="cpu",
                output=place / "compressed",
            )  # fmt: skip
            return exported(self.subject, place / "compressed", place, "plan")


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
