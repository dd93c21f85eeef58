"""Fit layers to data that run through the graph in ONNX Runtime: what they read, and what drifted before them.

    seen = measure(graph, layers, batches)                      # {layer: Moments of its input, or counts of rows}
    changes, rows = fit(graph, layers, choices, batches)        # in the order of depth

The order of depth: when a layer is fitted, the layers before it are in place already; x̂ is what reaches it now, x what
it read in the original. With centred moments S, C = E[x x̂ᵀ], Ŝ the best replacement on x̂ is

    A* = W + β W (C − Ŝ)(Ŝ + λI)⁻¹,   Ŵ = the form's best of A* in the metric Ŝ,   b' = b + W μ − Ŵ μ̂

and β is the one of 0, ½, 1 that loses least on batches that were held out. A layer that stays dense gets its b' too.

Source: maths.md §2.1, §2.3 and §2.5; arXiv 2604.02119 for β = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from ..progress import Progress, Silent
from .forms import Factors, Metric, Option, decompose, flat
from .layers import GraphLayer, weight_of
from .moments import Drift, Moments, rows_of
from .opening import OnnxGraph
from .rewriting import Change, rewrite
from .running import Run, floats

BETAS = (0.0, 0.5, 1.0)
DAMPING = 1e-3
#: One batch in so many is held out for choosing β.
_HELD_OUT = 5
#: A bias is added to a layer that has none if it takes away at least this share of the loss.
_WORTH_A_BIAS = 0.1
#: An embedding row that was never seen counts as this share of a token.
_UNSEEN = 0.01
Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Seen:
    """What a layer read: moments of its rows, or for a table how often each row was looked up."""

    moments: Moments | None = None
    counts: np.ndarray | None = None

    @property
    def count(self) -> int:
        if self.moments is not None:
            return self.moments.count
        return 0 if self.counts is None else int(self.counts.sum())

    def metric(self, *, centred: bool) -> Metric:
        """Return the metric of errors: the mean is carried by a bias, or counts like everything else."""
        if self.counts is not None:
            weights = self.counts + _UNSEEN * self.counts.sum() / len(self.counts)
            return Metric(rows=weights / weights.sum())
        if self.moments is None or not self.moments.count:
            return Metric()
        s = self.moments.shrunk
        assert self.moments.mean is not None
        return Metric(s if centred else s + np.outer(self.moments.mean, self.moments.mean))


@dataclass(frozen=True)
class Fitted:
    """What became of one layer, and its errors: in `norm`, and of the weight itself."""

    change: Change
    norm: str
    rel_error: float
    rel_error_frobenius: float


def measure(
    graph: OnnxGraph, layers: Sequence[GraphLayer], batches: Iterable[Batch], *, total: int | None = None,
    threads: int = 1, progress: Progress | None = None,
) -> dict[str, Seen]:  # fmt: skip
    """Return what each layer reads in one pass over `batches`; `DataError` where the data are not finite."""
    moments: dict[str, Moments] = {layer.name: Moments() for layer in layers if layer.kind != "embedding"}
    counts = {layer.name: np.zeros(layer.shape[0]) for layer in layers if layer.kind == "embedding"}
    run = Run(graph, watched=sorted({u.value for layer in layers for u in layer.uses}), threads=threads)
    shared: dict[tuple[Any, ...], str] = {}
    with (progress or Silent()).task("calibrate", total=total) as advance:
        for feeds in batches:
            _, seen = run(feeds, only_watched=True)
            _check_finite(graph, seen)
            for layer in layers:
                # Layers that read one value alike have one set of moments.
                key = (tuple(u.value for u in layer.uses), layer.uses[0].geometry)
                if layer.kind != "embedding" and shared.setdefault(key, layer.name) != layer.name:
                    continue
                for use in layer.uses:
                    _take(layer, seen.get(use.value), feeds, use.geometry, moments, counts)
            advance(1)
    found = {}
    for layer in layers:
        if layer.kind == "embedding":
            found[layer.name] = Seen(counts=counts[layer.name])
            continue
        key = (tuple(u.value for u in layer.uses), layer.uses[0].geometry)
        found[layer.name] = Seen(moments[shared.get(key, layer.name)])
    return found


def _take(
    layer: GraphLayer, value: np.ndarray | None, feeds: Batch, geometry: Any, moments: dict[str, Moments],
    counts: dict[str, np.ndarray],
) -> None:  # fmt: skip
    if value is None or not value.size:
        return
    if layer.kind == "embedding":
        ids = value.reshape(-1).astype(np.int64) % layer.shape[0]  # Gather counts from the end below zero
        mask = next((m for n, m in feeds.items() if "mask" in n.lower() and m.shape == value.shape), None)
        ids = ids if mask is None else ids[mask.reshape(-1).astype(bool)]
        counts[layer.name] += np.bincount(ids, minlength=layer.shape[0])
        return
    for rows in rows_of(value, geometry, feeds):
        moments[layer.name].add(rows)


def _check_finite(graph: OnnxGraph, seen: Mapping[str, np.ndarray]) -> None:
    for name, value in seen.items():
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            where = f"{graph.path}: {name}"
            raise DataError(where, "finite values on the calibration data", "NaN or infinity", "check the data")


def fit_plain(graph: OnnxGraph, layer: GraphLayer, option: Option, seen: Seen | None) -> Fitted:
    """Fit one layer to what it reads in the original; the bias carries the mean where there is one, or it pays."""
    weight = weight_of(graph, layer)
    w = flat(weight).astype(np.float64)
    if seen is None or not seen.count:
        factors = decompose(option.form, weight, _rank(option), Metric())
        off = relative(Metric().loss(w - flat(factors.dense())), Metric().loss(w))
        return Fitted(Change(factors), "frobenius", off, off)
    centred = carries_bias(layer, weight, option, seen)
    metric = seen.metric(centred=centred)
    factors = decompose(option.form, weight, _rank(option), metric)
    error = w - flat(factors.dense())
    bias = None
    if centred:
        assert seen.moments is not None and seen.moments.mean is not None
        bias = _old_bias(graph, layer) + error @ seen.moments.mean
    rel = relative(metric.loss(error), metric.loss(w))
    return Fitted(Change(factors, bias), "activation", rel, relative(float((error**2).sum()), float((w**2).sum())))


def carries_bias(layer: GraphLayer, weight: np.ndarray, option: Option, seen: Seen) -> bool:
    """Tell whether the bias takes the mean: where there is one; a new one has to win a tenth of the loss."""
    if layer.kind == "embedding":
        return False
    if layer.has_bias:
        return True
    if not all(u.open for u in layer.uses):
        return False
    w, losses = flat(weight).astype(np.float64), []
    for centred in (True, False):
        metric = seen.metric(centred=centred)
        losses.append(metric.loss(w - flat(decompose(option.form, weight, _rank(option), metric).dense())))
    return losses[0] < (1 - _WORTH_A_BIAS) * losses[1]


def fit(
    graph: OnnxGraph, layers: Sequence[GraphLayer], chosen: Mapping[str, Option], seen: Mapping[str, Seen],
    batches: Sequence[Batch], *, anchor: bool = True, threads: int = 1, progress: Progress | None = None,
) -> dict[str, Fitted]:  # fmt: skip
    """Return what becomes of every layer with a choice, and with `anchor` of biases of dense layers behind them."""
    found: dict[str, Fitted] = {}
    with (progress or Silent()).task("factorize", total=len(layers)) as advance:
        for group in _by_input(layers):
            active = [n for n in group if n.name in chosen]
            for layer in active:
                found[layer.name] = fit_plain(graph, layer, chosen[layer.name], seen.get(layer.name))
            changed = {n: f.change for n, f in found.items() if n not in {g.name for g in group}}
            steady = [n for n in group if n.name not in chosen and n.reason is None and n.has_bias]
            if anchor and batches and changed and (active or steady) and group[0].kind != "embedding":
                halves = _drifts(graph, layers, changed, group[0], batches, threads)
                for layer in [*active, *steady] if halves else ():
                    found |= _anchored(graph, layer, chosen.get(layer.name), found.get(layer.name), *halves)
            advance(len(group), group[-1].name)
    return found


def _by_input(layers: Sequence[GraphLayer]) -> list[list[GraphLayer]]:
    """Group neighbours in depth that read one value: they see one drift."""
    groups: list[list[GraphLayer]] = []
    for layer in layers:
        key = (tuple(u.value for u in layer.uses), layer.uses[0].geometry, layer.kind)
        if groups and key == (
            tuple(u.value for u in groups[-1][0].uses),
            groups[-1][0].uses[0].geometry,
            groups[-1][0].kind,
        ):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _drifts(
    graph: OnnxGraph, layers: Sequence[GraphLayer], changed: Mapping[str, Change], layer: GraphLayer,
    batches: Sequence[Batch], threads: int,
) -> tuple[Drift, Drift] | tuple[()]:  # fmt: skip
    """Return the drift at a layer, to fit to and to judge by; nothing where no data reach it."""
    values = sorted({u.value for u in layer.uses})
    clean, now = (
        Run(graph, watched=values, threads=threads),
        Run(graph, rewrite(graph, layers, changed).model, watched=values, threads=threads),
    )
    halves = [Moments(), Moments()]
    for i, feeds in enumerate(batches):
        (_, x), (_, y) = clean(feeds, only_watched=True), now(feeds, only_watched=True)
        held = len(batches) > 1 and i % _HELD_OUT == (1 if len(batches) < _HELD_OUT else _HELD_OUT - 1)
        for use in layer.uses:
            a, b = x.get(use.value), y.get(use.value)
            if a is None or b is None or not a.size:
                continue
            for rows, drifted in zip(rows_of(a, use.geometry, feeds), rows_of(b, use.geometry, feeds), strict=True):
                halves[held].add(np.concatenate([rows, drifted], 1))
    fitted, judged = halves
    if not fitted.count:
        return ()
    return Drift.of(fitted).shrunk(), Drift.of(judged) if judged.count else Drift.of(fitted).shrunk()


def _anchored(
    graph: OnnxGraph, layer: GraphLayer, option: Option | None, plain: Fitted | None, drift: Drift, judge: Drift
) -> dict[str, Fitted]:
    """Refit one layer on what reaches it now; a layer without a choice gets the bias that carries the drift."""
    weight = weight_of(graph, layer)
    w, old = flat(weight).astype(np.float64), _old_bias(graph, layer)
    if option is None:
        bias = old + w @ (drift.mean - drift.drifted_mean)
        return {layer.name: Fitted(Change(bias=bias), "activation", 0.0, 0.0)}
    assert plain is not None
    shifts = plain.change.bias is not None
    best: tuple[float, Factors, np.ndarray | None] | None = None
    for beta in BETAS:
        s, cross = drift.drifted, drift.cross
        if not shifts:
            s = s + np.outer(drift.drifted_mean, drift.drifted_mean)
            cross = cross + np.outer(drift.mean, drift.drifted_mean)
        target = w + beta * _step(w, cross, s)
        factors = decompose(option.form, target.reshape(weight.shape), _rank(option), Metric(s))
        made = flat(factors.dense())
        bias = old + w @ drift.mean - made @ drift.drifted_mean if shifts else None
        loss = answers_lost(w, made, judge, None if bias is None else bias - old)
        if best is None or loss < best[0]:
            best = loss, factors, bias
    assert best is not None
    loss, factors, bias = best
    total = float(((w @ judge.clean) * w).sum()) + (0.0 if shifts else float(((w @ judge.mean) ** 2).sum()))
    off = relative(float(((w - flat(factors.dense())) ** 2).sum()), float((w**2).sum()))
    return {layer.name: Fitted(Change(factors, bias), "activation", relative(loss, total), off)}


def _step(w: np.ndarray, cross: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Return W (C − Ŝ)(Ŝ + λI)⁻¹: what the best replacement on the drifted input differs from W by."""
    scale = float(s.trace()) / len(s)
    if scale <= 0:
        return np.zeros_like(w)
    raised = s + DAMPING * scale * np.eye(len(s))
    return np.linalg.solve(raised, (w @ (cross - s)).T).T


