"""Bake an adapter into a factorized network: exact, with as few extra numbers as the form allows."""

from __future__ import annotations

import torch
from torch import nn

from ..adapt._files import AdapterFolder
from ..errors import ModelError
from ..model.layers import FactorizedLayer
from ..model.surgery import wrap_dense


def merge_adapter(module: nn.Module, folder: AdapterFolder) -> None:
    """Merge `folder` into `module`, in place.

    Dense layers take ΔW; U V takes the expansion as more rank, [U B][V; A], unless that is more than a dense layer;
    other forms keep it as a branch of constants beside the factors.
    """
    for name, adapter in folder.adapters.items():
        try:
            layer = wrap_dense(module, name)
        except AttributeError as e:
            raise ModelError(f"{folder.path}: layer {name}", "a layer of this model", "none of that name") from e
        if adapter.weight_shape != layer.shape:
            raise ModelError(f"{folder.path}: layer {name}", f"shape {layer.shape}", adapter.weight_shape)
        with torch.no_grad():
            if layer.form == "dense":
                layer.factors["weight"].add_(adapter.delta_weight().to(layer.factors["weight"].dtype))
            elif layer.form == "svd":
                _widen(layer, *adapter.expand())
            else:
                for p in adapter.parameters():
                    p.requires_grad_(False)
                layer.add_adapter("merged", adapter)


def _widen(layer: FactorizedLayer, a: torch.Tensor, b: torch.Tensor) -> None:
    u, v = layer.factors["U"], layer.factors["V"]
    layer._parameters["U"] = nn.Parameter(torch.cat([u, b.to(u.dtype)], 1))
    layer._parameters["V"] = nn.Parameter(torch.cat([v, a.to(v.dtype).reshape(-1, *v.shape[1:])], 0))
    layer.rank = layer._parameters["V"].shape[0]
