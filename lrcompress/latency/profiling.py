"""Which operators at which sizes are measured, and the table that comes of it."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..progress import Progress, Silent
from ..runtime import session_options
from .measuring import Timing, measure, run_ms, timing
from .operators import BINARY, BITS, MOVES, ROWWISE, UNARY, Dims, Probe, network
from .table import LatencyTable, Row, machine

#: Seconds for one probe in one round, and rounds: of a whole profile and of a quick one.
_SECONDS, _ROUNDS = (0.004, 0.003), (6, 2)
#: Products above this many multiply-adds are not measured: what is larger is as fast per product.
_MOST_MACS = 80_000_000
#: A rank may be rounded up if that costs no more than this share of what more products would.
_FREE = 0.25
_RANKS = tuple(range(32, 65))
#: Operators that take less are the clock's to tell: they say little of how quiet the machine was.
_TELLING_MS = 0.01
#: Blocks of the networks that tell what operators cost together.
_BLOCKS = 8


def sizes(quick: bool = False) -> list[Probe]:
    """Return the probes of a profile."""
    found: list[Probe] = []
    for bits in BITS:
        found += [Probe("matmul", bits, d) for d in _matmuls(quick)]
    found += [Probe("bmm", 32, d) for d in _products(quick)]
    for bits in (32, 8):
        found += [Probe("conv", bits, d) for d in _convolutions(quick)]
        found += [Probe("depthwise", bits, d) for d in _depthwise(quick)]
    found += [Probe("conv_odd", 32, d) for d in _odd(quick)]
    for width in (32, 128, 384):  # the operators of the small networks, so that what is left is what they cost together
        found += [Probe(kind, bits, dims) for kind, bits, dims in network(width, 1)[1]]
    elements: tuple[Dims, ...] = ((4,), (1024,), (16384,), (131072,)) if not quick else ((4,), (4096,), (131072,))
    found += [Probe(kind, 32, d) for kind in (*UNARY, *BINARY, *MOVES) for d in elements]
    rows = tuple(itertools.product((1, 16, 128) if not quick else (1, 128), (8, 64, 384)))
    found += [Probe(kind, 32, d) for kind in ROWWISE for d in (*rows, (1024, 128))]
    return list(dict.fromkeys(found))


def _matmuls(quick: bool) -> list[Dims]:
    rows = (1, 8, 32, 128) if not quick else (1, 32)
    sides = (8, 32, 96, 384, 1536) if not quick else (16, 96, 768)
    own = [(m, k, n) for m in rows for k in sides for n in sides]
    usual = [(m, k, n) for m in rows for k, n in ((64, 64), (64, 172), (172, 64), (384, 192), (192, 384), (192, 1536))]
    return _affordable([*own, *(usual if not quick else [])])


def _products(quick: bool) -> list[Dims]:
    tokens = (1, 16, 64, 128) if not quick else (16, 128)
    return [d for t in tokens for d in ((1, t, 64, t), (8, t, 8, t), (8, t, t, 8), (12, t, 32, t), (12, t, t, 32))]


def _convolutions(quick: bool) -> list[Dims]:
    squares = (4, 8, 16, 32, 80) if not quick else (8, 32)
    found: list[Dims] = []
    pairs = (
        ((3, 16), (16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (64, 16)) if not quick else ((16, 16), (64, 64))
    )
    found += [(i, o, 3, 3, s, s, 1) for i, o in pairs for s in squares]
    found += [(i, o, 3, 3, s, s, 2) for i, o in ((3, 16), (16, 32), (32, 64), (128, 128)) for s in (8, 16, 80)]
    wide = (8, 32, 128, 512) if not quick else (16, 128)
    found += [(i, o, 1, 1, s, s, 1) for i in wide for o in wide for s in squares]
    found += [(16, 32, 1, 1, 16, 16, 2), (32, 64, 1, 1, 8, 8, 2)]
    for i, o in ((16, 16), (32, 32), (64, 64), (64, 16), (16, 64)) if not quick else ((16, 16), (64, 64)):
        found += [(i, o, h, w, s, s, 1) for h, w in ((1, 3), (3, 1)) for s in (8, 32)]
    return _affordable(found)


def _odd(quick: bool) -> list[Dims]:
    squares = (8, 16, 32) if not quick else (8, 32)
    found: list[Dims] = [
        (i, o, k, k, s, s, 1) for i, o in ((16, 13), (32, 20), (64, 44)) for k in (1, 3) for s in squares
    ]
    return [
        *found,
        *((i, o, h, w, s, s, 1) for i, o in ((16, 13), (64, 44)) for h, w in ((1, 3), (3, 1)) for s in squares[::2]),
    ]


def _depthwise(quick: bool) -> list[Dims]:
    channels = (16, 64, 256, 512) if not quick else (32, 256)
    found: list[Dims] = [(c, c, 3, 3, s, s, t) for c in channels for s in (5, 10, 20, 40, 80) for t in (1, 2)]
    return [d for d in found if d[0] * d[4] * d[5] * d[6] ** 2 <= 500_000]


def _affordable(dims: Sequence[Dims]) -> list[Dims]:
    """Return sizes without repeats and without what takes too long to measure."""
    return [d for d in dict.fromkeys(dims) if np.prod(d[:-1] if len(d) == 7 else d) <= _MOST_MACS]


def profile_device(
    *, threads: Sequence[int] = (1, 2), quick: bool = False, progress: Progress | None = None
) -> LatencyTable:
    """Measure every operator at every size with each number of threads; minutes, or with `quick` less than one."""
    progress, started = progress or Silent(), time.monotonic()
    probes, ranks = sizes(quick), {bits: _rank_probes(bits) for bits in (32, 8)}
    extra = [p for own in ranks.values() for p in own]
    rows: list[Row] = []
    run_ms, spread, among, multiples = {}, {}, {}, {}
    if keeps_blocks():
        probes += _reorders(quick)
    for count in threads:
        wanted = [*probes, *(extra if count == min(threads) and not quick else [])]
        found = measure(wanted, count, rounds=_ROUNDS[quick], seconds=_SECONDS[quick], progress=progress)
        rows += [Row(p.kind, p.bits, count, p.dims, t.ms, t.spread) for p, t in sorted(found.items())]
        run_ms[count] = request_ms(count)
        among[count] = _among_others(found, count)
        rows = _without_convolutions(rows)
        spread[count] = round(float(np.median([t.spread for t in found.values() if t.ms >= _TELLING_MS] or [0.0])), 4)
        if count == min(threads) and not quick:
            multiples = {bits: rank_multiple({p.dims[-1]: found[p] for p in own}) for bits, own in ranks.items()}
    return LatencyTable(
        machine(), ort.__version__, tuple(rows), run_ms, spread, among, keeps_blocks(), quick, multiples,
        time.monotonic() - started,
    )  # fmt: skip


def _reorders(quick: bool) -> list[Probe]:
    """Return convolutions that do next to nothing, with and without a change of layout around them."""
    found = []
    for channels in (16, 64, 256) if not quick else (32,):
        for side in (5, 20, 40, 80) if not quick else (8, 40):
            if channels * side * side <= 200_000:
                dims = (channels, channels, 1, 1, side, side, 1)
                found += [Probe("reorder", 32, dims), Probe("depthwise", 32, dims)]
    return found


def _without_convolutions(rows: Sequence[Row]) -> list[Row]:
    """Turn what a change of layout was measured with into what one direction of it takes, by elements."""
    alone = {(r.dims, r.threads): r.ms for r in rows if r.kind == "depthwise" and r.dims[2:4] == (1, 1)}
    found = []
    for r in rows:
        if r.kind == "reorder" and len(r.dims) > 1:
            ms = max((r.ms - alone[r.dims, r.threads]) / 2, r.ms / 20)
            r = replace(r, dims=(r.dims[0] * r.dims[4] * r.dims[5],), ms=ms)
        found.append(r)
    return found


def _among_others(found: Mapping[Probe, Timing], threads: int) -> list[tuple[float, float, float]]:
    """Return (operators, bytes of weights, ms) of small networks: what they take longer than their operators alone."""
    out = []
    for width in (32, 128, 384):
        graph, block = network(width, _BLOCKS)
        alone = sum(found[Probe(*o)].ms for o in block) * _BLOCKS
        none = run_ms(Probe("Add", 32, (4,)).graph(0), threads, 0.01)
        ms = timing([run_ms(graph, threads, 0.05) for _ in range(7)]).ms - none
        out.append((float(_BLOCKS * len(block)), 32.0 * width * width * _BLOCKS, max(ms - alone, 0.0)))
    return out


def _rank_probes(bits: int) -> list[Probe]:
    return [Probe("matmul", bits, (16, 384, r)) for r in _RANKS]


def rank_multiple(times: Mapping[int, Timing]) -> int:
    """Return the largest power of two to a multiple of which a rank may be rounded up for next to nothing.

    `times`: by rank, every whole number of a range that ends with a multiple. Next to nothing is at most a quarter of
    what a kernel would take that is as fast per product at every rank.
    """
    ranks = sorted(times)
    best = 1
    for q in (2, 4, 8, 16, 32):
        pairs = [(r, up) for r in ranks if r % q and (up := -(-r // q) * q) in times]
        costs = float(np.mean([times[up].ms / times[r].ms - 1 for r, up in pairs]))
        if costs <= _FREE * float(np.mean([up / r - 1 for r, up in pairs])):
            best = q
    return best


def request_ms(threads: int) -> float:
    """Return what one request takes beside its operators: the way of the session that serves it."""
    graph = Probe("Add", 32, (4,)).graph(0)
    session = ort.InferenceSession(graph.data, session_options(threads), providers=["CPUExecutionProvider"])
    names, times = list(graph.outputs), []
    for _ in range(500):
        t = time.perf_counter()
        session.run(names, graph.feeds)
        times.append(time.perf_counter() - t)
    return float(np.median(times)) * 1e3


def keeps_blocks() -> bool:
    """Return whether the runtime rewrites convolutions here to a layout in blocks of channels."""
    graph = Probe("conv", 32, (32, 32, 3, 3, 8, 8, 1)).graph(2)
    options = session_options(1)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
        return b"com.microsoft.nchwc" in path.read_bytes()
