"""Bake an adapter into a factorized network: exact, with as few extra numbers as the form allows."""

from __future__ import annotations

import torch
from torch import nn

from ..adapt import BaseAdapter
from ..adapt import adapter as make_adapter
from ..adapt._files import AdapterFolder
from ..errors import ModelError
from ..model.adapting import merge_core
from ..model.layers import FactorizedLayer
from ..model.surgery import wrap_dense


def merge_adapter(module: nn.Module, folder: AdapterFolder) -> None:
    """Merge `folder` into `module`, in place, by whatever stores the fewest numbers.

    A dense layer takes ΔW. Factors take the exact expansion B·A: U V as more rank, [U B][V; A], other forms as a
    branch of constants. Where that is more than the dense weight, the layer becomes dense. A core goes into the
    factors. Nothing is merged unless every layer fits.
    """
    layers = {}
    for name, adapter in folder.adapters.items():
        try:
            layer = layers[name] = wrap_dense(module, name)
        except AttributeError as e:
            raise ModelError(f"{folder.path}: layer {name}", "a layer of this model", "none of that name") from e
        if adapter.weight_shape != layer.shape:
            raise ModelError(f"{folder.path}: layer {name}", f"shape {layer.shape}", adapter.weight_shape)
        if adapter.in_core and adapter.core != layer.target.core:
            raise ModelError(f"{folder.path}: layer {name}", f"a core of {adapter.core}", layer.target.core)
    with torch.no_grad():
        for name, adapter in folder.adapters.items():
            merge_into(layers[name], adapter)


def merge_into(layer: FactorizedLayer, adapter: BaseAdapter, weight: float = 1.0) -> None:
    """Merge `weight` times an adapter into one layer, for good. `ModelError` where the result is not finite."""
    if not torch.isfinite(adapter.delta_weight(layer)).all():
        raise ModelError("merge", "a finite correction", "NaN or infinity", "check the adapter")
    if adapter.in_core:
        merge_core(layer, adapter, weight)
    elif adapter.magnitude is not None or layer.layer_kind not in ("linear", "conv") or layer.target.groups > 1:
        layer.become_dense(layer.weight + weight * adapter.delta_weight(layer).to(layer.weight.dtype))
    else:
        _merge(layer, adapter, weight)


def _merge(layer: FactorizedLayer, adapter: BaseAdapter, weight: float) -> None:
    a, b = adapter.expand()
    b = weight * b if weight != 1.0 else b
    factors = sum(f.numel() for f in layer.factors.values())
    if layer.form == "dense" or factors + a.numel() + b.numel() >= layer.weight.numel():
        layer.become_dense(layer.weight + weight * adapter.delta_weight().to(layer.weight.dtype))
    elif layer.form == "svd":
        u, v = layer.factors["U"], layer.factors["V"]
        layer._parameters["U"] = nn.Parameter(torch.cat([u, b.to(u.dtype)], 1))
        longer = nn.Parameter(torch.cat([v, a.to(v.dtype).reshape(-1, *v.shape[1:])], 0))
        layer._parameters["V"], layer.rank = longer, longer.shape[0]
    else:
        branch = make_adapter("lora", weight_shape=layer.shape, rank=a.shape[0])
        branch.load({"lora_A": a, "lora_B": b.reshape(*b.shape, *(1,) * (len(layer.shape) - 2))})
        layer.add_adapter("merged", branch)
