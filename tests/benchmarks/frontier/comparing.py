"""Which row beats which: in accuracy, bytes and milliseconds at once, beyond what measuring again would change."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from lrcompress.latency import timing
from lrcompress.runtime import session_options

from .rows import ONE_LINE, PLANNER, Row

#: Bytes that differ by less are equal: names and padding.
_BYTES = 0.005


def measure(
    rows: Sequence[Row], request: Mapping[str, np.ndarray], threads: Sequence[int], rounds: int, seconds: float = 0.25
) -> None:
    """Time every row at every number of threads, in interleaved rounds with new sessions."""
    found: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds):
        for count in threads:
            for i, row in enumerate(rows):
                if row.graph:
                    found.setdefault((count, i), []).append(once(row.graph, request, count, seconds))
    for (count, i), times in found.items():
        own = timing(times)
        rows[i].ms[count], rows[i].spread[count] = own.ms, own.spread


def once(graph: bytes, request: Mapping[str, np.ndarray], threads: int, seconds: float) -> float:
    """Return the median ms of one request in a new session."""
    session = ort.InferenceSession(graph, session_options(threads), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    feeds = {k: v for k, v in request.items() if k in wanted}
    for _ in range(3):
        session.run(None, feeds)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < seconds:
        t = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - t) * 1e3)
    return float(np.median(times))


def dominates(a: Row, b: Row, best: str) -> bool:
    """Return whether a is at least as good as b in everything, and better in something beyond noise."""
    if not a.graph or not b.graph or a is b or a.value is None or b.value is None:
        return False
    gain = a.value - b.value if best == "max" else b.value - a.value
    faster = {t: b.ms[t] / a.ms[t] - 1 for t in a.ms if t in b.ms}
    smaller = b.n_bytes / a.n_bytes - 1
    at_least = gain >= 0 and smaller >= -_BYTES and all(f >= 0 for f in faster.values())
    noise = {t: max(a.spread.get(t, 0.0), b.spread.get(t, 0.0)) for t in faster}
    # Both were judged on the same samples: half of the standard error of either is a difference.
    really = (
        gain > 0.5 * (b.stderr or 0.0) or smaller > _BYTES or any(f > max(noise[t], 0.02) for t, f in faster.items())
    )
    return at_least and really


def dominated(rows: Sequence[Row], best: str) -> dict[str, list[str]]:
    """Return {row: the rows that beat it}."""
    return {b.name: [a.name for a in rows if dominates(a, b, best)] for b in rows if b.graph}


def broken_promises(rows: Sequence[Row], best: str) -> list[str]:
    """Return a line for each choice of the planner that one line of ONNX Runtime beats."""
    plain = [r for r in rows if r.group == ONE_LINE]
    return [
        f"{p.name} is beaten by {a.name}" for p in rows if p.group == PLANNER for a in plain if dominates(a, p, best)
    ]


def table(subject: str, rows: Sequence[Row], best: str) -> str:
    """Return the rows of one network as aligned text."""
    beaten = dominated(rows, best)
    threads = sorted({t for r in rows for t in r.ms})
    head = (
        f"{subject:34}{'bytes':>12}{'metric ± stderr':>20}"
        + "".join(f"{f'ms, {t} thr.':>12}{'±':>6}" for t in threads)
        + "  dominated by"
    )
    lines = [head, "─" * len(head)]
    for r in rows:
        if not r.graph:
            lines.append(f"{r.name:34}  not had: {r.why_not}")
            continue
        metric = "–" if r.value is None else f"{r.value:.4f} ± {r.stderr:.4f}"
        times = "".join(f"{r.ms[t]:12.3f}{r.spread[t]:6.1%}" if t in r.ms else " " * 18 for t in threads)
        note = f"  [{r.notes}]" if r.notes else ""
        lines.append(f"{r.name:34}{r.n_bytes:12,}{metric:>20}{times}  {', '.join(beaten[r.name]) or '–'}{note}")
    return "\n".join(lines)
