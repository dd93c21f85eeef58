"""Pivoted layers that are to be rounded, put back into their plain gauge.

A pivoted gauge stores fewer numbers, but its outputs are differences of larger terms: what rounding does to a term is
multiplied by how much larger it is. And where weights are rounded the runtime cannot make the bases whole when it loads the
graph, so that outputs are moved in every request: half of a transformer's encoder takes 0.59 of the dense time in 8 bits, and
0.40 in the plain gauge, for 2 % more bytes (MiniLM, one thread, 9 tokens).

    undone = undo_gauges(module, opened, feeds, bits)     # {layer: Undone(form)}

A layer with an adapter between its factors keeps its gauge, which the adapter's payloads are written in. Both gauges are
tried on what it reads from the calibration data, with weights (and, at 8 bits, activations) rounded the way the runtime
rounds them; where that would cost it too much nothing but its weights is rounded: to 8 bits, or to 16 if need be. What
counts is what the network keeps of its answers: behind a clip at 6 the plain gauge's codes are of 0 to 6, a pivoted one's
of all that its terms may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..factorize import form
from ..model import OpenedModel
from ..model.layers import FactorizedLayer
from ..model.surgery import factorized_layers
from .quantize import MIN_CONSTANT
from .refit.gptq import quantize
from .refit.grids import ROW8, blocks, signed

#: How many times the error of the plain gauge a pivoted one may have before only its weights are rounded.
WORSE = 1.2
#: The same for weights that are stored in 8 bits, before the refit makes up for some of it; others are stored in 16.
STORED_WORSE = 2.0
_BATCHES = 4
_CUTS = ("relu", "relu6", "hardtanh", "clamp", "clip")
_CONVS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Undone:
    """What became of a layer: its form now, and the bits that its weights are `stored` in, where nothing else is rounded.

    Then come the relative errors of the layer rounded as it is, and in its plain gauge.
    """

    form: str
    stored: int = 0
    error: float = 0.0
    plain_error: float = 0.0


@dataclass
class _Read:
    """What a layer read, and the ends of what is kept of its answers."""

    rows: Tensor
    low: float = -math.inf
    high: float = math.inf


class Rounding(TorchFunctionMode):
    """Round the weights of all products to `bits`, and at 8 bits what they read (convolutions: and what they make).

    `makes`: whether what convolutions make is rounded. `stored`: weights only, as they are multiplied out at load.
    """

    def __init__(self, bits: int, *, makes: bool = True, stored: bool = False) -> None:
        super().__init__()
        self.bits, self.makes, self.stored = bits, makes, stored

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (*_CONVS, F.linear):
            return func(*args, **kwargs)
        x, weight, *rest = args
        flat, conv = weight.flatten(1), func in _CONVS
        bits = 8 if conv and weight.numel() < MIN_CONSTANT else self.bits
        if self.stored or bits == 4:
            grid = signed(bits, flat.shape[1]) if conv or self.stored else blocks(4)
        else:
            grid = ROW8
        weight = quantize(flat, grid).values().reshape(weight.shape).to(weight.dtype)
        codes = bits == 8 and not self.stored
        y = func(_activation(x) if codes else x, weight, *rest, **kwargs)
        return _activation(y) if codes and self.makes and conv else y


class _Cuts(TorchFunctionMode):
    """Note what is cut off the answers of layers, where that is all that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[int, tuple[Tensor, str]] = {}
        self.readers: dict[str, list[tuple[float, float] | None]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = {self.answers[id(a)][1] for a in tree_leaves((args, kwargs)) if id(a) in self.answers}
        for name in read if func.__name__ != "__get__" else ():
            ends = None
            if func.__name__.rstrip("_") in _CUTS:
                low, high = func(torch.tensor([-math.inf, math.inf]), *args[1:], **kwargs).tolist()
                ends = (low, high)
            self.readers[name].append(ends)
        return func(*args, **kwargs)

    def answered(self, name: str, y: Tensor) -> None:
        """Say that `y` is what the layer `name` answered."""
        self.answers[id(y)] = (y, name)  # held, so that no other tensor has its id
        self.readers.setdefault(name, [])

    def ends(self, name: str) -> tuple[float, float]:
        """Return what is kept of the answers of `name`."""
        found = self.readers.get(name, [])
        kept = [r for r in found if r is not None]
        if not kept or len(kept) < len(found):
            return -math.inf, math.inf
        return min(low for low, _ in kept), max(high for _, high in kept)


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

    Layers named in `cored` keep their form; those that rounding would hurt are returned as `stored`, which only `feeds` tell.
    """
    layers = {
        n: layer
        for n, layer in factorized_layers(module)
        if bits.get(n, 32) in (8, 4) and getattr(form(layer.form), "PLAIN", layer.form) != layer.form
    }
    seen = _inputs(module, opened, feeds, kept) if (kept := {n: v for n, v in layers.items() if n in cored}) else {}
    found = {}
    for name, layer in layers.items():
        own, read = (layer.form, layer.factors), seen.get(name)
        if name in cored and read is None:
            continue
        plain = form(layer.form).PLAIN
        with torch.no_grad():
            factors = form(plain).decompose(layer.weight.detach().double(), layer.rank).factors
            errors = [] if read is None else _errors(layer, read, bits[name])
            layer.become_form(plain, factors)
            if read is None:
                found[name] = Undone(plain)
                continue
            plain_error = _error(layer, read, bits[name], makes=False)
            layer.become_form(*own)
        if errors[0] > WORSE * plain_error:
            found[name] = Undone(own[0], 8 if errors[1] <= STORED_WORSE * plain_error else 16, errors[0], plain_error)
    return found


def _errors(layer: FactorizedLayer, read: _Read, bits: int) -> list[float]:
    """Return the errors of a pivoted layer: rounded as the runtime does, and with 8 bits that are only stored."""
    return [_error(layer, read, bits), _error(layer, read, 8, stored=True)]


def _error(layer: FactorizedLayer, read: _Read, bits: int, *, makes: bool = True, stored: bool = False) -> float:
    """Return the relative error that rounding does to what is kept of the layer's answers.

    `makes`: whether convolutions code the parts of the answer, or what is kept of the whole. `stored`: neither.
    """
    x = read.rows
    exact = layer(x).clamp(read.low, read.high)
    with Rounding(bits, makes=makes, stored=stored):
        rough = layer(x).clamp(read.low, read.high)
    if bits == 8 and not makes and layer.layer_kind == "conv":
        rough = _activation(rough)
    return float((rough - exact).norm() / exact.norm().clamp_min(1e-30))


def _inputs(
    module: nn.Module, opened: OpenedModel, feeds: Sequence[Mapping[str, np.ndarray]], layers: Mapping[str, FactorizedLayer]
) -> dict[str, _Read]:  # fmt: skip
    """Return what every layer read in the first few feeds, and what was kept of its answers."""
    seen: dict[str, list[Tensor]] = {n: [] for n in layers}
    cuts = _Cuts()

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
            seen[name].append(given[0].detach())
            cuts.answered(name, y)

        return note

    handles = [layer.register_forward_hook(keep(n)) for n, layer in layers.items()]
    try:
        with torch.no_grad(), cuts:
            for feed in feeds[:_BATCHES]:
                opened.outputs(module, {k: torch.from_numpy(np.asarray(v)) for k, v in feed.items()})
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for n, xs in ((n, xs) for n, xs in seen.items() if xs):
        # Batches of text differ in length: rows are what a linear layer reads.
        flat = [x.flatten(0, -2) if layers[n].layer_kind == "linear" else x for x in xs]
        rows = torch.cat(flat) if len({x.shape[1:] for x in flat}) == 1 else flat[0]
        found[n] = _Read(rows, *cuts.ends(n))
    return found
