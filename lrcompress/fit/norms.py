"""Estimate the statistics of batch normalization again, where they could not be folded, and keep them if that helps.

What a normalization expects are mean and variance of the network that was trained; the changed network delivers others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Data
from ..model import OpenedModel
from .judge import Judge, read_batches

_BATCH = 128


def reestimated(
    opened: OpenedModel, original: nn.Module, network: nn.Module, data: Data, judged: Sequence[Mapping[str, Tensor]]
) -> bool:
    """Return whether the statistics of `network` were replaced by those of `data`: only if the judge loses less then."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    batches = [b for b in read_batches(data, _BATCH) if len(next(iter(b.values()))) > 1]  # one sample has no variance
    if not norms or not batches:
        return False
    judge = Judge(opened, original, judged)
    before, kept = judge.loss(network), [_state(m) for m in norms]
    momenta = [m.momentum for m in norms]
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # the plain mean over batches
            m.train()
        with torch.no_grad():
            for batch in batches:
                opened.outputs(network, batch)
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            m.eval()
    if judge.loss(network) < before:
        return True
    for m, state in zip(norms, kept, strict=True):
        m.load_state_dict(state)
    return False


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}
