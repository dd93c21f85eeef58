"""Choose form, rank and bits of every layer for a device: least loss within its bytes and milliseconds.

    market = Market.of(prepared, method="auto", bits=(32, 16, 8, 4), prices=prices, …)     # what can be had, and its price
    plan = device_plan(market, Limits(n_bytes=6_000_000, ms=20.0), …)

Losses are those of the answer, by the same measured points as every plan; rounding is measured with the whole network in
8 and in 4 bits. The dense network in every precision is tried too, and taken where it loses no more, or nothing to notice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from ..data import Data
from ..errors import CommandError, ModelError
from ..export.graph import strip, trace
from ..export.rewrites import simplify
from ..factorize import Rank
from ..fit import Bench, Judge, calibrated, sensitivities
from ..fit.placing import as_feeds, input_steps, one_request, places
from ..fit.rounding import with_bits
from ..model.surgery import Layer
from ..model.views import view_of
from ..plan import Choice, Menu, Option, RankPlan, menus_of
from ..plan.bits import BITS, BLOCK, Precision, graph_bytes, precisions
from ..plan.candidates import Candidate, Chosen, Fixed, Limits, candidates_of, choose
from ..plan.form_time import Place, layer_ms, steps_of
from ..plan.graph_time import request_operators, total_ms
from ..plan.prices import Prices
from ..plan.profile import load_profile, table_of
from ..plan.rankplan import Planned, Rejected
from ..plan.selection import dense
from ..plan.told import advice, why
from ..progress import Progress
from .planning import Prepared, copy_of, judged
from .rounding_noise import measured_noise, rounding_noise, won_by_refits

#: What files of their own bring beside graph and numbers.
_SLACK_BYTES = 600
#: How often choices are checked by measuring, and what share of a loss may be missed before it is raised.
_CHECKS, _TOLERATED = 40, 1.5
#: What share of the square of the answers nobody notices, a hundredth of their size: bytes that save less are not spent.
NOTICED = 1e-4


@dataclass(frozen=True)
class ForDevice:
    """What a command says of the device: its limits, the bits that it may be given, its prices where they are known."""

    limits: Limits
    bits: tuple[int, ...]
    prices: Prices | None
    multiple: int

    @classmethod
    def of(
        cls, device: str | Path | None, latency: str | Path | None, max_bytes: int | None, max_ms: float | None,
        bits: Sequence[int] | None, others: Mapping[str, object],
    ) -> ForDevice | None:  # fmt: skip
        """Return what is asked for, None for a plan by parameters or bytes alone. Raises `CommandError`, `ProfileError`."""
        if device is None and latency is None and max_ms is None and bits is None:
            return None
        where = "lrcompress plan"
        mixed = next((name for name, value in others.items() if value is not None), None)
        if mixed is not None:
            raise CommandError(where, "--max-bytes and --max-ms for a device", mixed, f"leave {mixed} out")
        wrong = [b for b in bits or () if b not in BITS]
        if wrong or (bits is not None and not bits):
            raise CommandError(
                f"{where} --bits", f"some of {', '.join(map(str, BITS))}", ",".join(map(str, bits or ()))
            )
        profile = None if device is None else load_profile(device)
        table = table_of(profile, latency, needed=max_ms is not None)
        threads = 1 if profile is None else profile.threads
        if table is not None:
            threads = max((t for t in table.threads if t <= threads), default=threads)
        prices = None if table is None else Prices(table, threads)
        multiple = 1 if profile is None else profile.rank_multiple
        if table is not None and table.rank_multiple:
            multiple = min(table.rank_multiple.values())
        return cls(Limits(max_bytes, max_ms), BITS if bits is None else tuple(dict.fromkeys(bits)), prices, multiple)


@dataclass(frozen=True)
class Market:
    """What every layer can become, with its price; `bench` measures choices, where there are data to measure on.

    `refitted`: what share of the loss of 4 bits remains after the refits of the export, which measurements here leave out;
    `known`: losses of single layers that were measured.
    """

    prepared: Prepared
    menus: Sequence[Menu]
    layers: Sequence[Sequence[Candidate]]
    fixed: Fixed
    prices: Prices | None
    bench: Bench | None
    kinds: Mapping[str, str]
    measured: Mapping[str, float]
    method: str
    refitted: float = 1.0
    known: dict[tuple[str, str, Rank, Precision], float | None] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        prepared: Prepared,
        *,
        method: str,
        bits: Sequence[int] = BITS,
        prices: Prices | None,
        multiple: int = 1,
        measure: bool = True,
        select: Data | None = None,
        progress: Progress,
    ) -> Market:
        """Collect the candidates of all layers. Raises `CommandError`, `ModelError` where times cannot be told."""
        heads, data = prepared.heads, select if select is not None else prepared.data
        menus = menus_of(heads, method, prepared.priced, unit="bytes")
        batches = judged(data) if data is not None and len(data) else []
        view = view_of(prepared.opened, prepared.network)
        names = [layer.name for layer in view.layers]
        if prices is not None and not batches:
            raise CommandError("lrcompress plan --max-ms", "data to run one request with", "none", "give --calib")
        request = one_request(batches) if batches else {}
        where = places(view, request, names) if batches else {}
        steps = input_steps(view, batches, names) if batches and 8 in bits else {}
        kinds = {layer.name: layer.kind for layer in prepared.layers}
        measured: dict[str, float] = {}
        factors: dict[str, float] = {}
        bench = None
        if measure and batches:
            network = copy_of(prepared.network)
            movable = [m for m in menus if m.layer.reason is None and m.layer.name not in prepared.ties]
            bench = Bench(Judge(prepared.opened, network, batches), network, movable, prepared.priced)
            factors, measured = sensitivities(bench, progress)
            menus = calibrated(menus, factors)
        noise = rounding_noise(menus, prepared, bits, steps, factors)
        refitted = 1.0
        if bench is not None:
            noise = measured_noise(bench, menus, noise, bits, kinds)
            if 4 in bits:
                refitted = won_by_refits(prepared, bench, menus, kinds, data)
                noise = {
                    n: {p: v * (refitted if p.bits == 4 else 1.0) for p, v in own.items()} for n, own in noise.items()
                }
        priced = _Pricing(prepared, where, prices)
        layers = [
            candidates_of(
                m, bits=bits, statistics=prepared.priced.get(m.layer.name), price=functools.partial(priced.ms, m.layer),
                noise=noise[m.layer.name], multiple=multiple,
                copies=len({kinds[n] == "embedding" for n in (m.layer.name, *prepared.ties.get(m.layer.name, ()))}),
            )
            for m in menus
        ]  # fmt: skip
        fixed = _fixed(prepared, heads, request, priced)
        return cls(prepared, menus, layers, fixed, prices, bench, kinds, measured, method, refitted)

    @property
    def unnoticed(self) -> float:
        """What a choice may lose before bytes are spent on losing less."""
        return 0.0 if self.bench is None else NOTICED * self.bench.judge.energy

    def uniform(self, precision: Precision) -> Chosen | None:
        """Return the dense network with all layers in one precision; None where a layer cannot be."""
        narrow = precision._replace(block=min(precision.block, BLOCK))  # what convolutions have instead
        found = [
            next((c for p in (precision, narrow) for c in own if c.form == "dense" and c.precision == p), None)
            for own in self.layers
        ]
        kept = [
            c or own[-1]
            for c, own, m in zip(found, self.layers, self.menus, strict=True)
            if c or not m.layer.may_be_rounded
        ]
        return Chosen.of(kept, self.fixed) if len(kept) == len(found) else None

    def chosen(self, limits: Limits) -> Chosen:
        """Return the best choice whose forms hold their weights, each checked by a measurement of its layer alone.

        What is refused is crossed out; what loses more than was predicted is dearer from then on, at every rank; then
        all is chosen anew, a fixed number of times at most.
        """
        layers = [list(own) for own in self.layers]
        known: set[tuple[int, str, Precision]] = set()
        for _ in range(_CHECKS):
            found = choose(layers, limits, self.fixed)
            changed = False
            for k, c in enumerate(found.candidates):
                changed |= self._corrected(k, c, layers, known)
            if not changed:
                return found
        return self._held(layers, limits)

    def _corrected(
        self, k: int, c: Candidate, layers: list[list[Candidate]], known: set[tuple[int, str, Precision]]
    ) -> bool:
        """Cross out what a form refuses, or raise the losses of a form and precision to what one of them was measured to lose."""
        layer = self.menus[k].layer
        if self.bench is None or layer.name not in self.bench.menus or (c.form == "dense" and c.bits >= 16):
            return False
        if self.bench.refuses(layer.name, _option(c)):
            layers[k] = [o for o in layers[k] if (o.form, o.rank) != (c.form, c.rank)]
            return True
        if (k, c.form, c.precision) in known:
            return False
        known.add((k, c.form, c.precision))
        loss = self._alone(layer.name, c)
        if loss is None or not math.isfinite(loss) or loss <= _TOLERATED * c.loss:
            return False
        ratio, more = (loss / c.loss, 0.0) if c.loss > 0 else (1.0, loss)
        layers[k] = [
            replace(o, loss=o.loss * ratio + more) if (o.form, o.precision) == (c.form, c.precision) else o
            for o in layers[k]
        ]  # fmt: skip
        return True

    def _alone(self, name: str, c: Candidate) -> float | None:
        """Measure what the network loses with this layer alone changed; what was measured serves other budgets, too."""
        assert self.bench is not None
        key = name, c.form, c.rank, c.precision
        if key not in self.known:
            one, changed = {name: _option(c)}, functools.partial(with_bits, bits={name: c.precision}, kinds=self.kinds)
            loss = self.bench.loss(one, changed=changed)
            if loss is not None and c.bits == 4:
                exact = 0.0 if c.form == "dense" else self.bench.loss(one) or 0.0
                loss = exact + self.refitted * max(loss - exact, 0.0)
            self.known[key] = loss
        return self.known[key]

    def _held(self, layers: list[list[Candidate]], limits: Limits) -> Chosen:
        """Return the best choice in which no form refuses its weight."""
        while True:
            found = choose(layers, limits, self.fixed)
            refused = [
                (k, c) for k, (m, c) in enumerate(zip(self.menus, found.candidates, strict=True))
                if self.bench is not None and self.bench.refuses(m.layer.name, _option(c))
            ]  # fmt: skip
            if not refused:
                return found
            for k, c in refused:
                layers[k] = [o for o in layers[k] if (o.form, o.rank) != (c.form, c.rank)]

    def loss(self, chosen: Chosen) -> float | None:
        """Measure what the network loses with these candidates, before anything makes up for drift."""
        if self.bench is None:
            return None
        options: dict[str, Option] = {}
        bits: dict[str, Precision] = {}
        by_name = {m.layer.name: c for m, c in zip(self.menus, chosen.candidates, strict=True)}
        for m, c in zip(self.menus, chosen.candidates, strict=True):
            if m.layer.name in self.prepared.ties and c.form != "dense":
                return None  # one set of factors in several places is not measured here
            if m.layer.may_be_rounded:
                bits[m.layer.name] = c.precision
                options[m.layer.name] = _option(c)
        found = self.bench.loss(options, changed=functools.partial(with_bits, bits=bits, kinds=self.kinds))
        if found is not None:  # few positions do not show what their own factors lose
            few = [c for n, c in by_name.items() if c.form != "dense" and not self.bench.seen_enough(n)]
            found = max(found, sum(c.loss for c in few))
        if found is not None and self.refitted < 1 and any(p.bits == 4 for p in bits.values()):
            finer = {n: p if p.bits != 4 else Precision(32) for n, p in bits.items()}
            exact = self.bench.loss(options, changed=functools.partial(with_bits, bits=finer, kinds=self.kinds)) or 0.0
            found = exact + self.refitted * max(found - exact, 0.0)
        return found if found is not None and math.isfinite(found) else None


def _is_less(a: Chosen, b: Chosen) -> bool:
    """Return whether a takes fewer bytes than b, and no more time."""
    return a.n_bytes < b.n_bytes and a.ms <= b.ms


def _option(c: Candidate) -> Option:
    return Option(c.n_params, c.loss, c.form, c.rank)


class _Pricing:
    """The ms of a form of a layer, in all the places that share its weight."""

    def __init__(self, prepared: Prepared, where: Mapping[str, Place], prices: Prices | None) -> None:
        self.prices, self._where = prices, where
        by_name = {layer.name: layer for layer in prepared.layers}
        self._members = {
            head.name: [by_name[n] for n in (head.name, *prepared.ties.get(head.name, ()))] for head in prepared.heads
        }

    def ms(self, layer: Layer, name: str, rank: Rank, bits: int) -> float | None:
        """Return the time of a layer as this form, 0 without prices; None where the form cannot be priced."""
        if self.prices is None:
            return 0.0
        total = 0.0
        for member in self._members[layer.name]:
            place = self._where.get(member.name)
            if place is None:
                continue  # the request never comes here
            steps = steps_of(name, member, rank, place)
            if steps is None:
                return None
            total += layer_ms(steps, member.kind, bits, self.prices)
        return total


def _fixed(prepared: Prepared, heads: Sequence[Layer], request: Mapping[str, Tensor], pricing: _Pricing) -> Fixed:
    """Return what remains of the dense graph without its layers; without a graph, the tensors that are no layer's."""
    own = sum(layer.weight.numel() * 4 + graph_bytes(layer) for layer in heads)
    opened = replace(prepared.opened, module=prepared.network)
    try:
        model, _ = simplify(trace(opened, prepared.network, where="lrcompress plan"))
        strip(model)
        graph = model.SerializeToString()
    except ModelError:
        if pricing.prices is not None:
            raise
        return Fixed(max(_tensor_bytes(prepared.network) - own, 0), 0.0)
    prices = pricing.prices
    if prices is None:
        return Fixed(max(len(graph) + _SLACK_BYTES - own, 0), 0.0)
    whole = total_ms(request_operators(graph, as_feeds(request), blocked=prices.table.blocked), prices)
    layers = sum(pricing.ms(layer, "dense", 0, 32) or 0.0 for layer in heads)
    return Fixed(max(len(graph) + _SLACK_BYTES - own, 0), max(whole - layers, prices.run_ms))


