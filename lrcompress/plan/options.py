"""What a layer can become: form, rank, what it costs and what it loses; the hull that a price moves along.

An option costs numbers and bytes. Break-even is part of it: an option that costs as much as its layer is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..factorize import Rank, Statistics, form, forms
from ..model.surgery import Layer

#: What a form that spreads over a kernel is without one.
_KERNEL_FORMS = {"tucker": "svd", "spatial_svd": "svd", "pivoted_tucker": "pivoted", "pivoted_spatial": "pivoted"}
#: Bytes of one entry of a permutation.
_POSITION_BYTES = 4


@dataclass(frozen=True)
class Option:
    """One form and rank for one layer; `loss` in the unit of whoever made it, equal for all layers that are compared."""

    n_params: int
    loss: float
    form: str
    rank: Rank
    n_bytes: int = 0

    def cost(self, unit: str) -> int:
        """Return what it takes of a budget in "params" or "bytes"."""
        return self.n_bytes if unit == "bytes" else self.n_params


@dataclass(frozen=True)
class Menu:
    """The options of one layer, cheapest first and none dominated; the last one is dense.

    `forms`: the undominated options of every form by itself, from which a plan tells what was rejected. `slow`: forms
    that would need more multiply-adds than the dense layer.
    """

    layer: Layer
    options: tuple[Option, ...]
    forms: Mapping[str, tuple[Option, ...]] = field(default_factory=dict)
    slow: tuple[str, ...] = ()

    def scaled(self, factor: float) -> Menu:
        """Return the menu with all losses multiplied."""
        forms = {n: tuple(_times(o, factor) for o in own) for n, own in self.forms.items()}
        return replace(self, options=tuple(_times(o, factor) for o in self.options), forms=forms)

    @property
    def dense(self) -> Option:
        return self.options[-1]


def _times(option: Option, factor: float) -> Option:
    return replace(option, loss=option.loss * factor)


def serves(name: str, layer: Layer) -> bool:
    """Return whether a form applies to a layer: its kind, and what the form itself says of the shape."""
    module = form(name)
    return layer.kind in module.LAYERS and getattr(module, "serves", lambda shape: True)(layer.shape)


def candidates(method: str, layer: Layer) -> list[str]:
    """Return the forms that `method` allows for a layer: itself, or with "auto" all that serve its kind and are meant for it."""
    names = tuple(n for n in forms() if getattr(form(n), "AUTO", True)) if method == "auto" else (method,)
    fitting = [n for n in names if serves(n, layer)]
    if not fitting and method in _KERNEL_FORMS and serves(_KERNEL_FORMS[method], layer):
        return [_KERNEL_FORMS[method]]
    if not fitting and layer.kind == "grouped" and method in ("svd", "pivoted", *_KERNEL_FORMS):
        return ["grouped_svd"]
    return fitting


def bias_cost(layer: Layer, statistics: Statistics | None) -> int:
    """Return the numbers that a factorized layer adds beside its factors: a bias for the mean, where there was none."""
    return 0 if layer.has_bias or statistics is None or statistics.mean is None else layer.plain_shape[0]


def bytes_of(name: str, layer: Layer, n_params: int) -> int:
    """Return the bytes of so many stored numbers of a form, its permutations included."""
    positions = layer.plain_shape[0] if getattr(form(name), "INTEGER", None) else 0
    return n_params * layer.weight.element_size() + positions * _POSITION_BYTES


def menu(
    layer: Layer,
    method: str,
    statistics: Statistics | None,
    *,
    comparable: bool,
    unit: str = "params",
    multiple: int = 1,
) -> Menu:
    """Return the options of a layer under `method`; ranks are multiples of `multiple`, or the whole of it.

    Losses are those of the statistics, scaled so that layers can be compared where all have output moments
    (`comparable`), and relative to the layer's energy otherwise.
    """
    size = layer.weight.numel()
    whole = Option(size, 0.0, "dense", 0, size * layer.weight.element_size())
    if layer.reason is not None:
        return Menu(layer, (whole,))
    total = layer.energy(statistics)
    scale = (statistics or Statistics()).scale if comparable else (1 / total if total > 0 else 1.0)
    extra = bias_cost(layer, statistics)
    found: dict[str, list[Option]] = {}
    slow = []
    for name in candidates(method, layer):
        top = form(name).full_rank(layer.shape)
        points = [p for p in layer.curve(name, statistics) if _fits(p.rank, top, multiple)]
        made = [_option(layer, name, p.rank, p.n_params + extra, p.loss * scale) for p in points]
        smaller = [o for o in made if o.cost(unit) < whole.cost(unit)]
        found[name] = [o for o in smaller if method != "auto" or _runs_no_slower(name, layer, o.rank)]
        slow += [name] if smaller and not found[name] else []
    kept = undominated([*(o for own in found.values() for o in own), whole], unit)
    forms = {name: tuple(undominated(own, unit)) for name, own in found.items() if own}
    return Menu(layer, tuple(kept), forms, tuple(slow))


def _option(layer: Layer, name: str, rank: Rank, n_params: int, loss: float) -> Option:
    return Option(n_params, loss, name, rank, bytes_of(name, layer, n_params))


def _fits(rank: Rank, top: Rank, multiple: int) -> bool:
    pairs = zip((rank,), (top,), strict=True) if isinstance(rank, int) else zip(rank, top, strict=True)  # type: ignore[arg-type]
    return all(r % multiple == 0 or r == t for r, t in pairs)


def _runs_no_slower(name: str, layer: Layer, rank: Rank) -> bool:
    """Return whether a choice needs no more multiply-adds than the dense layer: "auto" never trades time for bytes."""
    return int(form(name).n_macs(layer.shape, rank, 1)) <= layer.weight.numel()


def undominated(options: Sequence[Option], unit: str = "params") -> list[Option]:
    """Return the options that no other beats in cost and loss, cheapest first; dense is always kept."""
    kept: list[Option] = []
    for o in sorted(options, key=lambda o: (o.cost(unit), o.loss)):
        if not kept or o.loss < kept[-1].loss or (o.form == "dense" and o.loss <= kept[-1].loss):
            kept.append(o)
    return kept


def hull(options: Sequence[Option], unit: str = "params") -> list[Option]:
    """Return the lower convex hull of (cost, loss), cheapest first."""
    out: list[Option] = []
    for o in options:
        while len(out) >= 2 and slope(out[-2], out[-1], unit) <= slope(out[-2], o, unit):
            out.pop()
        out.append(o)
    return out


def slope(a: Option, b: Option, unit: str = "params") -> float:
    """Return the loss saved per unit bought, going from a to b."""
    return (a.loss - b.loss) / max(b.cost(unit) - a.cost(unit), 1)


def half_priced(options: Sequence[Option], unit: str = "params") -> Option | None:
    """Return the option on the hull at about half the cost of dense, where its loss is measured; None if there is no choice."""
    ends = hull(options, unit)
    if len(ends) < 2:
        return None
    half = ends[-1].cost(unit) / 2
    return min(ends[:-1], key=lambda o: (abs(o.cost(unit) - half), o.cost(unit)))
