"""What `plan` and `factorize` share: prepare a network with its statistics, choose under a budget, and say so.

prepared = prepare(opened, include=(), exclude=(), calib=data, seed=0, compute="cpu", cache=True, progress=…)
plan = plan_within(prepared, budget_of(prepared, ratio=0.5), method="auto", progress=…)
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..data import Data
from ..factorize import Statistics
from ..files import sha256_json
from ..fit import Bench, Judge, calibrated, jointly, read_batches, search, sensitivities
from ..model import OpenedModel, tensors_of
from ..model.folding import fold_norms
from ..model.surgery import Layer, count_parameters
from ..model.ties import lift_ties
from ..plan import Budget, Choice, RankPlan, chosen, menus_of, ratio_budget, within
from ..progress import Progress
from .sources import for_model, is_kept, layers_of, statistics_of, with_inputs
from .tied import Ties, spread, weighed

#: Samples that single layers and swaps are measured on.
_JUDGED = 128
_BATCH = 64


@dataclass(frozen=True)
class Prepared:
    """A network ready to be planned for.

    `network`: the module with normalizations folded into its layers (`folded`), a copy where that changed it; `data`:
    what calibrated it, None where nothing did or where kept statistics were given; `total`: numbers of the original.
    """

    opened: OpenedModel
    network: nn.Module
    layers: Sequence[Layer]
    ties: Ties
    statistics: Mapping[str, Statistics]
    priced: Mapping[str, Statistics]
    data: Data | None
    folded: Mapping[str, str]
    total: int

    @property
    def heads(self) -> list[Layer]:
        """The layers that are chosen for: of tied ones the first."""
        followers = {n for names in self.ties.values() for n in names}
        return [layer for layer in self.layers if layer.name not in followers]


def prepare(
    opened: OpenedModel,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    calib: str | Path | Data | None,
    seed: int,
    compute: str,
    cache: bool,
    progress: Progress,
    fold: bool = True,
    verb: str = "factorize",
) -> Prepared:
    """Return a network with its layers and, with `calib`, their statistics. Raises `ModelError`, `DataError`."""
    assert opened.module is not None
    total = count_parameters(opened.module)
    layers, ties = lift_ties(opened.module, layers_of(opened, include, exclude, verb=verb))
    if calib is None:
        return Prepared(opened, opened.module, layers, ties, {}, {}, None, {}, total)
    opened = with_inputs(opened, calib)
    data = None if is_kept(calib) else for_model(calib, opened)
    collected = functools.partial(statistics_of, seed=seed, compute=compute, cache=cache, progress=progress)
    folded: dict[str, str] = {}
    network = opened.module
    assert network is not None
    if fold and data is not None and len(data):
        network, folded = _folded(opened, layers, data)
    if folded:
        changed = replace(opened, module=network, digest=sha256_json([opened.digest, folded]))
        layers, ties = lift_ties(network, layers_of(changed, include, exclude, verb=verb))
        statistics = collected(changed, layers, data if data is not None else calib)
    else:
        statistics = collected(opened, layers, calib if data is None else data)
    return Prepared(opened, network, layers, ties, statistics, weighed(layers, ties, statistics), data, folded, total)


def _folded(opened: OpenedModel, layers: Sequence[Layer], data: Data) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy with normalizations folded, and which; the module itself where there are none."""
    assert opened.module is not None
    if opened.kind in ("pt2", "torchscript"):  # their normalizations are calls of a graph
        return opened.module, {}
    network = copy_of(opened.module)
    few = tensors_of(next(iter(data.take(slice(0, 2)).batches(2))).inputs)
    try:
        folded = fold_norms(opened, network, few, {layer.name: layer for layer in layers})
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return opened.module, {}  # the network cannot run these data: calibration says why
    return (network, folded) if folded else (opened.module, {})


def budget_of(
    prepared: Prepared, *, ratio: float | None = None, max_params: int | None = None, max_bytes: int | None = None
) -> Budget:
    """Return the budget that one of these is; bytes are those of all tensors of the network."""
    heads = prepared.heads
    own = sum(layer.weight.numel() for layer in heads)
    fixed = count_parameters(prepared.network) - own
    if ratio is not None:
        return ratio_budget(heads, ratio, fixed, prepared.total)
    if max_params is not None:
        return Budget("params", max_params, fixed, "--max-params", max_params, prepared.total)
    assert max_bytes is not None
    whole = _bytes_of(prepared.network)
    kept = whole - sum(layer.weight.numel() * layer.weight.element_size() for layer in heads)
    return Budget("bytes", max_bytes, kept, "--max-bytes", max_bytes, whole)


def _bytes_of(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, tied ones once."""
    found: dict[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in found.values())


def plan_within(
    prepared: Prepared,
    budget: Budget,
    *,
    method: str,
    multiple: int = 1,
    measure: bool = True,
    select: Data | None = None,
    progress: Progress,
) -> RankPlan:
    """Choose form and rank of every layer within a budget.

    With data, `measure` calibrates the error of each layer by the answer's loss on `select` (calibration data where
    there are none) and searches for swaps that pay. Raises `BudgetError` with the nearest budget that can be met.
    """
    heads = prepared.heads
    menus = menus_of(heads, method, prepared.priced, unit=budget.unit, multiple=multiple)
    allocation = within(menus, budget)
    measured: dict[str, float] = {}
    joint = None
    data = select if select is not None else prepared.data
    if measure and data is not None and len(data):
        network = copy_of(prepared.network)
        judge = Judge(prepared.opened, network, judged(data))
        movable = [m for m in menus if m.layer.reason is None and m.layer.name not in prepared.ties]
        bench = Bench(judge, network, movable, prepared.priced)
        factors, measured = sensitivities(bench, progress)
        menus = calibrated(menus, factors)
        allocation = within(menus, budget)
        tied = [m for m in menus if m.layer.name in prepared.ties and m.layer.reason is None]
        if not tied:
            found = search(bench, menus, allocation, budget.limit - budget.fixed, budget.unit, progress=progress)
            allocation, joint = jointly(allocation, found, budget.unit), found.loss
    choices = chosen(menus, allocation.chosen)
    return RankPlan.of(
        menus, choices, allocation, budget, model_digest=prepared.opened.digest, method=method, measured=measured,
        measured_loss=joint if joint is None or math.isfinite(joint) else None,
    )  # fmt: skip


def judged(data: Data) -> list[Mapping[str, Tensor]]:
    """Return evenly spread samples, in batches, on which networks are compared."""
    count = min(_JUDGED, len(data))
    return read_batches(data.take(np.linspace(0, len(data) - 1, count).round().astype(np.int64)), _BATCH)


def spread_over(prepared: Prepared, choices: Sequence[Choice]) -> list[Choice]:
    """Return one choice per layer: tied ones become what their first does."""
    return spread(prepared.layers, prepared.ties, {c.name: c for c in choices})


def copy_of(module: nn.Module) -> nn.Module:
    """Copy a module; a weight that a hook computes is copied as the number it is now."""
    computed = [t for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in computed})