def _tensor_bytes(module: nn.Module) -> int:
    found = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in found.values())


def device_plan(market: Market, limits: Limits) -> RankPlan:
    """Return the plan that loses least within the limits. Raises `BudgetError` with the nearest that can be met."""
    found = market.chosen(limits)
    measured = market.loss(found)
    rows = []
    seen: list[tuple[Candidate, ...]] = []
    for p in precisions(BITS):
        uniform = market.uniform(p)
        if uniform is None or uniform.candidates in seen:
            continue
        seen.append(uniform.candidates)
        loss = market.loss(uniform) if p.bits != 32 else 0.0
        fits = uniform.fits(limits)
        rows.append(
            {"name": f"dense, {p}", "bytes": uniform.n_bytes, "ms": _ms(uniform.ms, market), "predicted_loss": _six(uniform.loss), "measured_loss": _six(loss), "fits": fits}
        )  # fmt: skip
        if not fits or loss is None or measured is None:
            continue
        if loss <= measured or (loss <= market.unnoticed and _is_less(uniform, found)):
            found, measured = replace(uniform, bound=found.bound, prices=found.prices), loss
    layers = [
        _planned(m, c, own, found.prices, market)
        for m, c, own in zip(market.menus, found.candidates, market.layers, strict=True)
    ]
    about = {
        "bytes": found.n_bytes, "ms": _ms(found.ms, market), "fixed": {"bytes": market.fixed.n_bytes, "ms": _ms(market.fixed.ms, market)},
        "threads": None if market.prices is None else market.prices.threads, "uniform": rows, "advice": advice(layers, rows, limits),
    }  # fmt: skip
    return RankPlan(
        market.prepared.opened.digest, limits.as_json(), tuple(layers), market.method, found.loss, measured,
        min(found.bound, found.loss), about,
    )  # fmt: skip


