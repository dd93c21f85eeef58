"""Does an exported model answer as promised: here, on emulated ARM, over ssh, with every payload, and on data?

    report = validate(Path("exported"), on=("cpu", "arm64:cortex-a53"))
    report.passed, report.data["targets"]

The gate is parity with the compressed network's golden outputs, at the tolerance the manifest states for the kind of
processor. The distance to the original is reported beside it. With data and a metric, a drop against the original
beyond `max_drop` + 2 standard errors of the paired difference is a miss. A miss is a report, never an exception.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from .. import metrics
from ..data import Data
from ..errors import CommandError, LrcompressWarning, ManifestError
from ..golden import GoldenSet, ParityReport, compare, compare_projected, load_golden
from ..latency import LatencyTable
from ..manifest import DATA, GOLDEN, GRAPH, Manifest
from ..payload import Payload, parse
from ..progress import Progress, Silent
from ..runtime import Session
from .pricing import priced
from .targets import Answers, Job, check, cpu_class, run_on

Predict = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
WHERE = "lrcompress validate"
#: The case without a payload; no payload file has this name, they end in .safetensors.
BASE = "base"
_BATCH = 250


@dataclass(frozen=True)
class ValidateReport:
    """`data`: the JSON object of the command line; `passed`: no gate was missed; `misses`: a line for each that was."""

    data: dict[str, Any]
    passed: bool
    misses: tuple[str, ...] = ()


def validate(
    exported: Path,
    *,
    data: Data | None = None,
    metric: str | None = None,
    predict_original: Predict | None = None,
    max_drop: float | None = None,
    on: Sequence[str] = ("cpu",),
    threads: int = 1,
    latency: LatencyTable | None = None,
    progress: Progress | None = None,
) -> ValidateReport:
    """Check `exported` on every target of `on`; with `data` and `metric` also what it is worth, measured on this CPU.

    `latency`: a table by which the time of one request is predicted, beside what it takes here.

    `max_drop` in the metric's unit; default 0.01, for a metric where less is better 1 % of the original's value.
    Raises `ManifestError` if the folder is not what its manifest says, `CommandError`, `DataError`, `HostError`.
    """
    exported, progress = Path(exported), progress or Silent()
    _check_arguments(data, metric, predict_original, max_drop, on)
    manifest = Manifest.load(exported)
    manifest.check_runtime(ort.__version__)
    golden = _golden(exported, manifest)
    job = Job(exported, manifest, golden.inputs, {BASE: None, **_payloads(exported, manifest)}, threads)
    rows: list[dict[str, Any]] = []
    for target in dict.fromkeys(on):
        rows += _parity(target, job, golden, run_on(target, job, progress))
    if data is not None and metric is not None:
        at = next((r for r in rows if r["against"] == "compressed" and r["target"] == "cpu"), rows[0])
        at["metric"] = _measure(job, data, metric, predict_original, max_drop, progress)
        at["passed"] = at["passed"] and at["metric"]["passed"]
    if latency is not None:
        at = next((r for r in rows if r["against"] == "compressed" and r["target"] == "cpu"), rows[0])
        at["latency"] = priced(job, latency)
    misses = tuple(_misses(rows))
    head = {"passed": not misses, "base_id": manifest.base_id, "precision": manifest.precision, "misses": list(misses)}
    return ValidateReport({**head, "targets": rows}, not misses, misses)


def _check_arguments(
    data: Data | None, metric: str | None, predict: Predict | None, max_drop: float | None, on: Sequence[str]
) -> None:
    if not on:
        raise CommandError(f"{WHERE} --on", "at least one target", "none")
    for target in on:
        check(target)
    if (data is None) != (metric is None):
        raise CommandError(
            WHERE, "--data and --metric together", "--data alone" if metric is None else "--metric alone"
        )
    if metric is not None:
        needs = metrics.get(metric).needs_original
        if predict is None and (needs or max_drop is not None):
            raise CommandError(WHERE, "the original model to compare with", "none", "name it with --original")
    elif max_drop is not None:
        raise CommandError(f"{WHERE} --max-drop", "--data and --metric beside it", "neither")


def _golden(exported: Path, manifest: Manifest) -> GoldenSet:
    """Return the golden arrays; every input and output of the graph must be among them."""
    golden = load_golden(exported / GOLDEN)
    inputs, outputs = ({str(p["name"]) for p in ports} for ports in (manifest.inputs, manifest.outputs))
    missing = (inputs - golden.inputs.keys()) | (outputs - golden.compressed.keys())
    if missing:
        expected = "every input and every output of the graph"
        raise ManifestError(exported / GOLDEN, expected, f"no {min(missing)}", "export the model again")
    return golden


def _payloads(exported: Path, manifest: Manifest) -> dict[str, Payload]:
    """Return the verified payloads that travel with the export, by file name."""
    found = {}
    for path in sorted((exported / "payloads").glob("*.safetensors")):
        payload = parse(path.read_bytes())
        payload.verify(manifest)
        found[path.name] = payload
    return found


def _row(target: str, against: str, report: ParityReport, job: Job, *, extra_bytes: int = 0) -> dict[str, Any]:
    """Return the line of one comparison."""
    size = sum((job.exported / name).stat().st_size for name in (GRAPH, DATA)) + extra_bytes
    return {
        "target": target, "against": against, "passed": report.passed,
        "outputs": [o.as_dict() | {"passed": o.passed} for o in report.outputs], "max_abs_diff": report.max_abs_diff,
        "original": None, "metric": None, "bytes": size, "p50_ms": None, "p95_ms": None, "latency": None, "threads": job.threads,
    }  # fmt: skip


def _parity(target: str, job: Job, golden: GoldenSet, answers: Answers) -> list[dict[str, Any]]:
    """Return how one target compares with the compressed network, and with what each payload promises."""
    tolerance = job.manifest.tolerances[answers.cpu_class or cpu_class(target)]
    base = answers.outputs[BASE]
    first = _row(target, "compressed", compare(golden.compressed, base, tolerance), job)
    rows = [first | {"p50_ms": answers.p50_ms, "p95_ms": answers.p95_ms}]
    if golden.original:  # a distance that is told and gates nothing
        apart = compare(golden.original, base, math.inf)
        distances = [
            {"name": o["name"], "max_abs_diff": o["max_abs_diff"]} for o in (o.as_dict() for o in apart.outputs)
        ]
        rows[0]["original"] = {"outputs": distances, "max_abs_diff": apart.max_abs_diff}
    for name, payload in job.cases.items():
        if payload is not None:
            found = compare_projected(payload.golden, answers.outputs[name], tolerance)
            size = (job.exported / "payloads" / name).stat().st_size
            rows.append(_row(target, f"payload {name}", found, job, extra_bytes=size))
    return rows


def _measure(
    job: Job, data: Data, name: str, predict_original: Predict | None, max_drop: float | None, progress: Progress
) -> dict[str, Any]:
    """Return the metric of the exported model and its drop against the original's on the same samples."""
    metric = metrics.get(name)
    fixed = {i["shape"][0] for i in job.manifest.inputs if i["shape"] and isinstance(i["shape"][0], int)}
    batch = min(fixed) if fixed else _BATCH
    session = Session(job.exported, threads=job.threads, manifest=job.manifest, verify=False)
    with progress.task(f"validate {name}", total=2) as advance:
        mine = metric.evaluate(session.run, data, batch, original=predict_original)
        advance(1, "exported")
        found: dict[str, Any] = {
            "name": name, "direction": metric.direction, "value": mine.value, "original": None, "n": mine.n,
            "stderr": mine.stderr, "drop": None, "drop_stderr": None, "max_drop": max_drop, "passed": True,
        }  # fmt: skip
        if predict_original is None:
            note = f"{name} is not compared: the original model is not known (--original)"
            warnings.warn(note, LrcompressWarning, stacklevel=3)
            return found
        theirs = metric.evaluate(predict_original, data, batch, original=predict_original)
        advance(1, "original")
    pair = metrics.paired(theirs, mine)
    if max_drop is None:
        max_drop = 0.01 if metric.direction == "max" else 0.01 * abs(theirs.value)
    found |= {"original": theirs.value, "drop": pair.drop, "drop_stderr": pair.stderr, "max_drop": max_drop}
    found["passed"] = bool(pair.drop <= max_drop + 2 * pair.stderr)
    return found


def _misses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        for o in row["outputs"]:
            if not o["passed"]:
                allowed = f"{o['max_abs_diff']:.3g} from {row['against']}, allowed {o['tolerance']:.3g}"
                found.append(f"{row['target']}: {o['name']} is {allowed}")
        m = row["metric"]
        if m and not m["passed"]:
            drop = f"a drop of {m['drop']:.4f}, allowed {m['max_drop'] + 2 * m['drop_stderr']:.4f}"
            found.append(f"{row['target']}: {m['name']} {m['value']:.4f} against {m['original']:.4f}, {drop}")
    return found
