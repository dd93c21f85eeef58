"""Which form and rank each layer of a graph takes: a rank for all, a share of energy, or a budget for the whole model.

A budget is spent where it hurts least. What a layer's error costs the answer is measured: each layer alone is held at
about half of its numbers, the graph runs, and the distance of its answers per unit of the layer's loss is its price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..errors import BudgetError
from ..progress import Progress, Silent
from .fitting import Batch, Seen, distance, fit_plain
from .forms import FORMS, Metric, Option, clip, full_rank, n_params, options, serves
from .layers import GraphLayer, weight_of
from .opening import OnnxGraph
from .rewriting import rewrite
from .running import Run

#: Batches that the price of a layer is measured on.
_PRICED_BATCHES = 4
DENSE = "dense"


def forms_of(method: str, layer: GraphLayer) -> list[str]:
    """Return the forms that a method means for a layer."""
    return [f for f in (FORMS if method == "auto" else (method,)) if serves(f, layer.kind, layer.shape)]


def by_rank(
    graph: OnnxGraph, layers: Sequence[GraphLayer], rank: int, method: str, seen: Mapping[str, Seen]
) -> dict[str, Option | str]:
    """Return the choice of each layer at one rank for all, or why it stays dense."""
    found: dict[str, Option | str] = {}
    for layer in layers:
        weight, metric = weight_of(graph, layer), metric_of(layer, seen)
        best: Option | None = None
        for form in forms_of(method, layer):
            at = clip(form, layer.shape, rank)
            params = n_params(form, layer.shape, at)
            if params >= layer.params:
                continue
            loss = _loss_at(form, layer, weight, metric, at)
            if best is None or loss < best.loss:
                best = Option(form, at, params, loss)
        found[layer.name] = best or _no_gain(method, layer, rank)
    return found


def _loss_at(form: str, layer: GraphLayer, weight: object, metric: Metric, rank: object) -> float:
    from .forms import decompose, flat

    made = decompose(form, weight, rank, metric)  # type: ignore[arg-type]
    return metric.loss(flat(weight - made.dense()).astype(float))  # type: ignore[operator]


def _no_gain(method: str, layer: GraphLayer, rank: int | None = None) -> str:
    if not forms_of(method, layer):
        return f"{method} does not serve a {layer.kind} of this shape"
    form = forms_of(method, layer)[0]
    at = full_rank(form, layer.shape) if rank is None else clip(form, layer.shape, rank)
    params = n_params(form, layer.shape, at)
    return f"would not shrink: {params:,} numbers at rank {at} instead of {layer.params:,}"


def by_energy(
    graph: OnnxGraph, layers: Sequence[GraphLayer], share: float, method: str, seen: Mapping[str, Seen]
) -> dict[str, Option | str]:
    """Return the smallest choice of each layer that keeps this share of what its squared singular values sum to."""
    found: dict[str, Option | str] = {}
    for layer in layers:
        weight, metric = weight_of(graph, layer), metric_of(layer, seen)
        from .forms import flat

        most = (1 - share) * metric.loss(flat(weight).astype(float))
        offered = [
            o for f in forms_of(method, layer) for o in options(f, layer.kind, weight, metric, every=True) if o.loss <= most * (1 + 1e-9)
        ]  # fmt: skip
        why = f"would not shrink: no rank below dense keeps {share:g} of the energy"
        found[layer.name] = min(offered, key=lambda o: (o.params, o.loss)) if offered else why
    return found


def by_ratio(
    graph: OnnxGraph, layers: Sequence[GraphLayer], ratio: float, method: str, seen: Mapping[str, Seen],
    batches: Sequence[Batch] = (), *, multiple: int = 1, threads: int = 1, progress: Progress | None = None,
) -> dict[str, Option | str]:  # fmt: skip
    """Return choices whose numbers, with what stays, are at most `ratio` of the model's; `BudgetError` where none are.

    With `batches` prices are measured on them; without, relative losses count alike.
    """
    budget = int(ratio * graph.n_params) - (graph.n_params - sum(layer.params for layer in layers))
    ladders, totals = {}, {}
    for layer in layers:
        weight, metric = weight_of(graph, layer), metric_of(layer, seen)
        from .forms import flat

        totals[layer.name] = metric.loss(flat(weight).astype(float))
        offered = [
            o for f in forms_of(method, layer) for o in options(f, layer.kind, weight, metric, multiple=multiple)
        ]
        ladders[layer.name] = hull([Option(DENSE, None, layer.params, 0.0), *offered])
    least = sum(ladder[0].params for ladder in ladders.values())
    if least > budget:
        fixed = graph.n_params - sum(layer.params for layer in layers)
        raise BudgetError(
            "lrcompress factorize --ratio", f"a ratio of at least {(least + fixed) / graph.n_params:.4f}", ratio,
            f"{fixed:,} of {graph.n_params:,} numbers cannot be factorized; allow more, or leave fewer layers out",
        )  # fmt: skip
    prices = {n: 1.0 / t if t > 0 else 0.0 for n, t in totals.items()}
    if batches:
        prices = _measured(graph, layers, ladders, seen, batches, threads, progress or Silent())
    chosen = _spend(ladders, prices, budget)
    kept = "dense is worth its numbers under this budget"
    return {
        n: o if o.form != DENSE else (kept if len(ladders[n]) > 1 else "would not shrink at any rank")
        for n, o in chosen.items()
    }


def hull(offered: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of (numbers, loss), fewest numbers first."""
    best: list[Option] = []
    for o in sorted(offered, key=lambda o: (o.params, o.loss)):
        if best and o.loss >= best[-1].loss:
            continue
        while len(best) > 1 and _slope(best[-2], best[-1]) <= _slope(best[-1], o):
            best.pop()
        best.append(o)
    return best


