"""A machine that does not exist: its times follow a formula, so that what is predicted can be known."""

from __future__ import annotations

from math import prod

import onnxruntime as ort

from lrcompress.latency import LatencyTable, Probe, Row, machine, sizes

CALL_MS = 0.001


def formula(probe: Probe) -> float:
    """Return the ms of an operator: a call, what it moves, what it multiplies, in 8 bits at three times the speed."""
    d = probe.dims
    speed = {32: 1.0, 8: 3.0, 4: 1.5}[probe.bits]
    if probe.kind == "matmul":
        m, k, n = d
        return CALL_MS + m * k * n / 2e7 / speed + k * n * probe.bits / 32 / 1e8
    if probe.kind == "bmm":
        return CALL_MS + prod(d) / 2e7
    if probe.kind in ("conv", "conv_odd", "depthwise"):
        c_in, c_out, high, wide, height, width, _ = d
        inner = 1 if probe.kind == "depthwise" else c_in
        return CALL_MS + inner * c_out * high * wide * height * width / 2e7 / speed
    return CALL_MS + prod(d) / 1e7


def table(
    threads: tuple[int, ...] = (1, 2), *, blocked: bool = False, quick: bool = True, **changed: object
) -> LatencyTable:
    """Return the table of that machine: twice the threads are 1.6 times as fast."""
    rows = tuple(
        Row(p.kind, p.bits, t, p.dims, formula(p) / (1.6 if t > 1 else 1.0), 0.01)
        for p in sizes(quick)
        for t in threads
    )
    return LatencyTable(
        **{
            "machine": machine(), "ort": ort.__version__, "rows": rows, "run_ms": dict.fromkeys(threads, 0.01),
            "retest_spread": dict.fromkeys(threads, 0.01), "among": {t: [] for t in threads}, "blocked": blocked, **changed,
        }  # type: ignore[arg-type]
    )  # fmt: skip
