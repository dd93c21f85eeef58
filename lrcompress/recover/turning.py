"""Turn fresh adapters along the gradient of the loss, before they are trained.

A fresh adapter is ΔW = B·A with B zero and A random, and its first steps follow the gradient G only as far as A sees it:
of rank 1 on a layer of n inputs an n-th of it, as a rule. Here A becomes the strongest right singular vectors of G, as
long as it was: ΔW is still zero, nothing is taken out of the base, and the first step of B goes where one of this rank
is worth most. G is seen through an adapter of more directions that takes the place of each for a few batches.

A LoKr that starts as the nearest Kronecker product of G is worse for it (ResNet-20 on noise, 1 and 4 kB, n = 5,000: 0.620
and 0.761, from a random start 0.683 and 0.773) and is left as it is.

Source: Wang et al., arXiv 2407.05000 (LoRA-GA), who start both sides along G and correct the base for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..adapt import BaseAdapter
from ..adapt.core import Adapter as Core
from ..adapt.lora import Adapter as LoRA
from ..model.layers import FactorizedLayer
from .training import Training

#: Batches that the gradient is looked at with, at most, and the part of a run that this may take.
_BATCHES, _SHARE = 8, 0.1
#: Directions that a weight's gradient is seen along.
_SEEN = 32


def turn(training: Training, module: nn.Module, adapters: Mapping[str, BaseAdapter]) -> None:
    """Turn those of the adapters of `module`, {layer: adapter}, that are fresh and have a side to turn."""
    fresh = {
        n: a
        for n, a in adapters.items()
        if a.random_side is not None and any(not bool(p.any()) for p in a.parameters())
    }
    if not fresh:
        return
    for layer, gradient in _gradients(training, module, fresh).items():
        if bool(torch.isfinite(gradient).all()) and bool(gradient.any()):
            side = fresh[layer].random_side
            assert side is not None
            _point(side, gradient)


def _point(side: nn.Parameter, gradient: Tensor) -> None:
    """Let the rows of a random side be the strongest right singular vectors of a gradient (…, m, n), as long as they were."""
    rows = side.detach().reshape(*gradient.shape[:-2], -1, gradient.shape[-1]).clone()
    strongest = torch.linalg.svd(gradient.double(), full_matrices=False)[2][..., : rows.shape[-2], :]
    rows[..., : strongest.shape[-2], :] = rows.norm(dim=-1).mean() * strongest.to(rows)
    with torch.no_grad():
        side.copy_(rows.view_as(side))


def _gradients(training: Training, module: nn.Module, adapters: Mapping[str, BaseAdapter]) -> dict[str, Tensor]:
    """Return the strongest part of the gradient by each layer's weight, in a basis of its own, or by its core's matrix."""
    generator = torch.Generator().manual_seed(training.settings.seed)
    probes = {n: _probe(a, generator).to(training.world.device) for n, a in adapters.items()}
    parameters = [p for probe in probes.values() for p in probe.parameters()]
    plain = {n: p for n, p in probes.items() if isinstance(p, LoRA)}
    found: dict[str, Tensor] = {}
    with _in_place(module, adapters, probes):
        batches = _batches(training, parameters, passes=2 if plain else 1)
        training.gradients(batches, parameters, name="the first batches")
        for name, probe in probes.items():
            if isinstance(probe, Core) and (seen := next(probe.parameters()).grad) is not None:
                found[name] = seen
        if not plain:
            return found
        with torch.no_grad():
            for p in plain.values():
                if p.lora_B.grad is not None:  # what the random directions saw of the gradient's range
                    p.lora_B.copy_(torch.linalg.qr(p.lora_B.grad.flatten(1).double())[0].view_as(p.lora_B))
                p.lora_A.zero_()
        training.gradients(batches, parameters, name="the first batches")
        for name, p in plain.items():
            if p.lora_A.grad is not None:
                found[name] = p.lora_A.grad.flatten(1)
    return found


def _probe(adapter: BaseAdapter, generator: torch.Generator) -> BaseAdapter:
    """Return an adapter of the same place at ΔW = 0: the whole core, or LoRA of many directions."""
    shape = adapter.weight_shape
    if isinstance(adapter, Core):
        whole = Core(shape, adapter.core, groups=adapter.groups, core=adapter.core, layer_kind=adapter.layer_kind)
        whole.metric = adapter.metric
        return whole
    rank = LoRA.rank_for(adapter.target, _SEEN)
    return LoRA(shape, rank, generator=generator, layer_kind=adapter.layer_kind)


@contextlib.contextmanager
def _in_place(
    module: nn.Module, adapters: Mapping[str, BaseAdapter], probes: Mapping[str, BaseAdapter]
) -> Iterator[None]:
    """Let the probes stand where the adapters are."""
    places: dict[str, tuple[nn.ModuleDict, str]] = {}
    for layer, adapter in adapters.items():
        wrapped = module.get_submodule(layer)
        assert isinstance(wrapped, FactorizedLayer)
        places[layer] = wrapped.adapters, next(n for n, a in wrapped.adapters.items() if a is adapter)
    for layer, (holder, name) in places.items():
        holder[name] = probes[layer]
    try:
        yield
    finally:
        for layer, (holder, name) in places.items():
            holder[name] = adapters[layer]


def _batches(training: Training, parameters: list[nn.Parameter], *, passes: int) -> list[np.ndarray]:
    """Return the batches to look at, so few that all passes are a small part of a run."""
    s, most = training.settings, _BATCHES
    first: list[np.ndarray] = list(training.order.epoch(0)[:_BATCHES])
    if s.most_steps is not None:
        most = min(most, int(_SHARE * s.most_steps / passes))
    if s.max_seconds is not None:
        before = time.perf_counter()
        training.gradients(first[:1], parameters, name="the first batches")
        seconds = training.world.from_first(max(time.perf_counter() - before, 1e-6))
        most = min(most, int(_SHARE * s.max_seconds / passes / seconds))
    return first[: max(1, most)]


__all__ = ["turn"]
