"""Time operators with ONNX Runtime: interleaved rounds, medians, and by how much rounds differ.

A graph of several copies is timed against one of none, with inputs and outputs bound beforehand, so what remains is the
operator and its share of the runtime's loop. Every round opens its sessions anew and takes the probes in another order:
a machine that slows down for a while slows all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from ..progress import Progress
from ..runtime import session_options
from .operators import Graph, Probe

#: A run of a graph should take about this long; copies are added until it does, as far as weights allow.
_RUN_MS, _MOST_COPIES, _WEIGHT_BYTES = 0.3, 8, 12 << 20
#: Rounds that differ by less agree.
_AGREED = 0.05
_ELEMENT = {1: np.float32, 2: np.uint8, 7: np.int64}


@dataclass(frozen=True)
class Timing:
    """`ms`: the time of one operator; `spread`: by what share of it undisturbed rounds differ."""

    ms: float
    spread: float


def run_ms(graph: Graph, threads: int, seconds: float, least: int = 5) -> float:
    """Return the median time of one run of a graph, in ms."""
    session = ort.InferenceSession(graph.data, session_options(threads), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    kept = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in graph.feeds.items()}
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    for name in graph.outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    fixed = binding.get_outputs()  # written over from now on, not allocated anew
    for name, value in zip(graph.outputs, fixed, strict=True):
        binding.bind_ortvalue_output(name, value)
    for _ in range(2):
        session.run_with_iobinding(binding)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < least or (time.perf_counter() - started < seconds and len(times) < 1000):
        t = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - t)
    return float(np.median(times)) * 1e3


def copies_of(probe: Probe, once_ms: float) -> int:
    """Return how many copies a probe's graph should hold, given what one takes."""
    wanted = int(np.ceil(_RUN_MS / max(once_ms, 1e-4)))
    by_weight = max(1, _WEIGHT_BYTES // max(probe.weight_bytes, 1))
    return int(np.clip(min(wanted, by_weight), 2, _MOST_COPIES))


def measure(
    probes: Sequence[Probe], threads: int, *, rounds: int, seconds: float, progress: Progress, seed: int = 0
) -> dict[Probe, Timing]:
    """Return what each probe takes with so many threads. `seconds`: for one probe in one round.

    After half of the rounds only probes whose times do not agree yet are timed again.
    """
    order, draw = list(probes), random.Random(seed)
    found: dict[Probe, list[float]] = {p: [] for p in probes}
    copies: dict[Probe, int] = {}
    with progress.task(f"measure, {threads} thread{'s' * (threads > 1)}", total=len(order) * rounds) as advance:
        for done in range(rounds):
            draw.shuffle(order)
            for probe in order:
                if done < rounds / 2 or timing(found[probe]).spread > _AGREED:
                    found[probe].append(_once(probe, copies, threads, seconds))
                advance(1, f"{probe.kind} {'×'.join(map(str, probe.dims))}")
    return {p: timing(times) for p, times in found.items()}


def _once(probe: Probe, copies: dict[Probe, int], threads: int, seconds: float) -> float:
    """Time one probe in one round, in ms; a first look tells how many copies its graph should hold."""
    none = run_ms(probe.graph(0), threads, seconds / 4)
    if probe not in copies:
        copies[probe] = copies_of(probe, run_ms(probe.graph(1), threads, 0.0, 3) - none)
    n = copies[probe]
    return max(run_ms(probe.graph(n), threads, seconds) - none, 0.0) / n


def timing(times: Sequence[float]) -> Timing:
    """Return the median of the faster half of the rounds: what disturbs a machine only ever adds time.

    The spread is that half's own, from its fastest to its slowest, so it says what a second measurement would find.
    """
    half = sorted(times)[: len(times) // 2 + 1]
    ms = max(float(np.median(half)), 1e-5)
    return Timing(ms, (half[-1] - half[0]) / ms)
