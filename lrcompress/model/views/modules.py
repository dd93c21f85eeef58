"""A network of modules, read by forward hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...factorize import Factorization
from ..opened import OpenedModel
from ..surgery import find_layers, replace_layer
from .base import Deliver, LayerView, Outputs, Reading, frozen, identity, kept, placed
from .walk import walks_of


class ModuleView(LayerView):
    """The layers of a module. One that is called twice delivers two readings."""

    def __init__(self, opened: OpenedModel, module: nn.Module) -> None:
        self._opened, self.module = opened, module
        self.layers = find_layers(module)
        self.walks = walks_of(module, (n.name for n in self.layers))

    def read(
        self, inputs: Mapping[str, Tensor], names: Collection[str], deliver: Deliver, outputs: Outputs | None = None
    ) -> dict[str, Tensor]:
        self.check(names)
        handles = [
            self.module.get_submodule(n).register_forward_hook(_hook(n, deliver, outputs), with_kwargs=True)
            for n in names
        ]
        try:
            with frozen(self.module, gradients=outputs is not None):
                return self._opened.outputs(self.module, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def replace(self, name: str, factors: Factorization) -> None:
        self.layer(name)
        replace_layer(self.module, name, factors)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        with placed(self.module, device):
            yield


def _hook(layer: str, deliver: Deliver, outputs: Outputs | None) -> Any:
    def run(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor | None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        deliver(Reading(layer, x, identity(x)))
        return None if outputs is None else kept(out, layer, outputs)

    return run
