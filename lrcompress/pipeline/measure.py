"""The stage `validate`: parity, then every row of the table on test data nobody trained on, then milliseconds.

This is the first place that opens the split `test`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import api, metrics
from .. import payload as payloads
from ..data import Data
from ..errors import ParityError
from ..metrics import MetricResult, paired
from ..progress import Progress
from ..runtime import Session
from .steps import Context, runtime_bytes
from .store import Stage

#: Rounds of the latency measurement; each round asks every row once, so that all see the same machine.
_ROUNDS, _WARM_UP, _MAX_SECONDS = 200, 10, 12.0
_BATCH = 200
ORIGINAL, FACTORIZED, SHIPPED = "original fp32", "factorized", "factorized + adapter"


def validate(context: Context, compressed: Stage, exported: Stage, baselines: Stage) -> Stage:
    """Check parity and accuracy of all that was exported; raises `ParityError` where the promise is not kept."""
    recipe = context.recipe
    inputs = {
        "exported": exported.key,
        "baselines": baselines.key,
        "test": context.split_key("test"),
        "metric": recipe.metric.model_dump(mode="json"),
        "on": list(recipe.validate_.on),
    }

    def build(stage: Path) -> dict[str, Any]:
        folder = exported.folder / "exported"
        parity = api.validate(folder, on=recipe.validate_.on, threads=1, progress=context.progress)
        if not parity.passed:
            raise ParityError(
                folder, "outputs as the compressed network's", _miss(parity.data), "export it again", report=parity.data
            )
        data = context.data("test")
        rows = _rows(exported, baselines)
        sessions = {name: _session(*where) for name, where in rows.items()}
        results = _answers(context, sessions, data)
        timings = latencies(sessions, data, context.progress)
        sizes = _bytes(compressed, exported, baselines)
        table = [_row(name, results, sizes[name], timings[name]) for name in sessions]
        name = SHIPPED if SHIPPED in results else FACTORIZED
        shipped = paired(results[ORIGINAL], results[name])
        passed = shipped.drop <= recipe.metric.max_drop + 2 * shipped.stderr
        report = {"parity": parity.data, "rows": table, "passed": passed, "max_drop": recipe.metric.max_drop}
        if not passed:
            raise ParityError(
                f"{recipe.name}: {recipe.metric.name} of {name}",
                f"a drop of at most {recipe.metric.max_drop} (+ 2 standard errors, {2 * shipped.stderr:.4f})",
                f"{shipped.drop:.4f}",
                "factorize less, or train the correction longer",
                report=report,
            )
        return report

    return context.store.stage("validate", inputs, build)


def _miss(data: Mapping[str, Any]) -> str:
    targets = [t for t in data.get("targets", []) if not t.get("passed", True)]
    return "; ".join(f"{t.get('target')}: off by {t.get('max_abs_diff')}" for t in targets) or "a miss"


def _rows(exported: Stage, baselines: Stage) -> dict[str, tuple[Path, Path | None]]:
    """Return the rows of the table in order: name -> (exported folder, payload or None)."""
    main, other = exported.folder / "exported", baselines.folder
    rows: dict[str, tuple[Path, Path | None]] = {
        ORIGINAL: (other / "dense-fp32", None),
        "dense int8": (other / "dense-int8", None),
        FACTORIZED: (main, None),
        "factorized, equal bytes": (other / "equal-bytes", None),
        SHIPPED: (main, main / "payloads" / "recover.safetensors"),
        "factorized + int8": (other / "factorized-int8", None),
        "factorized + int8 + adapter": (
            other / "factorized-int8",
            other / "factorized-int8" / "payloads" / "recover.safetensors",
        ),
    }
    return {
        name: where for name, where in rows.items() if where[0].is_dir() and (where[1] is None or where[1].is_file())
    }


def _bytes(compressed: Stage, exported: Stage, baselines: Stage) -> dict[str, int]:
    """Return what each row takes on a device's disk: graph, constants, payload."""
    found = baselines.result
    payload = sum(p["bytes"] for p in exported.result["payloads"])
    main, int8 = runtime_bytes(exported.result), runtime_bytes({"bytes": found["factorized_int8"]})
    return {
        ORIGINAL: runtime_bytes({"bytes": found["dense_fp32"]}),
        "dense int8": runtime_bytes({"bytes": found["dense_int8"]}),
        FACTORIZED: main,
        "factorized, equal bytes": found["equal_bytes"]["bytes"] or 0,
        SHIPPED: main + payload,
        "factorized + int8": int8,
        "factorized + int8 + adapter": int8 + payload,
    }


def _session(folder: Path, payload: Path | None) -> Session:
    session = Session(folder, threads=1)
    if payload is not None:
        session.swap(payloads.parse(payload.read_bytes()))
    return session


def _answers(context: Context, sessions: Mapping[str, Session], data: Data) -> dict[str, MetricResult]:
    metric = metrics.get(context.recipe.metric.name)
    original = sessions[ORIGINAL].run if metric.needs_original else None
    out = {}
    with context.progress.task("answer the test data", total=len(sessions)) as advance:
        for name, session in sessions.items():
            out[name] = metric.evaluate(session.run, data, _BATCH, original=original)
            advance(1, name)
    return out


def _row(name: str, results: Mapping[str, MetricResult], size: int, timing: Mapping[str, float]) -> dict[str, Any]:
    result, difference = results[name], paired(results[ORIGINAL], results[name])
    return {
        "name": name,
        "bytes": size,
        "metric": result.name,
        "value": result.value,
        "n": result.n,
        "stderr": result.stderr,
        "drop": difference.drop,
        "drop_stderr": difference.stderr,
        **timing,
    }


def latencies(sessions: Mapping[str, Session], data: Data, progress: Progress) -> dict[str, dict[str, float]]:
    """Return p50 and p95 in ms of one sample at one thread; rows take turns, so that a busy machine is fair to all."""
    width = 2 if data.pairs else 1
    samples = [{k: v[:1] for k, v in b.inputs.items()} for b in data.take(slice(0, 32 * width)).batches(width)]
    calls: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {name: s.run for name, s in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    with progress.task("measure milliseconds", total=_ROUNDS) as advance:
        for i in range(_ROUNDS + _WARM_UP):
            sample = samples[i % len(samples)]
            for name, call in calls.items():
                begin = time.perf_counter()
                call(sample)
                if i >= _WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - begin))
            if i >= _WARM_UP:
                advance(1)
            if time.perf_counter() - started > _MAX_SECONDS and i >= _WARM_UP + 20:
                break
    return {n: {"p50_ms": float(np.percentile(t, 50)), "p95_ms": float(np.percentile(t, 95))} for n, t in times.items()}
