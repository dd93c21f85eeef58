"""Choose form and rank per layer: by one rank, by energy, by a budget of parameters, or by a plan file.

A budget is one problem for the whole model: every layer offers the points of its forms' curves and "dense"; on the
lower hull of (numbers, loss) the steepest steps are bought first (the Lagrangian solution), then single upgrades
fill what is left. Losses of different layers are comparable with two-sided statistics, which price an error by what
the answer feels; otherwise each is taken relative to its layer's energy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BudgetError, PlanError
from ..factorize import Point, Rank, Statistics, form, forms
from ..model.surgery import Layer

#: What a form that spreads over a kernel is without one.
_KERNEL_FORMS = {"tucker": "svd", "spatial_svd": "svd", "pivoted_tucker": "pivoted", "pivoted_spatial": "pivoted"}


@dataclass(frozen=True)
class Choice:
    """What one layer becomes; `form` "dense" carries the reason."""

    name: str
    form: str
    rank: Rank
    n_params: int
    reason: str | None = None


def dense(layer: Layer, reason: str) -> Choice:
    return Choice(layer.name, "dense", 0, layer.weight.numel(), reason)


def bias_cost(layer: Layer, statistics: Statistics | None) -> int:
    """Return the numbers that a factorized layer adds beside its factors: a bias for the mean, where there was none."""
    return 0 if layer.has_bias or statistics is None or statistics.mean is None else layer.plain_shape[0]


def candidates(method: str, layer: Layer) -> list[str]:
    """Return the forms that `method` allows for a layer: itself, or with "auto" all that serve its kind and are meant for it."""
    names = tuple(n for n in forms() if getattr(form(n), "AUTO", True)) if method == "auto" else (method,)
    fitting = [n for n in names if serves(n, layer)]
    if not fitting and method in _KERNEL_FORMS and serves(_KERNEL_FORMS[method], layer):
        return [_KERNEL_FORMS[method]]
    if not fitting and layer.kind == "grouped" and method in ("svd", "pivoted", *_KERNEL_FORMS):
        return ["grouped_svd"]
    return fitting


def serves(name: str, layer: Layer) -> bool:
    """Return whether a form applies to a layer: its kind, and what the form itself says of the shape."""
    module = form(name)
    return layer.kind in module.LAYERS and getattr(module, "serves", lambda shape: True)(layer.shape)


def select(
    layers: Sequence[Layer],
    *,
    method: str,
    statistics: Mapping[str, Statistics],
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    fixed_params: int = 0,
) -> list[Choice]:
    """Return one choice per layer, in order. Exactly one of rank, ratio, energy; `fixed_params` is the rest of the model."""
    if ratio is not None:
        return _by_ratio(layers, method, statistics, ratio, fixed_params)
    return [_alone(layer, method, statistics.get(layer.name), rank, energy) for layer in layers]


def _alone(layer: Layer, method: str, statistics: Statistics | None, rank: int | None, energy: float | None) -> Choice:
    if layer.reason is not None:
        return dense(layer, layer.reason)
    names = candidates("svd" if method == "auto" and rank is not None else method, layer)
    if not names:
        return dense(layer, f"{method} does not serve {layer.kind} layers")
    best: tuple[int, str, Rank] | None = None
    for name in names:
        if rank is not None:
            wanted: Rank = form(name).clip(layer.shape, rank)
        else:
            assert energy is not None
            found = _smallest(layer.curve(name, statistics), energy, layer.energy(statistics))
            if found is None:
                continue
            wanted = found
        cost = form(name).n_params(layer.shape, wanted) + bias_cost(layer, statistics)
        if best is None or cost < best[0]:
            best = cost, name, wanted
    if best is None or best[0] >= layer.weight.numel():
        got = (
            ""
            if best is None
            else f": {best[1]} at rank {_rank_text(best[2])} would take {best[0]:,} numbers, dense takes {layer.weight.numel():,}"
        )
        return dense(layer, f"would not shrink{got}")
    return Choice(layer.name, best[1], best[2], best[0])


def _rank_text(rank: Rank) -> str:
    return str(rank) if isinstance(rank, int) else "×".join(map(str, rank))


def _smallest(curve: Sequence[Point], energy: float, total: float) -> Rank | None:
    kept = [p for p in curve if p.loss <= (1 - energy) * total + 1e-12 * total]
    return min(kept, key=lambda p: (p.n_params, p.loss)).rank if kept else None


def _runs_no_slower(name: str, layer: Layer, rank: Rank) -> bool:
    """Return whether a choice needs no more multiply-adds than the dense layer: "auto" never trades time for bytes."""
    return int(form(name).n_macs(layer.shape, rank, 1)) <= layer.weight.numel()


@dataclass(frozen=True)
class _Option:
    n_params: int
    loss: float
    form: str
    rank: Rank


def _options(layer: Layer, method: str, statistics: Statistics | None, *, comparable: bool) -> list[_Option]:
    """Return the undominated options of a layer, cheapest first; the last one is dense."""
    size = layer.weight.numel()
    options = [_Option(size, 0.0, "dense", 0)]
    if layer.reason is None:
        metric = statistics or Statistics()
        total = layer.energy(statistics)
        scale = metric.scale if comparable else (1 / total if total > 0 else 1.0)
        extra = bias_cost(layer, statistics)
        for name in candidates(method, layer):
            points = [
                p for p in layer.curve(name, statistics) if method != "auto" or _runs_no_slower(name, layer, p.rank)
            ]
            options += [
                _Option(p.n_params + extra, p.loss * scale, name, p.rank) for p in points if p.n_params + extra < size
            ]
    options.sort(key=lambda o: (o.n_params, o.loss))
    kept: list[_Option] = []
    for o in options:
        if not kept or o.loss < kept[-1].loss or (o.form == "dense" and o.loss <= kept[-1].loss):
            kept.append(o)
    return kept


def hull(options: Sequence[_Option]) -> list[_Option]:
    """Return the lower convex hull of (n_params, loss), cheapest first."""
    out: list[_Option] = []
    for o in options:
        while len(out) >= 2 and _slope(out[-2], out[-1]) <= _slope(out[-2], o):
            out.pop()
        out.append(o)
    return out


def _slope(a: _Option, b: _Option) -> float:
    """Return the loss saved per number bought, going from a to b."""
    return (a.loss - b.loss) / max(b.n_params - a.n_params, 1)


def _by_ratio(
    layers: Sequence[Layer], method: str, statistics: Mapping[str, Statistics], ratio: float, fixed: int
) -> list[Choice]:
    comparable = all(statistics.get(n.name, Statistics()).output_gram is not None for n in layers if n.reason is None)
    options = [_options(layer, method, statistics.get(layer.name), comparable=comparable) for layer in layers]
    before = fixed + sum(layer.weight.numel() for layer in layers)
    budget = math.floor(ratio * before) - fixed
    least = sum(o[0].n_params for o in options)
    if least > budget:
        raise BudgetError(
            "--ratio",
            f"at least {(least + fixed) / before:.4f} for this model and method",
            f"{ratio}",
            "ask for more, or for another --method",
        )
    chosen = _allocate(options, budget)
    return [
        dense(layer, layer.reason or "its parameters are worth more than those of other layers")
        if o.form == "dense"
        else Choice(layer.name, o.form, o.rank, o.n_params)
        for layer, o in zip(layers, chosen, strict=True)
    ]


def _allocate(options: Sequence[Sequence[_Option]], budget: int) -> list[_Option]:
    """Buy hull steps by falling slope, then fill the rest of the budget with the best single upgrades."""
    hulls = [hull(o) for o in options]
    position = [0] * len(hulls)
    left = budget - sum(h[0].n_params for h in hulls)
    steps = sorted(
        ((-_slope(h[i], h[i + 1]), k, i) for k, h in enumerate(hulls) for i in range(len(h) - 1)),
        key=lambda s: (s[0], s[1], s[2]),
    )
    stopped: set[int] = set()
    for _, k, i in steps:
        if k in stopped or position[k] != i:
            continue
        cost = hulls[k][i + 1].n_params - hulls[k][i].n_params
        if cost > left:
            stopped.add(k)  # a later step of this layer would skip one
            continue
        position[k], left = i + 1, left - cost
    return _fill(options, [h[p] for h, p in zip(hulls, position, strict=True)], left)


def _fill(options: Sequence[Sequence[_Option]], chosen: list[_Option], left: int) -> list[_Option]:
    """Spend what is left on the single upgrades that save most per number, until none fits."""
    costs = [np.array([o.n_params for o in layer], dtype=np.float64) for layer in options]
    losses = [np.array([o.loss for o in layer]) for layer in options]

    def best_of(k: int) -> tuple[float, int]:
        cost, gain = costs[k] - chosen[k].n_params, chosen[k].loss - losses[k]
        rate = np.where((cost > 0) & (cost <= left) & (gain > 0), gain / np.maximum(cost, 1), -1.0)
        i = int(rate.argmax())
        return float(rate[i]), i

    best = [best_of(k) for k in range(len(options))]
    while True:
        k = max(range(len(best)), key=lambda j: best[j][0], default=-1)
        if k < 0 or best[k][0] <= 0:
            return chosen
        upgrade = options[k][best[k][1]]
        cost = upgrade.n_params - chosen[k].n_params
        if cost <= left:
            chosen[k], left = upgrade, left - cost
        best[k] = best_of(k)


def read_plan(path: Path, layers: Sequence[Layer]) -> list[Choice]:
    """Return the choices of a plan file; layers that it does not name stay dense.

    Raises `PlanError` for a file that is no plan, an unknown layer or form, or a rank its layer does not have.
    """
    try:
        value: Any = json.loads(path.read_text())
    except OSError as e:
        raise PlanError(path, "a readable plan file", e.strerror or str(e)) from e
    except ValueError as e:
        raise PlanError(path, "JSON", str(e), "write one with 'lrcompress plan'") from e
    if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
        raise PlanError(path, "an object with a list 'layers'", type(value).__name__)
    if value.get("schema") != 1:
        raise PlanError(path, "schema 1", value.get("schema"))
    known = {layer.name: layer for layer in layers}
    planned: dict[str, Choice] = {}
    for i, entry in enumerate(value["layers"]):
        choice = _planned(f"{path}: layers[{i}]", entry, known)
        if choice.name in planned:
            raise PlanError(f"{path}: layers[{i}]", "each layer once", choice.name)
        planned[choice.name] = choice
    return [planned.get(layer.name, dense(layer, layer.reason or "not in the plan")) for layer in layers]


def _planned(where: str, entry: Any, known: Mapping[str, Layer]) -> Choice:
    if not isinstance(entry, dict) or not {"name", "form"} <= set(entry):
        raise PlanError(where, "an object with name, form and rank", entry)
    layer = known.get(str(entry["name"]))
    if layer is None:
        raise PlanError(
            where,
            f"a layer of this model ({', '.join(list(known)[:4])}, …)",
            entry["name"],
            "a plan belongs to one model",
        )
    if entry["form"] == "dense":
        return dense(layer, layer.reason or "the plan keeps it dense")
    if layer.reason is not None:
        raise PlanError(f"{where} ({layer.name})", "form dense", entry["form"], layer.reason)
    if entry["form"] not in forms() or not serves(entry["form"], layer):
        fitting = [n for n in forms() if serves(n, layer)]
        raise PlanError(
            f"{where} ({layer.name})", f"a form for a {layer.kind} layer: {', '.join(fitting)}", entry["form"]
        )
    module = form(entry["form"])
    top = module.full_rank(layer.shape)
    rank: Any = tuple(entry["rank"]) if isinstance(entry.get("rank"), list) else entry.get("rank")
    flat = (rank,) if isinstance(top, int) else rank
    tops = (top,) if isinstance(top, int) else top
    valid = isinstance(flat, tuple) and len(flat) == len(tops)
    if not valid or not all(type(r) is int and 1 <= r <= t for r, t in zip(flat, tops, strict=True)):
        wanted = f"a rank in 1…{top}" if isinstance(top, int) else f"ranks in 1…{list(top)}"
        raise PlanError(f"{where} ({layer.name})", wanted, entry.get("rank"), f"the weight is {list(layer.shape)}")
    return Choice(layer.name, entry["form"], rank, module.n_params(layer.shape, rank))
