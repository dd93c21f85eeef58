"""Pivoted layers that are to be rounded, put back into their plain gauge.

A pivoted gauge stores fewer numbers, but its outputs are differences of larger terms: what rounding does to a term is
multiplied by how much larger it is. And where weights are rounded the runtime cannot make the bases whole when it loads the
graph, so that outputs are moved in every request: half of a transformer's encoder takes 0.59 of the dense time in 8 bits, and
0.40 in the plain gauge, for 2 % more bytes (MiniLM, one thread, 9 tokens).

    undone = undo_gauges(module, opened, feeds, bits)     # {layer: Undone(form)}

A layer with an adapter between its factors keeps its gauge, which the adapter's payloads are written in. Both gauges are
tried on what it reads from the calibration data, with weights (and, at 8 bits, activations) rounded the way the runtime
rounds them; where rounding would cost it too much it is left in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..factorize import form
from ..model import OpenedModel
from ..model.layers import FactorizedLayer
from ..model.surgery import factorized_layers
from .refit.gptq import quantize
from .refit.grids import ROW8, blocks, signed

#: How many times the error of the plain gauge a pivoted one may have before it is not rounded.
WORSE = 1.5
_BATCHES = 4
_CONVS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Undone:
    """What became of a layer: its form now, and the relative errors of both gauges where it stays in 16 bits."""

    form: str
    halved: bool = False
    error: float = 0.0
    plain_error: float = 0.0


class Rounding(TorchFunctionMode):
    """Round the weights of all products to `bits`, and at 8 bits what they read (convolutions: and what they make)."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (*_CONVS, F.linear):
            return func(*args, **kwargs)
        x, weight, *rest = args
        flat = weight.flatten(1)
        if self.bits == 8:
            grid = ROW8
        else:
            grid = signed(4, flat.shape[1]) if func in _CONVS else blocks(4)
        weight = quantize(flat, grid).values().reshape(weight.shape).to(weight.dtype)
        x = _activation(x) if self.bits == 8 else x
        y = func(x, weight, *rest, **kwargs)
        return _activation(y) if self.bits == 8 and func in _CONVS else y


def _activation(x: Tensor) -> Tensor:
    """Return x on the 256 values between its extremes."""
    low, high = float(x.min().clamp_max(0)), float(x.max().clamp_min(0))
    step = (high - low) / 255
    return x if not step > 0 else torch.round(x / step) * step


def undo_gauges(
    module: nn.Module, opened: OpenedModel, feeds: Sequence[Mapping[str, np.ndarray]], bits: Mapping[str, int],
    cored: Sequence[str] = (),
) -> dict[str, Undone]:  # fmt: skip
    """Put pivoted layers that are to have 8 or 4 `bits` into their plain gauge, in place; return what changed.

    Layers named in `cored` keep their form; those that rounding would hurt are returned as `halved`, which only `feeds` tell.
    """
    layers = {
        n: layer
        for n, layer in factorized_layers(module)
        if bits.get(n, 32) in (8, 4) and getattr(form(layer.form), "PLAIN", layer.form) != layer.form
    }
    seen = _inputs(module, opened, feeds, kept) if (kept := {n: v for n, v in layers.items() if n in cored}) else {}
    found = {}
    for name, layer in layers.items():
        own, x = (layer.form, layer.factors), seen.get(name)
        if name in cored and x is None:
            continue
        plain = form(layer.form).PLAIN
        with torch.no_grad():
            factors = form(plain).decompose(layer.weight.detach().double(), layer.rank).factors
            error = None if x is None else _error(layer, x, bits[name])
            layer.become_form(plain, factors)
            if x is None or error is None:
                found[name] = Undone(plain)
                continue
            plain_error = _error(layer, x, bits[name])
            layer.become_form(*own)
        if error > WORSE * plain_error:
            found[name] = Undone(own[0], True, error, plain_error)
    return found


def _error(layer: FactorizedLayer, x: Tensor, bits: int) -> float:
    """Return the relative error that rounding does to the layer's answers."""
    exact = layer(x)
    with Rounding(bits):
        rough = layer(x)
    return float((rough - exact).norm() / exact.norm().clamp_min(1e-30))


def _inputs(
    module: nn.Module, opened: OpenedModel, feeds: Sequence[Mapping[str, np.ndarray]], layers: Mapping[str, FactorizedLayer]
) -> dict[str, Tensor]:  # fmt: skip
    """Return what every layer read in the first few feeds."""
    seen: dict[str, list[Tensor]] = {n: [] for n in layers}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: seen[name].append(given[0].detach())

    handles = [layer.register_forward_pre_hook(keep(n)) for n, layer in layers.items()]
    try:
        with torch.no_grad():
            for feed in feeds[:_BATCHES]:
                opened.outputs(module, {k: torch.from_numpy(np.asarray(v)) for k, v in feed.items()})
    finally:
        for handle in handles:
            handle.remove()
    # Batches of text differ in length: rows are what a linear layer reads.
    rows = {
        n: [x.flatten(0, -2) if layers[n].layer_kind == "linear" else x for x in xs] for n, xs in seen.items() if xs
    }
    return {n: torch.cat(xs) if len({x.shape[1:] for x in xs}) == 1 else xs[0] for n, xs in rows.items()}
