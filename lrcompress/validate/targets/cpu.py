"""`cpu`: this machine, in this process, through the session that a device uses."""

from __future__ import annotations

import time

import numpy as np

from ...errors import CommandError
from ...progress import Progress
from ...runtime import Session
from . import WHERE, Answers, Job

CPU_CLASS = "cpu"
_WARM_UP, _RUNS, _MAX_SECONDS = 5, 100, 2.0


def check(detail: str) -> None:
    if detail:
        raise CommandError(WHERE, "cpu", f"cpu:{detail}")


def run(detail: str, job: Job, progress: Progress) -> Answers:
    """Answer every case, swapping payloads in one session; then time single samples of the factory model."""
    session = Session(job.exported, threads=job.threads, manifest=job.manifest, verify=False)
    outputs = {}
    with progress.task("validate on cpu", total=len(job.cases)) as advance:
        for case, payload in job.cases.items():
            session.swap(payload)
            outputs[case] = session.run(dict(job.inputs))
            advance(1, case)
    session.swap(None)
    p50, p95 = latency(session, one_sample(job))
    return Answers(outputs, p50, p95)


def one_sample(job: Job) -> dict[str, np.ndarray]:
    """Return the first golden sample, as a batch of one where the graph's batch axis is free.

    The batch is the first dynamic axis of the first input that has one; other inputs may have it elsewhere.
    """
    shapes = {str(i["name"]): list(i["shape"]) for i in job.manifest.inputs}
    batch = next((d for shape in shapes.values() for d in shape if isinstance(d, str)), None)
    found = {}
    for name, value in job.inputs.items():
        shape = shapes.get(name, [])
        at = shape.index(batch) if batch in shape else (0 if shape and isinstance(shape[0], str) else None)
        found[name] = value if at is None else value.take([0], axis=at)
    return found


def latency(session: Session, inputs: dict[str, np.ndarray], *, seconds: float = _MAX_SECONDS) -> tuple[float, float]:
    """Return the median and the 95th percentile of single runs, in ms; slow models get fewer runs, not more time."""
    for _ in range(_WARM_UP):
        session.run(inputs)
    ms: list[float] = []
    started = time.perf_counter()
    while len(ms) < _RUNS and (len(ms) < 3 or time.perf_counter() - started < seconds):
        t = time.perf_counter()
        session.run(inputs)
        ms.append((time.perf_counter() - t) * 1e3)
    return float(np.percentile(ms, 50)), float(np.percentile(ms, 95))
