"""Bake an adapter into a factorized network: exact, with as few extra numbers as the form allows."""

from __future__ import annotations

import torch
from torch import nn

from ..adapt import BaseAdapter
from ..adapt import adapter as make_adapter
from ..adapt._files import AdapterFolder
from ..errors import ModelError
from ..model.layers import FactorizedLayer
from ..model.surgery import wrap_dense


def merge_adapter(module: nn.Module, folder: AdapterFolder) -> None:
    """Merge `folder` into `module`, in place, by whatever stores the fewest numbers.

    A dense layer takes ΔW. Factors take the exact expansion B·A: U V as more rank, [U B][V; A], other forms as a
    branch of constants. Where that is more than the dense weight, the layer becomes dense.
    """
    for name, adapter in folder.adapters.items():
        try:
            layer = wrap_dense(module, name)
        except AttributeError as e:
            raise ModelError(f"{folder.path}: layer {name}", "a layer of this model", "none of that name") from e
        if adapter.weight_shape != layer.shape:
            raise ModelError(f"{folder.path}: layer {name}", f"shape {layer.shape}", adapter.weight_shape)
        with torch.no_grad():
            _merge(layer, adapter)


def _merge(layer: FactorizedLayer, adapter: BaseAdapter) -> None:
    a, b = adapter.expand()
    factors = sum(f.numel() for f in layer.factors.values())
    if layer.form == "dense" or factors + a.numel() + b.numel() >= layer.weight.numel():
        layer.become_dense(layer.weight + adapter.delta_weight().to(layer.weight.dtype))
    elif layer.form == "svd":
        u, v = layer.factors["U"], layer.factors["V"]
        layer._parameters["U"] = nn.Parameter(torch.cat([u, b.to(u.dtype)], 1))
        longer = nn.Parameter(torch.cat([v, a.to(v.dtype).reshape(-1, *v.shape[1:])], 0))
        layer._parameters["V"], layer.rank = longer, longer.shape[0]
    else:
        branch = make_adapter("lora", weight_shape=layer.shape, rank=a.shape[0])
        branch.load({"lora_A.weight": a, "lora_B.weight": b.reshape(*b.shape, *(1,) * (len(layer.shape) - 2))})
        layer.add_adapter("merged", branch)
