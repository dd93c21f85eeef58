"""Rows written from formulas, weights to factors, all with uncentred moments and no change of any bias.

SVD and ASVD scale the weight and truncate; SVD-LLM, V2, BALF and LEMS truncate in the metric of input moments, which
is the package's own SVD form; AA-SVD is its anchored form with β = 1; Tucker-2 is its HOOI.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrcompress.factorize import Factorization, Statistics, anchored, form
from lrcompress.model.surgery import Layer, replace_layer

from . import drift, ranks
from .networks import Network

#: The exponent of ASVD, arXiv 2312.05821.
ALPHA = 0.5
#: Ranks that LEMS prices, as shares of the break-even rank.
_LEMS_SHARES = np.arange(1, 33) / 32


@dataclass(frozen=True)
class Made:
    """A compressed network and what a row should say about it."""

    module: nn.Module
    notes: str = ""


@dataclass(frozen=True)
class Damped(Statistics):
    """Moments with the damping that LEMS prescribes: 0.1 on the inputs, 0.7 (vision) on the outputs."""

    INPUT_DAMPING = 0.1
    OUTPUT_DAMPING = 0.7


@dataclass(frozen=True)
class DampedText(Damped):
    """The same for language: 0.3 on the outputs."""

    OUTPUT_DAMPING = 0.3


def scaled_svd(weight: Tensor, scale: Tensor, rank: int) -> Factorization:
    """Return the rank-`rank` SVD of W diag(scale), with the scale divided out of V again.

    `weight`: (out, in, *k), `scale`: (in·kernel,), positive. Source: ASVD, arXiv 2312.05821, equation 6.
    """
    flat = weight.reshape(len(weight), -1).double()
    p, d, q = torch.linalg.svd(flat * scale, full_matrices=False)
    factors = {"U": p[:, :rank] * d[:rank], "V": (q[:rank] / scale).reshape(rank, *weight.shape[1:])}
    return Factorization.of("svd", factors, weight, rank)


def cholesky_svd(weight: Tensor, moment: Tensor, rank: int) -> Factorization:
    """Return the SVD of W L cut at `rank` and freed of L again, moment = L Lᵀ: SVD-LLM as it is published.

    Source: arXiv 2403.07378, algorithm 1. The package reaches the same product without an inverse (the test says so).
    """
    flat, root = weight.reshape(len(weight), -1).double(), torch.linalg.cholesky(moment.double())
    p, d, q = torch.linalg.svd(flat @ root, full_matrices=False)
    v = torch.linalg.solve_triangular(root, q[:rank], upper=False, left=False)
    return Factorization.of("svd", {"U": p[:, :rank] * d[:rank], "V": v.reshape(rank, *weight.shape[1:])}, weight, rank)


def shapes(network: Network) -> list[ranks.Shape]:
    return [(layer.shape[0], math.prod(layer.shape[1:])) for layer in network.layers]


def spread(network: Network, kept: float, rule: Callable[[list[int], int], ranks.Ranks]) -> ranks.Ranks:
    """Return the ranks of `rule` (layers by number, their budget); the first convolution and the classifier stay dense."""
    spared = [i for i, layer in enumerate(network.layers) if layer.name in network.profile.spared]
    core = [i for i in range(len(network.layers)) if i not in spared]
    found: ranks.Ranks = [None] * len(network.layers)
    left = network.budget(kept) - sum(network.layers[i].weight.numel() for i in spared)
    for i, rank in zip(core, rule(core, left), strict=True):
        found[i] = rank
    return found


def uniform(network: Network, kept: float) -> ranks.Ranks:
    """Return the ranks of one share."""
    sides = shapes(network)
    return spread(network, kept, lambda core, budget: ranks.uniform([sides[i] for i in core], budget))


def placed(network: Network, found: Sequence[Factorization | None]) -> nn.Module:
    """Return a copy of the network with the factors in place; None leaves a layer as it is."""
    module = copy.deepcopy(network.module)
    for layer, factors in zip(network.layers, found, strict=True):
        if factors is not None:
            replace_layer(module, layer.name, factors)
    return module


def svd(network: Network, kept: float) -> Made:
    """Truncate the weights alone, one share for all layers."""
    chosen = uniform(network, kept)
    return Made(placed(network, [_cut(n, r, None) for n, r in zip(network.layers, chosen, strict=True)]))


def _cut(layer: Layer, rank: int | None, statistics: Statistics | None) -> Factorization | None:
    if rank is None:
        return None
    found: Factorization = form("svd").decompose(layer.weight, rank, statistics)
    return found


def asvd(network: Network, kept: float) -> Made:
    """Scale input channels by E|x|^α before truncating."""
    chosen, magnitudes = uniform(network, kept), drift.mean_magnitudes(network)
    found = []
    for layer, rank in zip(network.layers, chosen, strict=True):
        scale = magnitudes[layer.name].clamp_min(1e-6 * float(magnitudes[layer.name].max())) ** ALPHA
        found.append(None if rank is None else scaled_svd(layer.weight, scale, rank))
    return Made(placed(network, found))


def svd_llm(network: Network, kept: float) -> Made:
    """Whiten by the input moments, one share for all layers."""
    chosen, metric = uniform(network, kept), _whitening(network)
    return Made(placed(network, [_cut(n, r, metric[n.name]) for n, r in zip(network.layers, chosen, strict=True)]))


def _whitening(network: Network) -> dict[str, Statistics]:
    return {n: drift.uncentred(s) for n, s in drift.moments(network).items()}


def svd_llm_v2(network: Network, kept: float) -> Made:
    """Whiten, and remove within each type of layer in proportion to 1 / log of its truncation loss."""
    metric, sides, losses = _whitening(network), shapes(network), []
    for layer, rank in zip(network.layers, uniform(network, kept), strict=True):
        values = _spectrum(layer, metric[layer.name])
        tail = float(values[len(values) if rank is None else rank :].sum())
        # The published loss is the norm over all calibration rows, not their mean.
        losses.append(math.sqrt(tail * metric[layer.name].count))
    types = [_type(layer) for layer in network.layers]

    def rule(core: list[int], budget: int) -> ranks.Ranks:
        return ranks.inverse_log([sides[i] for i in core], [types[i] for i in core], [losses[i] for i in core], budget)

    chosen = spread(network, kept, rule)
    return Made(placed(network, [_cut(n, r, metric[n.name]) for n, r in zip(network.layers, chosen, strict=True)]))


def _type(layer: Layer) -> str:
    """Return what makes layers alike: the last words of a transformer's name, the shape of a convolution."""
    return str(layer.shape) if layer.kind == "conv" else ".".join(layer.name.split(".")[-2:])


