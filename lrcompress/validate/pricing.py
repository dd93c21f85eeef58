"""Predicted beside measured: what a latency table says an exported model takes, and what it takes here.

Both are of one request with the first golden sample, as the session of a device runs it. The measurement is repeated with
new sessions, so that it has a spread of its own; a prediction that is further off than 10 % and than 1.5 times the spread
of repeated times is told, and is no miss: it says that the table is not of this machine, or was not taken in quiet.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..errors import LrcompressWarning
from ..latency import LatencyTable, timing
from ..manifest import GRAPH
from ..runtime import Session
from .targets import Job
from .targets.cpu import latency, one_sample

#: How far off a prediction may be, in shares: at least this, or so many times what repeated measurements differ by.
ALLOWED, SPREADS = 0.10, 1.5
_ROUNDS, _SECONDS = 5, 0.4


def priced(job: Job, table: LatencyTable) -> dict[str, Any]:
    """Return predicted and measured ms of one request. Raises `ProfileError` for threads that the table lacks."""
    from ..plan.graph_time import graph_time  # torch comes with it, which a check of goldens does without
    from ..plan.prices import Prices

    prices = Prices(table, job.threads)
    differs = table.differs_from_here()
    if differs is not None:
        warnings.warn(f"{differs}: its times may be others", LrcompressWarning, stacklevel=3)
    sample = one_sample(job)
    found = graph_time(Path(job.exported) / GRAPH, sample, prices)
    measured = timing([_once(job) for _ in range(_ROUNDS)])
    spread = max(measured.spread, table.retest_spread.get(job.threads, 0.0))
    error, allowed = found.ms / measured.ms - 1, max(ALLOWED, SPREADS * spread)
    parts = sorted(found.parts.items(), key=lambda p: -p[1])
    return {
        "predicted_ms": found.ms, "measured_ms": measured.ms, "error": error, "retest_spread": spread, "allowed": allowed,
        "within": abs(error) <= allowed, "threads": job.threads, "same_machine": differs is None,
        "parts": {name: round(ms, 5) for name, ms in parts}, "not_measured": sorted(prices.guessed),
    }  # fmt: skip


def _once(job: Job) -> float:
    session = Session(job.exported, threads=job.threads, manifest=job.manifest, verify=False)
    return latency(session, one_sample(job), seconds=_SECONDS)[0]