def answers_lost(w: np.ndarray, made: np.ndarray, d: Drift, shift: np.ndarray | None) -> float:
    """Return E‖W x − Ŵ x̂ − shift‖² from moments; without a shift 0 is added."""
    crossed = (w @ d.cross) * made
    value = ((w @ d.clean) * w).sum() - 2 * crossed.sum() + ((made @ d.drifted) * made).sum()
    off = w @ d.mean - made @ d.drifted_mean - (0.0 if shift is None else shift)
    return max(float(value + (off**2).sum()), 0.0)


def distance(wanted: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> float:
    """Return how far the answers moved: Σ over outputs of ‖a − b‖² / ‖a‖²."""
    total = 0.0
    for a, b in zip(floats(wanted), floats(got), strict=True):
        size = float((a.astype(np.float64) ** 2).sum())
        total += float(((a.astype(np.float64) - b) ** 2).sum()) / size if size > 0 else 0.0
    return total


def _old_bias(graph: OnnxGraph, layer: GraphLayer) -> np.ndarray:
    use = layer.uses[0]
    outputs = layer.shape[0]
    return graph.array(use.bias).astype(np.float64).reshape(-1) if use.bias else np.zeros(outputs)


def _rank(option: Option) -> Any:
    return option.rank


def relative(loss: float, total: float) -> float:
    """Return √(loss/total); 0 of 0 is 0."""
    if total <= 0:
        return 0.0 if loss <= 0 else math.inf
    return math.sqrt(max(loss, 0.0) / total)


__all__ = ["Batch", "Fitted", "Seen", "answers_lost", "distance", "fit", "fit_plain", "measure"]