def _slope(a: Option, b: Option) -> float:
    """Return what one more number saves between two options."""
    return (a.loss - b.loss) / max(b.params - a.params, 1)


def _spend(ladders: Mapping[str, Sequence[Option]], prices: Mapping[str, float], budget: int) -> dict[str, Option]:
    """Buy the steps that save most per number, then whatever single upgrade still fits."""
    chosen = {n: ladder[0] for n, ladder in ladders.items()}
    left = budget - sum(o.params for o in chosen.values())
    steps = sorted(
        (
            (-_slope(a, b) * prices[n], n, i)
            for n, ladder in ladders.items()
            for i, (a, b) in enumerate(pairwise(ladder))
        ),
        key=lambda s: (s[0], s[1], s[2]),
    )
    at = dict.fromkeys(ladders, 0)
    for _, name, i in steps:
        ladder = ladders[name]
        cost = ladder[i + 1].params - ladder[i].params
        if at[name] == i and cost <= left:
            at[name], left = i + 1, left - cost
            chosen[name] = ladder[i + 1]
    return chosen


def _measured(
    graph: OnnxGraph, layers: Sequence[GraphLayer], ladders: Mapping[str, Sequence[Option]], seen: Mapping[str, Seen],
    batches: Sequence[Batch], threads: int, progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """Return what one unit of each layer's loss costs the answers."""
    some = list(batches)[:: max(1, len(batches) // _PRICED_BATCHES)][:_PRICED_BATCHES]
    original = Run(graph, threads=threads)
    wanted = [original(feeds)[0] for feeds in some]
    prices = {}
    with progress.task("price the layers", total=len(layers)) as advance:
        for layer in layers:
            prices[layer.name] = 0.0
            lossy = [o for o in ladders[layer.name] if o.form != DENSE and o.loss > 0]
            if lossy:
                option = min(lossy, key=lambda o: abs(o.params - layer.params / 2))
                change = {layer.name: fit_plain(graph, layer, option, seen.get(layer.name)).change}
                run = Run(graph, rewrite(graph, layers, change).model, threads=threads)
                moved = sum(distance(a, run(feeds)[0]) for a, feeds in zip(wanted, some, strict=True))
                prices[layer.name] = moved / len(some) / option.loss
            advance(1, layer.name)
    return prices


def metric_of(layer: GraphLayer, seen: Mapping[str, Seen]) -> Metric:
    """Return the metric that choices are made in: the mean costs nothing where a bias carries it."""
    found = seen.get(layer.name)
    return Metric() if found is None else found.metric(centred=layer.has_bias)


__all__ = ["by_energy", "by_rank", "by_ratio", "forms_of"]
