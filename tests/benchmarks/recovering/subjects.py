"""One layer with one adapter, as each package makes it: what the steps of the comparison are steps of.

All packages get the same base weights, rank and alpha, a frozen base, and an optimizer of the adapter's parameters
alone. The wrapped layer is called itself, not through the model that a package would wrap around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

OURS, PEFT, LYCORIS = "lrcompress", "peft", "lycoris"
PACKAGES = (OURS, PEFT, LYCORIS)
#: What the packages have; the others are ours alone.
PEERS = {"lora": (PEFT, LYCORIS), "loha": (PEFT, LYCORIS), "lokr": (PEFT, LYCORIS)}
KINDS = ("lora", "loha", "lokr", "lokh", "core")
#: The layer and its input: 512 tokens, and 32 images of 32×32.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(384, 1536), (4, 128, 384)),
    "conv": (lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 32, 32)),
}
#: The core of a layer at half of its parameters: what a core adapter lives in.
CORE_RANK = {"linear": 152, "conv": 28}


@dataclass
class Subject:
    """A layer, its trainable parameters, and one training step of it."""

    name: str
    layer: nn.Module
    x: Tensor
    cotangent: Tensor
    through: bool

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.layer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def step(self) -> None:
        """Forward, backward (to the input too where it is an inner layer), optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        self.layer(self.x.detach().requires_grad_(self.through)).backward(self.cotangent)
        self.optimizer.step()


def subject(package: str, kind: str, layer: str, *, rank: int, through: bool, name: str | None = None) -> Subject:
    """Return the layer with an adapter of `package`; `through`: whether the gradient goes on to the input."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    base = make().requires_grad_(False)
    x = torch.randn(shape)
    made = {OURS: _ours, PEFT: _peft, LYCORIS: _lycoris}[package](base, kind, layer, rank)
    with torch.no_grad():
        cotangent = torch.randn_like(made(x))
        for p in made.parameters():
            if p.requires_grad and not p.any():
                p.normal_(0, 0.01)  # not at its start, where a product with zeros is cheap
    return Subject(name or package, made.train(), x, cotangent, through)


def _ours(base: nn.Module, kind: str, layer: str, rank: int) -> nn.Module:
    from lrcompress.factorize import form
    from lrcompress.model.adapting import fresh
    from lrcompress.model.surgery import replace_layer, wrap_dense

    holder = nn.ModuleDict({"layer": base})
    if kind == "core":
        weight = base.weight.detach()
        assert isinstance(weight, Tensor)
        replace_layer(holder, "layer", form("svd").decompose(weight, CORE_RANK[layer]))
        holder.requires_grad_(False)
    made = wrap_dense(holder, "layer")
    adapter = fresh(kind, made.target, rank, float(rank), generator=torch.Generator().manual_seed(1))
    made.add_adapter("a", adapter)
    return made


def _peft(base: nn.Module, kind: str, layer: str, rank: int) -> nn.Module:
    import peft

    model = nn.ModuleDict({"layer": base})
    common = {"r": rank, "target_modules": ["layer"]}
    config = {
        "lora": lambda: peft.LoraConfig(lora_alpha=rank, **common),
        "loha": lambda: peft.LoHaConfig(alpha=rank, use_effective_conv2d=False, **common),
        "lokr": lambda: peft.LoKrConfig(alpha=rank, use_effective_conv2d=False, **common),
    }[kind]()
    peft.inject_adapter_in_model(config, model)
    return model["layer"]


def _lycoris(base: nn.Module, kind: str, layer: str, rank: int) -> nn.Module:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    module = _lycoris_module(kind)
    made = module("layer", base, 1.0, rank, float(rank))
    made.apply_to()
    base.add_module("adapter", made)
    return base


def _lycoris_module(kind: str) -> Callable[..., nn.Module]:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    return {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}[kind]