def _spectrum(layer: Layer, metric: Statistics) -> np.ndarray:
    values: Tensor = form("svd").spectrum(layer.weight, metric)
    return np.asarray(values.numpy())


def balf(network: Network, kept: float) -> Made:
    """Whiten, and spread the budget by a Lagrangian on each layer's normalised energy."""
    metric = _whitening(network)
    spectra = [_spectrum(layer, metric[layer.name]) for layer in network.layers]
    chosen = ranks.lagrangian(shapes(network), spectra, network.budget(kept))
    return Made(placed(network, [_cut(n, r, metric[n.name]) for n, r in zip(network.layers, chosen, strict=True)]))


def aa_svd(network: Network, kept: float) -> Made:
    """Fit every layer, in depth order, to its clean output on the inputs that the compressed prefix delivers."""
    chosen = dict(zip([n.name for n in network.layers], uniform(network, kept), strict=True))
    by_name, module = {n.name: n for n in network.layers}, copy.deepcopy(network.module)
    for names in drift.same_input(network):
        moved = drift.paired(network, module, names[0])
        for name in names:
            rank = chosen[name]
            if rank is not None:
                replace_layer(module, name, anchored("svd", by_name[name].weight, rank, moved.of(by_name[name].weight)))
    return Made(module)


def lems(network: Network, kept: float, *, squared: bool = False) -> Made:
    """Truncate in the two-sided metric; one measured KL per layer scales its error curve, a knapsack spends the budget."""
    damped = Damped if network.profile.metric == "accuracy" else DampedText
    metric = {n: _as(damped, drift.uncentred(s)) for n, s in drift.moments(network, gradients=True).items()}
    loss, options = drift.harm(network, squared=squared), []
    for layer, sides in zip(network.layers, shapes(network), strict=True):
        values = _spectrum(layer, metric[layer.name])
        tails = values.sum() - values.cumsum()
        reference = ranks.at_share(sides, 0.5)
        factor = 0.0
        if reference is not None and tails[reference - 1] > 0:
            changed = copy.deepcopy(network.module)
            replace_layer(changed, layer.name, form("svd").decompose(layer.weight, reference, metric[layer.name]))
            factor = loss(changed) / float(tails[reference - 1])
        offered = sorted({r for s in _LEMS_SHARES if (r := ranks.at_share(sides, float(s) * 0.999)) is not None})
        options.append(
            [ranks.Option(ranks.cost(sides, r), factor * float(tails[r - 1]), r) for r in offered]
            + [ranks.Option(ranks.dense_cost(sides), 0.0, None)]
        )
    chosen = [o.rank for o in ranks.knapsack(options, network.budget(kept))]
    return Made(placed(network, [_cut(n, r, metric[n.name]) for n, r in zip(network.layers, chosen, strict=True)]))


