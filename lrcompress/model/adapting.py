"""Adapters on a network: which layers take them, fresh ones of a kind, merging and taking back, bit for bit.

    layers = every_target(model)                       # {path: Target}, embeddings and grouped layers too
    attach(model, "a", lambda name, _: fresh("lora", wrap_dense(model, name).target, 8, generator=g), list(layers))
    merge(model)                                       # the active adapters, into the weights
    unmerge(model)                                     # the stored base again: never a subtraction

Per layer, ranks and alphas come from patterns: the first fnmatch pattern that fits a path decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from ..adapt import BaseAdapter, Target, adapter, adapter_class
from ..adapt.core import Adapter as Core
from .layers import FactorizedLayer
from .surgery import DEPTHWISE, factorized_layers, find_layers, wrap_dense

_T = TypeVar("_T")
_KEPT = "_before_merge"


def every_target(model: nn.Module) -> dict[str, Target]:
    """Return all layers that can carry an adapter, in the model's order, wrapping none of them.

    Factorized layers, and plain linear, convolution (grouped, depthwise, transposed), and embedding layers whose
    weight is their own: a tied, computed, non-finite or integer one takes none.
    """
    reasons = {layer.name: layer.reason or "" for layer in find_layers(model)}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            found[name] = module.target
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            if "weight" in module._parameters and uses[id(module.weight)] == 1 and module.weight.is_floating_point():
                found[name] = plain_target(module)
        elif name in reasons and (not reasons[name] or reasons[name] == DEPTHWISE):
            found[name] = plain_target(module)
    return found


def plain_target(module: nn.Module) -> Target:
    """Return the target that a plain layer of torch would be, without wrapping it."""
    holder = nn.ModuleDict({"layer": module})
    return wrap_dense(holder, "layer").target


def layer_target(model: nn.Module, name: str) -> Target:
    """Return the target of the layer called `name`, wrapped or not."""
    module = model.get_submodule(name)
    return module.target if isinstance(module, FactorizedLayer) else plain_target(module)


def takes(kind: str, target: Target) -> bool:
    """Tell whether an adapter of this kind has a place on the layer."""
    return target.core > 0 if adapter_class(kind).in_core else True


def fresh(
    kind: str,
    target: Target,
    rank: int,
    alpha: float | None = None,
    *,
    generator: torch.Generator | None = None,
    rslora: bool = False,
    **options: Any,
) -> BaseAdapter:
    """Return a fresh adapter for a layer; a rank above the layer's own is cut, the scaling stays what was asked for."""
    own = adapter_class(kind).rank_for(target, rank)
    power = 0.5 if rslora else 1.0
    scaled = None if alpha is None else alpha * (own / rank) ** power
    return adapter(
        kind, weight_shape=target.shape, rank=own, alpha=scaled, generator=generator,
        groups=target.groups, core=target.core, layer_kind=target.kind, rslora=rslora, **options,
    )  # fmt: skip


def by_pattern(name: str, patterns: Mapping[str, _T], default: _T) -> _T:
    """Return the value of the first fnmatch pattern that fits the path `name`."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), default)


def merge(model: nn.Module) -> list[str]:
    """Merge the active adapters of every layer into its weight, in place; return the layers that had any.

    The base is set aside as it is, so `unmerge` brings back the same parameters. `ValueError` for a merged weight
    that is not finite: nothing is changed then.
    """
    layers = [(n, m) for n, m in factorized_layers(model) if m.active and not hasattr(m, _KEPT)]
    with torch.no_grad():
        merged = {name: layer.merged_weight() for name, layer in layers}
    for name, weight in merged.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"layer {name}: expected finite merged weights")
    for name, layer in layers:
        kept = {n: layer._parameters.get(n, layer._buffers.get(n)) for n in layer.factor_names}
        order = (tuple(layer._parameters), tuple(layer._buffers))
        state = (layer.form, layer.rank, layer.factor_names, kept, dict(layer.active), order)
        layer.become_dense(merged[name])
        layer.active = {}
        object.__setattr__(layer, _KEPT, state)
    return [name for name, _ in layers]


def unmerge(model: nn.Module) -> list[str]:
    """Put back what `merge` set aside: the same tensors, and the same adapters active; return the layers."""
    found = []
    for name, layer in factorized_layers(model):
        state = layer.__dict__.pop(_KEPT, None)
        if state is None:
            continue
        layer._parameters.pop("weight")
        layer.form, layer.rank, layer.factor_names, kept, layer.active, order = state
        stored = {**layer._parameters, **layer._buffers, **kept}
        layer._parameters, layer._buffers = ({n: stored[n] for n in names} for names in order)
        found.append(name)
    return found


def merge_core(layer: FactorizedLayer, adapter: BaseAdapter, weight: float = 1.0) -> None:
    """Multiply I + R into the factors of `layer`: exact, and not one number more."""
    assert isinstance(adapter, Core)
    factors = layer.factors
    for name, value in adapter.moved(layer, weight).items():
        if value is not factors[name]:  # the others stay the tensors they are: layers may share them
            layer._parameters[name] = nn.Parameter(value.detach())
