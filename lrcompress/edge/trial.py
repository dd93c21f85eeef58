"""The verdict on one payload: does it fit this base, and does it answer what its publisher saw it answer?"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, PayloadError
from ..golden import GoldenSet, ParityReport, compare, compare_projected
from ..payload import Payload, parse
from ..runtime import Session
from ..runtime.session import Active

_RUNS = 5


@dataclass(frozen=True)
class Limits:
    """What `device.json` allows."""

    max_payload_bytes: float
    latency_factor: float
    max_distance: float | None


def check(data: bytes, session: Session, golden: GoldenSet, limits: Limits) -> Active:
    """Return what `session.activate` takes. Raises `PayloadError` for the first check that fails: that is final.

    Anything else that it raises (memory, disk) is no verdict on the payload.
    """
    if len(data) > limits.max_payload_bytes:
        raise PayloadError("payload", f"at most {int(limits.max_payload_bytes)} bytes, as device.json says", len(data))
    payload = parse(data)
    prepared = session.prepare(payload)
    outputs, ms, base_ms = _timed(session, prepared, golden)
    check_golden(payload, session, outputs)
    if limits.max_distance is not None:
        report = compare(golden.compressed, outputs, limits.max_distance)
        if not report.passed:
            worst = report.worst
            raise PayloadError(
                f"payload: output {worst.name}",
                f"at most {worst.tolerance:.3g} from the base",
                f"{worst.max_abs_diff:.3g}",
            )
    if ms > limits.latency_factor * base_ms:
        raise PayloadError(
            "payload: latency", f"at most {limits.latency_factor:g} times the base's {base_ms:.2f} ms", f"{ms:.2f} ms"
        )
    return prepared


def check_golden(payload: Payload, session: Session, outputs: Mapping[str, np.ndarray]) -> ParityReport:
    """Compare outputs on the golden inputs with what the payload brings. Raises `PayloadError` for a difference."""
    bad = sorted(n for n, v in outputs.items() if np.issubdtype(v.dtype, np.floating) and not np.isfinite(v).all())
    if bad:
        raise PayloadError(f"payload: output {bad[0]}", "finite answers to the golden inputs", "NaN or infinity")
    if set(payload.golden) != set(outputs):
        raise PayloadError(
            "payload: golden", f"outputs {', '.join(sorted(outputs))}", ", ".join(sorted(payload.golden)) or "none"
        )
    report = compare_projected(payload.golden, outputs, session.manifest.tolerance)
    if not report.passed:
        worst = report.worst
        raise PayloadError(
            f"payload: golden output {worst.name}",
            f"a difference of at most {worst.tolerance:.3g}",
            f"{worst.max_abs_diff:.3g}",
        )
    return report


def _timed(session: Session, prepared: Active, golden: GoldenSet) -> tuple[dict[str, np.ndarray], float, float]:
    """Return the outputs, and the fastest of some runs in ms with and without the payload.

    The fastest is the run that nothing else disturbed, and taking turns lets both meet the same disturbance.
    """
    base = session.prepare(None)
    outputs: dict[str, np.ndarray] = {}
    best = {True: math.inf, False: math.inf}
    for _ in range(_RUNS):
        for with_payload in (False, True):
            started = time.perf_counter()
            try:
                found = session.run_with(prepared if with_payload else base, golden.inputs)
            except DataError as e:
                if not with_payload or "alloc" in e.got.lower():
                    raise MemoryError(e.got) from e  # the base itself fails, or memory does: no verdict on the payload
                raise PayloadError("payload: trial", "an answer to the golden inputs", e.got) from e
            best[with_payload] = min(best[with_payload], (time.perf_counter() - started) * 1000)
            outputs = found if with_payload else outputs
    return outputs, best[True], best[False]