def lems_squared(network: Network, kept: float) -> Made:
    """Measure squared logits instead: the KL of a classifier that is sure of its training images says next to nothing."""
    return lems(network, kept, squared=True)


def _as(kind: type[Statistics], statistics: Statistics) -> Statistics:
    values: dict[str, Any] = {k: getattr(statistics, k) for k in ("gram", "mean", "output_gram", "count", "positions")}
    return replace(kind(), **values)


def tucker2(network: Network, kept: float) -> Made:
    """Decompose the convolutions' weights alone, both ranks at one share of the full ones."""
    budget, spared = network.budget(kept), network.profile.spared

    def stored(share: float) -> int:
        return sum(_tucker_cost(n, _pair(n, share, spared)) for n in network.layers)

    if stored(0.0) > budget:
        raise ValueError(f"even Tucker ranks of 1 leave {stored(0.0)} numbers, more than {budget}")
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(middle) <= budget else (low, middle)
    return Made(placed(network, [_tucker(n, _pair(n, low, spared)) for n in network.layers]))


def tucker2_evbmf(network: Network, kept: float) -> Made:
    """Let empirical variational Bayes choose both ranks of every convolution; it reaches what ratio it reaches.

    Source: Kim et al., arXiv 1511.06530.
    """
    del kept  # the noise model decides
    found = []
    for layer in network.layers:
        unfoldings = [layer.weight.movedim(axis, 0).flatten(1).numpy() for axis in (0, 1)]
        pair = tuple(max(1, ranks.evbmf_rank(u)) for u in unfoldings)
        found.append(_tucker(layer, pair if len(layer.shape) > 2 else None))
    return Made(placed(network, found))


def _pair(layer: Layer, share: float, spared: Sequence[str]) -> tuple[int, int] | None:
    """Return ranks (out, in) at a share of the channels; None for what is no convolution or would not shrink."""
    if len(layer.shape) < 3 or layer.name in spared:
        return None
    pair = max(1, round(share * layer.shape[0])), max(1, round(share * layer.shape[1]))
    return pair if form("tucker").n_params(layer.shape, pair) < layer.weight.numel() else None


def _tucker_cost(layer: Layer, pair: tuple[int, int] | None) -> int:
    return layer.weight.numel() if pair is None else int(form("tucker").n_params(layer.shape, pair))


def _tucker(layer: Layer, pair: Any) -> Factorization | None:
    if pair is None or _tucker_cost(layer, pair) >= layer.weight.numel():
        return None
    found: Factorization = form("tucker").decompose(layer.weight, pair)
    return found
