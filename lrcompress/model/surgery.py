"""Find the layers of a network, put factors in their place, and take them out again.

for layer in find_layers(model):
    if layer.reason is None:
        replace_layer(model, layer.name, form("svd").decompose(layer.weight, 16))
plain = to_dense(model)
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..adapt import BaseAdapter
from ..factorize import ConvGeometry, Factorization, Point, Rank, Statistics, form
from .layers import FactorizedConv, FactorizedEmbedding, FactorizedLayer, FactorizedLinear
from .overlaps import overlapping

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: The classes whose forward pass is known.
_PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: How the reason of a tied weight begins; `ties.lift_ties` lifts it where one set of factors serves all.
TIED = "tied: "
#: The reason of a layer with nothing to factorize; adapters and fewer bits it can have.
DEPTHWISE = "depthwise: nothing to save"


@dataclass(frozen=True)
class Layer:
    """One factorizable weight, shaped (out, in, *k); `reason` says why it must stay dense, None if it need not.

    A grouped convolution has its groups apart: kind "grouped", shaped (groups, out/groups, in/groups, *k).
    """

    name: str
    kind: str
    weight: Tensor = field(repr=False)
    reason: str | None = None
    has_bias: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def may_be_rounded(self) -> bool:
        """Whether fewer bits are a choice: of what can be factorized, and of what has nothing to factorize."""
        return self.reason is None or self.reason == DEPTHWISE

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape as the network stores it."""
        return plain_shape(self.shape, grouped=self.kind == "grouped")

    @property
    def outputs(self) -> int:
        """How many outputs the layer has; columns for an embedding."""
        return self.shape[1] if self.kind == "embedding" else self.plain_shape[0]

    @property
    def columns(self) -> int:
        """How many inputs one output reads: in·kernel, of its own group."""
        return math.prod(self.shape[2:] if self.kind == "grouped" else self.shape[1:])

    def curve(self, form_name: str, statistics: Statistics | None = None) -> list[Point]:
        """Return what a form offers an allocator for this weight."""
        return form(form_name).curve(self.weight, statistics)  # type: ignore[no-any-return]

    def energy(self, statistics: Statistics | None = None) -> float:
        """Return the squared size of the weight in the metric of the statistics: the loss of having nothing."""
        return (statistics or Statistics()).loss(self.weight)


def plain_shape(shape: tuple[int, ...], *, grouped: bool) -> tuple[int, ...]:
    """Return (out, in/groups, *k) of a shape that has its groups apart."""
    return (shape[0] * shape[1], *shape[2:]) if grouped else shape


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D"


