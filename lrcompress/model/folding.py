"""Fold batch normalization into the layer before it: a = γ/√(v + ε), W' = diag(a) W, b' = a (b − m) + β.

Done before a network is factorized, so that errors are weighed as they reach what follows, and fewer numbers are kept.
Which normalization follows which layer is seen in a run: its only input must be the layer's answer, and nobody else may
read that. A weight that another layer holds too is left alone. What a normalization was is an `nn.Identity` afterwards.

    folded = fold_norms(opened, module, a_few_samples)        # {"bn1": "conv1", …}; the module is changed
    refold(module, folded)                                    # the same places, in a network yet to be filled
    fold_again(original, folded)                              # the same network, from its first weights
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .flow import Counting
from .opened import OpenedModel
from .surgery import Layer, set_submodule

_FOLDING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_norms(
    opened: OpenedModel, module: nn.Module, inputs: Mapping[str, Tensor], layers: Mapping[str, Layer]
) -> dict[str, str]:
    """Fold what can be folded into the layers that no reason keeps as they are; return {normalization: layer}."""
    norms = {n for n, m in module.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    holders = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    targets = {
        n for n, layer in layers.items()
        if layer.reason is None and type(m := module.get_submodule(n)) in _FOLDING and holders[id(m.weight)] == 1
    }  # fmt: skip
    if not norms or not targets:
        return {}
    folded = {}
    for norm, layer in _followers(opened, module, inputs, targets, norms).items():
        _fold(module.get_submodule(layer), module.get_submodule(norm))
        set_submodule(module, norm, nn.Identity())
        folded[norm] = layer
    return folded


def refold(module: nn.Module, folded: Mapping[str, str]) -> None:
    """Make the places that `fold_norms` made: identities, and biases of zero where a layer has none. `AttributeError` if one is missing."""
    for norm, name in folded.items():
        set_submodule(module, norm, nn.Identity())
        layer = module.get_submodule(name)
        if getattr(layer, "bias", None) is None and isinstance(layer, _FOLDING):
            weight = layer.weight
            layer.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype))


def fold_again(module: nn.Module, folded: Mapping[str, str]) -> None:
    """Fold what `fold_norms` folded in a network of the same weights. `AttributeError` if a part is missing."""
    for norm, layer in folded.items():
        _fold(module.get_submodule(layer), module.get_submodule(norm))
        set_submodule(module, norm, nn.Identity())


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    assert isinstance(layer, _FOLDING) and isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        a = 1 / (norm.running_var.double() + norm.eps).sqrt()
        if norm.weight is not None:
            a = a * norm.weight.double()
        b = torch.zeros_like(a) if layer.bias is None else layer.bias.double()
        b = a * (b - norm.running_mean.double())
        if norm.bias is not None:
            b = b + norm.bias.double()
        w = layer.weight.double() * a.reshape(-1, *[1] * (layer.weight.dim() - 1))
        layer.weight = nn.Parameter(w.to(layer.weight.dtype))
        layer.bias = nn.Parameter(b.to(layer.weight.dtype))


def _followers(
    opened: OpenedModel, module: nn.Module, inputs: Mapping[str, Tensor], targets: set[str], norms: set[str]
) -> dict[str, str]:
    """Return {normalization: layer} of those that are called once, one behind the other, with nobody else reading."""
    counting = Counting(None)
    calls: Counter[str] = Counter()
    answers: dict[str, Tensor] = {}
    reads: list[tuple[str, Tensor]] = []

    def before(name: str, read: Tensor) -> None:
        calls[name] += 1
        reads.append((name, read))
        counting.inside = True

    def after(name: str, out: Tensor) -> None:
        counting.inside = False
        counting.made(out)
        answers[name] = out

    with _hooked(module, targets | norms, before, after), torch.no_grad(), counting:
        told = opened.outputs(module, inputs)
    outside = {id(t) for _, tensors, _, _ in counting.uses for t in tensors} | {id(t) for t in told.values()}
    found = {}
    for layer in sorted(targets & set(answers)):
        answer = answers[layer]
        readers = [name for name, read in reads if read is answer]
        once = len(readers) == 1 and readers[0] in norms and calls[layer] == calls[readers[0]] == 1
        if once and id(answer) not in outside:
            found[readers[0]] = layer
    return found


@contextlib.contextmanager
def _hooked(module: nn.Module, names: set[str], before: Any, after: Any) -> Iterator[None]:
    handles: list[Any] = []
    for name in sorted(names):
        part = module.get_submodule(name)

        def enter(_: nn.Module, args: Any, kwargs: Any, n: str = name) -> None:
            before(n, args[0] if args else next(iter(kwargs.values())))

        def leave(_: nn.Module, args: Any, out: Tensor, n: str = name) -> None:
            after(n, out)

        handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(part.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
