"""What is trained: adapters, or the factors with all biases and the scales of normalizations.

Factors are trained in their plain gauge, both sides of a component equally long: a pivoted layer's numbers range over
orders of magnitude, and the steps of an optimizer that counts in absolute numbers would tear it apart. The product is
the same; afterwards the layer is put into its own gauge again, without loss, for the rank is what it was.

A rate means, for a factor, the part of its root mean square that a step may change it by.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import BaseAdapter
from ..adapt.core import Adapter as Core
from ..adapt.core import metric_of
from ..errors import LrcompressWarning, ModelError
from ..factorize import Refused, form
from ..model.layers import FactorizedLayer
from ..model.surgery import factorized_layers
from .whitening import Root, roots_of, white_scales

#: The least root mean square that a rate is taken of: a bias of zeros must be able to leave them.
_FLOOR = 1e-2
#: Plain forms of two factors: the one whose first axis is the rank, and the one whose second axis is.
_COMPONENTS = {"svd": ("V", "U"), "spatial_svd": ("first", "second")}


@dataclass(frozen=True)
class Trained:
    """Parameters by name, in the order of the network, what a rate of 1 means for each, and the roots of their inputs."""

    parameters: Mapping[str, nn.Parameter]
    scales: Mapping[str, float]
    roots: Mapping[str, Root] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        return sum(p.numel() for p in self.parameters.values())


def adapters_of(adapters: Mapping[str, BaseAdapter]) -> Trained:
    """Return the parameters of adapters; a rate is one of the optimizer's own."""
    named = {f"{layer}.{n}": p for layer, a in adapters.items() for n, p in a.named_parameters()}
    return Trained(named, dict.fromkeys(named, 1.0))


def factors_of(module: nn.Module) -> Trained:
    """Return the factors of the factorized layers, and the biases and scales of everything.

    `ModelError` where nothing was factorized.
    """
    layers = dict(factorized_layers(module))
    if all(m.form == "dense" for m in layers.values()):
        raise ModelError(
            "lrcompress recover --train factors", "a network with factorized layers", "none", "train adapters"
        )
    norms = {n for n, m in module.named_modules() if _is_norm(m)}
    named = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or ".adapters." in f".{name}":
            continue
        home, _, own = name.rpartition(".")
        layer = layers.get(home)
        factor = layer is not None and layer.form != "dense" and own in layer.factor_names
        if factor or own == "bias" or own.endswith("_bias") or home in norms:
            named[name] = parameter
    scales = {n: max(float(p.detach().double().square().mean().sqrt()), _FLOOR) for n, p in named.items()}
    return Trained(named, scales)


def whitened(found: Trained, batches: Sequence[Any], ask: Callable[[Any], Any]) -> Trained:
    """Return what is trained with the roots of its inputs, as `ask` shows them on the batches."""
    roots = roots_of(found.parameters, batches, ask)
    return Trained(found.parameters, white_scales(found.parameters, found.scales, roots, _FLOOR), roots)


def _is_norm(module: nn.Module) -> bool:
    """Tell a normalization, whoever wrote it: it is called one, and holds vectors only."""
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and bool(own) and all(p.dim() <= 1 for p in own)


@contextlib.contextmanager
def only(module: nn.Module, trained: Trained) -> Iterator[None]:
    """Let gradients reach the trained parameters alone; afterwards the others want them as before."""
    own = {id(p) for p in trained.parameters.values()}
    before = {p: p.requires_grad for p in module.parameters()}
    for p in before:
        p.requires_grad_(id(p) in own)
    try:
        yield
    finally:
        for p, wanted in before.items():
            p.requires_grad_(wanted)


@contextlib.contextmanager
def cores_in_metric(module: nn.Module, adapters: Mapping[str, BaseAdapter]) -> Iterator[None]:
    """Let core adapters hold their matrices in units of the output (`adapt.core.metric_of`) while they are trained."""
    cores = {n: a for n, a in adapters.items() if isinstance(a, Core)}
    for name, core in cores.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, FactorizedLayer)
        left, right = metric_of(layer)
        p = next(core.parameters())
        core.enter(left.to(p), right.to(p))
    try:
        yield
    finally:
        for core in cores.values():
            core.leave()


# gauges -----------------------------------------------------------------------------------------------------------


def to_plain_gauge(module: nn.Module) -> dict[str, str]:
    """Put layers whose form has a plain gauge into it, balanced; return {layer: its form}.

    Layers that share factors stay as they are.
    """
    layers = dict(factorized_layers(module))
    holders = Counter(id(f) for m in layers.values() for f in m.factors.values())
    changed = {}
    for name, layer in layers.items():
        shared = any(holders[id(f)] > 1 for f in layer.factors.values())
        plain = getattr(form(layer.form), "PLAIN", layer.form)
        if shared or (plain == layer.form and plain not in _COMPONENTS):
            continue
        with torch.no_grad():
            factors = layer.factors
            if plain != layer.form:
                weight = layer.weight.detach().double()
                factors = form(plain).decompose(weight, layer.rank).factors
            factors = {k: v.detach().double() for k, v in factors.items()}
            if plain in _COMPONENTS:
                factors = _balanced(plain, factors)
        changed[name] = layer.form
        layer.become_form(plain, factors)
    return changed


def to_own_gauge(module: nn.Module, forms: Mapping[str, str]) -> None:
    """Put layers back into the forms that `to_plain_gauge` found them in."""
    for name, own in forms.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, FactorizedLayer)
        if layer.form == own:
            continue
        weight = form(layer.form).to_tensor({k: v.detach().double() for k, v in layer.factors.items()}, layer.shape)
        try:
            layer.become_form(own, form(own).decompose(weight, layer.rank).factors)
        except Refused as e:
            note = f"{name}: {own} would lose accuracy now ({e}); it stays {layer.form}, which takes a few more numbers"
            warnings.warn(note, LrcompressWarning, stacklevel=2)


def _balanced(form_name: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the two factors of a form with every component equally long on both sides."""
    inner, outer = _COMPONENTS[form_name]
    a, b = factors[inner], factors[outer]
    left, right = a.flatten(1).norm(dim=1), b.transpose(0, 1).flatten(1).norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (right / left.clamp_min(1e-300)).sqrt(), 1.0)
    return {
        **factors,
        inner: a * scale.reshape(-1, *[1] * (a.dim() - 1)),
        outer: b / scale.reshape(1, -1, *[1] * (b.dim() - 2)),
    }