def _planned(m: Menu, c: Candidate, own: Sequence[Candidate], prices: tuple[float, float], market: Market) -> Planned:
    """Return the row of a layer with the best alternative of every other form and precision."""
    layer = m.layer
    if c.form == "dense":
        kept = layer.reason or (
            "its bytes and milliseconds are worth more than those of other layers"
            if len(own) > 1
            else "would not shrink"
        )
        choice = dense(layer, kept)
    else:
        choice = Choice(layer.name, c.form, c.rank, c.n_params)

    def total(o: Candidate) -> float:
        return o.loss + prices[0] * o.n_bytes + prices[1] * o.ms

    best: dict[tuple[str, int], Candidate] = {}
    for o in own:
        key = o.form, o.bits
        if key != (c.form, c.bits) and (key not in best or total(o) < total(best[key])):
            best[key] = o
    nearest = sorted(best.values(), key=lambda o: (total(o), o.n_bytes))[:6]
    rejected = tuple(Rejected(o.form, o.rank, o.bits, why(o, c, total(o) - total(c))) for o in nearest)
    ms = _ms(c.ms, market)
    return Planned(choice, c.bits, c.n_bytes, c.loss, market.measured.get(layer.name), ms, rejected, c.block)


def _ms(value: float, market: Market) -> float | None:
    return None if market.prices is None else float(f"{value:.5g}")


def _six(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
