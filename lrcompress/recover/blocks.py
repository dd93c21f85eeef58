"""The blocks of a network: what its hidden states are, where gradients are checkpointed, and kernels rebuilt to train.

A block is an outermost module of a class that stands in the network at least twice and has layers inside: residual
blocks, transformer layers. A network without any is looked at layer by layer.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import CommandError
from ..model.layers import FactorizedConv, FactorizedLayer

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CONVS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def blocks_of(module: nn.Module) -> list[str]:
    """Return the paths of the network's blocks, in its own order; none where nothing repeats."""
    inside = [
        (n, m) for n, m in module.named_modules()
        if n and m._modules and not isinstance(m, (*_CONTAINERS, FactorizedLayer)) and ".adapters" not in n
    ]  # fmt: skip
    often = Counter(type(m) for _, m in inside)
    found: list[str] = []
    for name, m in inside:
        if often[type(m)] > 1 and not any(name.startswith(f"{f}.") for f in found):
            found.append(name)
    return found


def hidden_states(module: nn.Module, patterns: Sequence[str], folded: Mapping[str, str]) -> list[str]:
    """Return the paths whose answers both networks have: those that match, or all blocks, or every layer.

    A layer that a normalization was folded into answers something else than in the original; what stands in the place
    of the normalization answers the same. `CommandError` for a pattern that matches nothing of the kind.
    """
    changed = set(folded.values())
    names = [n for n, _ in module.named_modules() if n and ".adapters" not in f".{n}" and n not in changed]
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            near = ", ".join((blocks_of(module) or names)[:4])
            raise CommandError(
                "lrcompress recover --hidden", "a pattern that matches a module", pattern, f"for example {near}, …"
            )
    if patterns:
        return [n for n in names if any(fnmatchcase(n, p) for p in patterns)]
    layers = {n for n, m in module.named_modules() if isinstance(m, FactorizedLayer) or n in folded}
    return blocks_of(module) or [n for n in names if n in layers]


@contextlib.contextmanager
def captured(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds the answer of each named module after every pass."""
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            value = _first_tensor(out)
            if value is not None:
                held[name] = value

        return hook

    handles = [module.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for v in items if (found := _first_tensor(v)) is not None), None)


@contextlib.contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """Let every block keep its input alone, and run again for its gradient: less memory, a third more time."""
    names = blocks_of(module)
    if not names:
        raise CommandError(
            "lrcompress recover --checkpointing", "a network with blocks that repeat", "none", "leave it out"
        )
    with contextlib.ExitStack() as stack:
        for name in names:
            block = module.get_submodule(name)
            stack.enter_context(_replaced(block, _again(block.forward)))
        yield


def _again(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


@contextlib.contextmanager
def rebuilt_kernels(module: nn.Module) -> Iterator[None]:
    """Let convolutions multiply their kernel out first, while they are trained: one call instead of one per factor.

    The product costs as much as one position of one image; on a batch of them that is nothing, and one dense
    convolution is faster than the two or three of its factors (1.6 times, forward and backward, on ResNet-20).
    """
    with contextlib.ExitStack() as stack:
        for m in module.modules():
            if isinstance(m, FactorizedConv) and m.form != "dense" and not _weight_decomposed(m):
                stack.enter_context(_replaced(m, _dense(m)))
        yield


def _weight_decomposed(layer: FactorizedLayer) -> bool:
    return any(getattr(a, "magnitude", None) is not None for a in layer.adapters.values())


def _dense(layer: FactorizedConv) -> Any:
    convolve = _CONVS[len(layer.shape) - 2]

    def run(x: Tensor) -> Tensor:
        if layer._pad is not None:
            x = F.pad(x, layer._pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        walk = layer._walk
        y: Tensor = convolve(
            x, layer.merged_weight(), layer.bias, walk.stride, walk.padding, walk.dilation, layer.groups
        )
        return y

    return run


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let `module` run `forward` instead of its own."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]
