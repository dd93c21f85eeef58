"""What passes through one or two networks tell the formulas: moments, mean magnitudes, the loss of one change.

All through the package's `LayerView`, so that padding, patches and shared inputs mean here what they mean there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.calibrate import collect, telling_output
from lrcompress.factorize import Drift, Statistics
from lrcompress.model.views import Reading, Walk, patches, view_of

from .networks import Network

#: Samples on which the loss of one change is measured.
MEASURED = 256


def moments(network: Network, *, gradients: bool = False) -> dict[str, Statistics]:
    """Return the package's statistics of every layer in scope; output moments only on request."""
    return collect(
        network.opened, network.module, network.calibration, network.layers, gradient_samples=512 if gradients else 0
    )


def uncentred(statistics: Statistics) -> Statistics:
    """Return E[x xᵀ] in the place of the covariance, without a mean: the layer gets no bias."""
    assert statistics.gram is not None and statistics.mean is not None
    mean = statistics.mean
    return replace(statistics, gram=statistics.gram + mean.unsqueeze(-1) * mean.unsqueeze(-2), mean=None)


class _Reached(Exception):
    """The last wanted layer has been read: the rest of the pass is not needed."""


def _rows(network: Network, module: nn.Module, names: Sequence[str], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what the named layers of `module` read, as rows (positions, in·kernel), padding left out."""
    view, found = view_of(network.opened, module), {}
    mask = inputs.get("attention_mask")

    def deliver(reading: Reading) -> None:
        value = reading.value.detach()
        walk = view.walks.get(reading.layer)
        if walk is not None:
            value = patches(value, walk)
        elif mask is not None and value.shape[:-1] == mask.shape:
            value = value[mask.bool()]
        found[reading.layer] = value.reshape(-1, value.shape[-1])
        if len(found) == len(names):
            raise _Reached

    with contextlib.suppress(_Reached):
        view.read(inputs, names, deliver)
    return [found[n] for n in names]


def mean_magnitudes(network: Network) -> dict[str, Tensor]:
    """Return E|x| of every layer's inputs, (in·kernel,)."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    names = [layer.name for layer in network.layers]
    for inputs in network.batches(len(network.calibration)):
        for name, rows in zip(names, _rows(network, network.module, names, inputs), strict=True):
            sums[name] = sums.get(name, torch.zeros(1)) + rows.abs().double().sum(0)
            counts[name] = counts.get(name, 0) + len(rows)
    return {n: sums[n] / counts[n] for n in names}


def same_input(network: Network) -> list[list[str]]:
    """Return the layers in depth order, those together that read one tensor."""
    view = view_of(network.opened, network.module)
    groups: dict[tuple[Hashable, Walk | None], list[str]] = {}
    held: list[Reading] = []

    def deliver(reading: Reading) -> None:
        held.append(reading)  # a key is unique only among live tensors
        groups.setdefault((reading.key, view.walks.get(reading.layer)), []).append(reading.layer)

    view.read(network.batches(2)[0], [layer.name for layer in network.layers], deliver)
    return list(groups.values())


@dataclass(frozen=True)
class Paired:
    """Uncentred moments of a layer's clean input x and of what a changed network delivers, x̂, all (n, n).

    `clean` E[x xᵀ], `cross` E[x x̂ᵀ], `drifted` E[x̂ x̂ᵀ].
    """

    clean: Tensor
    cross: Tensor
    drifted: Tensor

    def of(self, weight: Tensor) -> Drift:
        """Return the drift of the answers of `weight`; no mean, so that no bias changes."""
        zero = torch.zeros(len(self.clean), dtype=torch.float64)
        return Drift.of_inputs(
            weight, clean=self.clean, cross=self.cross, drifted=self.drifted, clean_mean=zero, drifted_mean=zero
        )


def paired(network: Network, changed: nn.Module, name: str) -> Paired:
    """Return the moments between the layer `name` of the network and its input in the `changed` one."""
    totals: list[Tensor] = []
    count = 0
    for inputs in network.batches(len(network.calibration)):
        (clean,) = _rows(network, network.module, [name], inputs)
        (moved,) = _rows(network, changed, [name], inputs)
        products = [(a.T @ b).double() for a, b in ((clean, clean), (clean, moved), (moved, moved))]
        totals = [t + p for t, p in zip(totals, products, strict=True)] if totals else products
        count += len(clean)
    return Paired(*(t / count for t in totals))


def harm(network: Network, *, squared: bool, samples: int = MEASURED) -> Callable[[nn.Module], float]:
    """Return a function from a changed network to its loss per sample.

    That is the KL divergence of the classes; with `squared`, and for embeddings, the squared distance of the answers,
    whose mean (what a softmax does not see) is left out for classes.
    """
    batches, classes = network.batches(samples), network.profile.metric == "accuracy"

    def answer(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        found = telling_output(network.opened.outputs(module, inputs)).double()
        if not classes:
            return found
        return found - found.mean(-1, keepdim=True) if squared else found.log_softmax(-1)

    with torch.no_grad():
        clean = [answer(network.module, b) for b in batches]

    def of(module: nn.Module) -> float:
        parts = []
        with torch.no_grad():
            for p, inputs in zip(clean, batches, strict=True):
                q = answer(module, inputs)
                parts.append((p.exp() * (p - q) if classes and not squared else (p - q).square()).sum(-1))
        return float(torch.cat(parts).mean())

    return of


def reestimate_norms(network: Network, module: nn.Module) -> bool:
    """Set the statistics of every batch-norm to those of the calibration data; False where there is none left."""
    norms: list[Any] = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
        norm.train()
    if norms:
        with torch.no_grad():
            for inputs in network.batches(len(network.calibration), 128):
                network.opened.outputs(module, inputs)
    module.eval()
    return bool(norms)