def find_layers(model: nn.Module) -> list[Layer]:
    """Return every linear, convolution and embedding weight of `model`, in its own order, shared modules once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                owners.setdefault(id(value), []).append(f"{name}.{key}" if name else key)
    shared = overlapping(model)
    parents = {f"{p}.{c}" if p else c: m for p, m in model.named_modules() for c, _ in m.named_children()}
    found = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        matrix = weight.detach().T if _is_conv1d_of_transformers(module) else weight.detach()
        reason = _why_dense(module, weight, parents.get(name), owners)
        if reason is None and id(weight) in shared:
            reason = f"its weight lies in the memory of {shared[id(weight)]}"
        if isinstance(module, _CONVS) and module.groups > 1 and reason is None:
            kind, matrix = "grouped", matrix.reshape(module.groups, len(matrix) // module.groups, *matrix.shape[1:])
        found.append(Layer(name, kind, matrix, reason, getattr(module, "bias", None) is not None))
    return found


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, FactorizedLayer):
        return None
    if isinstance(module, nn.Linear) or _is_conv1d_of_transformers(module):
        return "linear"
    if isinstance(module, _CONVS):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


def _why_dense(
    module: nn.Module, weight: Tensor, parent: nn.Module | None, owners: Mapping[int, list[str]]
) -> str | None:
    """Return the reason that rules a layer out whatever its size, or None."""
    modules = sorted(owners.get(id(weight), []))
    computed = _how_computed(module)
    if computed is not None:
        return computed
    if weight.is_meta:
        return "its weight is on the meta device: there are no numbers"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not floating point"
    if weight.numel() == 0:
        return "its weight has no elements"
    if not torch.isfinite(weight).all():
        return "its weight is not finite"
    if isinstance(module, _CONVS) and module.groups > 1 and module.groups == module.in_channels:
        return DEPTHWISE
    if isinstance(parent, nn.MultiheadAttention):
        return "its parent reads the weight directly"
    if len(modules) > 1:
        return f"{TIED}one tensor serves {', '.join(modules)}"
    return None


def _how_computed(module: nn.Module) -> str | None:
    """Return what computes a weight that is not stored as such, or more than a layer with it, and how to avoid that."""
    if is_parametrized(module):
        remove = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        return f"its weight is computed by a parametrization; call {remove} first"
    if module._parameters.get("weight") is None:
        remove = (
            "torch.nn.utils.prune.remove(layer, 'weight')"
            if "weight_mask" in module._buffers
            else "torch.nn.utils.remove_weight_norm(layer)"
        )
        return f"its weight is computed before every call; call {remove} first"
    if getattr(module, "max_norm", None) is not None:
        return "its max_norm changes the weight while it runs"
    plain = next((c for c in type(module).__mro__ if c in _PLAIN), None)
    if plain is not None and any(
        getattr(type(module), n, None) is not getattr(plain, n, None) for n in ("forward", "_conv_forward")
    ):  # pads, scales, shifts or standardizes: factors alone would answer something else
        return f"its class {type(module).__name__} computes more than {plain.__name__}: write what it adds beside the layer"
    return None


def tensors_as_layers(tensors: Mapping[str, Tensor]) -> list[Layer]:
    """Return the layers that a bare state dict shows: `NAME.weight` with two axes or more, kinds guessed by name and rank."""
    found = []
    for key, value in tensors.items():
        if not key.endswith("weight") or value.dim() < 2:
            continue
        name = key.removesuffix("weight").removesuffix(".") or key
        kind = "conv" if value.dim() > 2 else ("embedding" if re.search(r"embed|\bwte\b|\bwpe\b", name) else "linear")
        reason = None if value.is_floating_point() else f"its weight is {str(value.dtype).removeprefix('torch.')}"
        if reason is None and value.numel() == 0:
            reason = "its weight has no elements"
        if kind == "conv" and value.shape[1] == 1 and value.shape[0] > 1:
            reason = DEPTHWISE
        if value.dim() > 5:
            reason = f"{value.dim()} axes: not a layer"
        found.append(Layer(name, kind, value, reason, f"{name}.bias" in tensors))
    return found


def replace_layer(model: nn.Module, name: str, factors: Factorization) -> FactorizedLayer:
    """Put `factors` in the place of the layer called `name`; the bias takes what carries the mean."""
    bias = getattr(model.get_submodule(name), "bias", None)
    shift = factors.bias_shift
    if shift is not None and float(shift.abs().max()) > 0:
        bias = shift if bias is None else bias.detach() + shift
    elif bias is not None:
        bias = bias.detach().clone()
    shape = plain_shape(factors.shape, grouped="grouped" in form(factors.form).LAYERS)
    return _install(model, name, factors.form, factors.factors, shape, factors.rank, bias)


def wrap_dense(model: nn.Module, name: str) -> FactorizedLayer:
    """Give the plain layer called `name` a place for adapters; its weight and bias stay the same parameters."""
    module = model.get_submodule(name)
    if isinstance(module, FactorizedLayer):
        return module
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if _is_conv1d_of_transformers(module):
        weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        from .transposed import wrapped

        new: FactorizedLayer = wrapped(module, weight, bias).train(module.training)
        set_submodule(model, name, new)
        return new
    return _install(model, name, "dense", {"weight": weight}, tuple(weight.shape), 0, bias)


def empty_layer(
    model: nn.Module,
    name: str,
    *,
    form_name: str,
    factors: Mapping[str, tuple[int, ...]],
    shape: tuple[int, ...],
    rank: Rank,
    bias: bool,
) -> FactorizedLayer:
    """Put a layer with zero factors of the given shapes in the place of `name`, to be filled from a checkpoint."""
    dtype = next((p.dtype for p in model.get_submodule(name).parameters()), torch.float32)
    integer: frozenset[str] = getattr(form(form_name), "INTEGER", frozenset())
    zeros = {k: torch.zeros(s, dtype=torch.int32 if k in integer else dtype) for k, s in factors.items()}
    has_bias = (
        torch.zeros(shape[1] if _kind(model.get_submodule(name)) == "embedding" else shape[0], dtype=dtype)
        if bias
        else None
    )
    return _install(model, name, form_name, zeros, shape, rank, has_bias)


def _install(
    model: nn.Module,
    name: str,
    form_name: str,
    factors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    rank: Rank,
    bias: Tensor | None,
) -> FactorizedLayer:
    old = model.get_submodule(name)
    common = (form_name, factors, shape, rank, bias)
    new: FactorizedLayer
    if isinstance(old, _CONVS):
        padding = old.padding if isinstance(old.padding, str) else tuple(old.padding)
        geometry = ConvGeometry(
            tuple(old.stride),
            tuple(0 for _ in old.kernel_size) if isinstance(padding, str) else padding,
            tuple(old.dilation),
        )
        new = FactorizedConv(
            *common, geometry=geometry, groups=old.groups, padding=padding, padding_mode=old.padding_mode
        )
    elif isinstance(old, nn.Embedding):
        new = FactorizedEmbedding(*common, padding_idx=old.padding_idx)
    else:
        new = FactorizedLinear(*common, transposed=_is_conv1d_of_transformers(old))
    new.train(old.training)
    set_submodule(model, name, new)
    return new


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module at the dotted path `name`, and every other path that leads to the same module."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)


def factorized_layers(model: nn.Module) -> Iterator[tuple[str, FactorizedLayer]]:
    """Yield the factorized layers with their paths."""
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            yield name, module


def adaptable_layers(model: nn.Module, *, cores: bool = False) -> list[str]:
    """Return the paths of the layers that may carry an adapter: linear and ungrouped convolutions, factorized or not.

    `cores`: and grouped ones whose factors have a core.
    """
    names = []
    dense = {layer.name: layer for layer in find_layers(model)}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            ungrouped = getattr(module, "groups", 1) == 1
            if module.layer_kind != "embedding" and (ungrouped or (cores and module.target.core)):
                names.append(name)
        elif name in dense and dense[name].kind not in ("embedding", "grouped") and dense[name].reason is None:
            names.append(name)
    return names


def attach(
    model: nn.Module, name: str, make: Callable[[str, tuple[int, ...]], BaseAdapter | None], layers: list[str]
) -> dict[str, BaseAdapter]:
    """Attach what `make(layer, weight_shape)` returns under the adapter name `name`; return it by layer."""
    attached: dict[str, BaseAdapter] = {}
    for layer in layers:
        target = wrap_dense(model, layer)
        adapter = make(layer, target.shape)
        if adapter is not None:
            target.add_adapter(name, adapter)
            attached[layer] = adapter
    return attached


def detach(model: nn.Module, name: str) -> None:
    """Remove the adapter `name` from every layer."""
    for _, layer in factorized_layers(model):
        layer.remove_adapter(name)


def to_dense(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with plain layers only: factors multiplied out, active adapters merged."""
    plain = copy.deepcopy(model)
    if isinstance(plain, FactorizedLayer):
        return plain.to_plain()
    for name, layer in list(factorized_layers(plain)):
        set_submodule(plain, name, layer.to_plain().train(layer.training))
    return plain


def count_parameters(model: nn.Module) -> int:
    """Return the stored numbers of `model`, tied ones once, adapters excluded."""
    seen = {id(p): p.numel() for n, p in model.named_parameters(remove_duplicate=False) if ".adapters." not in f".{n}"}
    return sum(seen.values())
