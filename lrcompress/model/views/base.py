"""What a view is: the layers of a network, what they read, and a way to put factors in their place."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...factorize import Factorization
from ..surgery import Layer
from .walk import Walk


@dataclass(frozen=True)
class Reading:
    """One layer reads `value`: (…, in), (batch, in, *space) or ids. Equal `key`s mean one and the same value.

    That holds as long as whoever compares keys also holds the values: an address is used again once it is free.
    """

    layer: str
    value: Tensor
    key: Hashable


Deliver = Callable[[Reading], None]
#: (layer, output) of every call, in the order of the calls, as parts of the autograd graph.
Outputs = list[tuple[str, Tensor]]


class LayerView(ABC):
    """The layers of one network, whatever it is stored as.

    `layers`: name, kind, weight (out, in, *k), bias, and the reason why one must stay dense. `walks`: how each
    convolution reads its input. `differentiable`: whether `read` can give outputs that gradients flow to.
    """

    layers: list[Layer]
    walks: dict[str, Walk]
    differentiable: bool = True

    @abstractmethod
    def read(
        self, inputs: Mapping[str, Tensor], names: Collection[str], deliver: Deliver, outputs: Outputs | None = None
    ) -> dict[str, Tensor]:
        """Run one batch, give `deliver` every reading of the named layers, and return the network's outputs by name.

        With `outputs` it is filled and gradients are on. Raises `ModelError` for a name that is no layer.
        """

    @abstractmethod
    def replace(self, name: str, factors: Factorization) -> None:
        """Put factors in the place of a layer, in the network itself."""

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Hold the network on `device`; afterwards it is on the CPU."""
        yield

    def layer(self, name: str) -> Layer:
        """Return a layer by name; `ModelError` if there is none."""
        found = next((layer for layer in self.layers if layer.name == name), None)
        if found is None:
            near = ", ".join(layer.name for layer in self.layers[:4])
            raise ModelError(
                f"layer {name}", f"a layer of this model ({near}, …)", "none of that name", "is it another model?"
            )
        return found

    def check(self, names: Collection[str]) -> None:
        """Raise `ModelError` for the first name that is no layer."""
        known = {layer.name for layer in self.layers}
        for name in names:
            if name not in known:
                self.layer(name)


def identity(x: Tensor) -> Hashable:
    """Return a key that two live tensors share only if they are the same numbers in the same order."""
    return x.data_ptr(), x._version, tuple(x.shape), x.stride()


def kept(out: Tensor, layer: str, outputs: Outputs | None) -> Tensor:
    """Record an output so that its gradient can be asked for; return what the network goes on with."""
    if outputs is None:
        return out
    leaf = out if out.requires_grad else out.detach().requires_grad_(True)
    outputs.append((layer, leaf))
    return leaf.clone()  # what follows may work in place


@contextlib.contextmanager
def frozen(module: nn.Module, *, gradients: bool) -> Iterator[None]:
    """Run without gradients, or with those of activations only: no weight gradient is computed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextlib.contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold a module in eval mode on `device`, and bring it back to the CPU."""
    module.to(device).eval()
    try:
        yield
    finally:
        module.cpu()
