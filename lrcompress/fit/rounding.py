"""A network with weights of fewer bits, for as long as it is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..model.layers import FactorizedLayer
from ..plan.bits import BLOCK, Precision, rounded


@contextlib.contextmanager
def with_bits(network: nn.Module, bits: Mapping[str, Precision], kinds: Mapping[str, str]) -> Iterator[None]:
    """Round the weights (or factors) of the named layers, and where they run in 8 bits their inputs; then put them back."""
    kept: list[tuple[Tensor, Tensor]] = []
    hooks = []
    try:
        for name, own in bits.items():
            if own.bits == 32:
                continue
            module = network.get_submodule(name)
            for tensor in _weights(module):
                kept.append((tensor, tensor.data))
                tensor.data = _rounded(module, tensor.data, own, kinds[name])
            if own.bits == 8 and kinds[name] != "embedding":
                hooks.append(module.register_forward_pre_hook(_rounded_inputs))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, data in reversed(kept):
            tensor.data = data


def _weights(module: nn.Module) -> list[Tensor]:
    if isinstance(module, FactorizedLayer):
        return [f for f in module.factors.values() if f.is_floating_point()]
    weight = module.weight
    assert isinstance(weight, Tensor)
    return [weight]


def _rounded(module: nn.Module, weight: Tensor, own: Precision, kind: str) -> Tensor:
    turned = type(module).__name__ == "Conv1D"  # transformers' own, which stores (in, out)
    found = rounded((weight.T if turned else weight).contiguous(), own.bits, kind, own.block or BLOCK)
    return found.T.contiguous() if turned else found


def _rounded_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round each sample in 255 steps of its own range, as dynamic quantization does at a batch of one."""
    x, *rest = args
    flat = x.reshape(len(x), -1)
    low, high = flat.amin(1).clamp_max(0), flat.amax(1).clamp_min(0)
    step = torch.where(high > low, (high - low) / 255, torch.ones_like(high)).reshape(-1, *[1] * (x.dim() - 1))
    zero = (-low.reshape(step.shape) / step).round()
    return ((x / step + zero).round().clamp(0, 255) - zero) * step, *rest
