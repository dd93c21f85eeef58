"""The factorized layers: factors as parameters, a bias, and any number of named adapters.

The form decides how factors multiply the activation; the weight is never rebuilt in a forward pass. A layer that
stays dense but takes adapters is one of these with the form "dense", whose only factor is called `weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import BaseAdapter, Target
from ..adapt.core import POSITIONS, core_size, why_none
from ..adapt.core import Adapter as Core
from ..factorize import ConvGeometry, Rank, form


class FactorizedLayer(nn.Module):
    """What the factorized layers share. `shape` is that of the weight the factors stand for, (out, in, *k)."""

    layer_kind: str
    bias: nn.Parameter | None
    #: Whether a pivoted layer makes its bases whole first: a runtime does that once, when it loads the graph.
    as_loaded = False

    def __init__(
        self, form_name: str, factors: Mapping[str, Tensor], shape: tuple[int, ...], rank: Rank, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.form, self.shape, self.rank = form_name, tuple(shape), rank
        self.factor_names = tuple(factors)
        for name, value in factors.items():
            if not value.is_floating_point():
                self.register_buffer(name, value)  # positions: stored, never trained
                continue
            # Not register_parameter: `weight` is a property here, so that code which reads it sees the dense weight.
            self._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        bias_parameter = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_parameter("bias", bias_parameter)
        self.adapters = nn.ModuleDict()
        #: name -> weight of the adapters that take part in forward.
        self.active: dict[str, float] = {}

    @property
    def factors(self) -> dict[str, Tensor]:
        stored = {**self._buffers, **self._parameters}
        return {n: p for n in self.factor_names if (p := stored[n]) is not None}

    @property
    def weight(self) -> Tensor:
        """The weight that the factors stand for, without adapters."""
        rebuilt: Tensor = form(self.form).to_tensor(self.factors, self.shape)
        return rebuilt

    def add_adapter(self, name: str, adapter: BaseAdapter, weight: float = 1.0) -> None:
        """Attach an adapter under `name` and make it take part with `weight`."""
        if adapter.weight_shape != self.shape:
            raise ValueError(f"adapter {name!r}: expected shape {self.shape}, got {adapter.weight_shape}")
        target = self.target
        if adapter.in_core and (adapter.core, adapter.groups) != (target.core, target.groups):
            got = _core_words(target.core, target.groups) if target.core else "none"
            got += "" if target.core else f" ({self.form}: {why_none(self.form, self.layer_kind)})"
            wanted = _core_words(adapter.core, adapter.groups)
            raise ValueError(f"adapter {name!r}: expected a layer with a core of {wanted}, got {got}")
        self.adapters[name] = adapter
        self.active[name] = weight

    def set_active(self, names: Iterable[str]) -> None:
        """Let exactly these adapters take part; the others stay attached."""
        self.active = {n: 1.0 for n in names if n in self.adapters}

    def remove_adapter(self, name: str) -> None:
        if name in self.adapters:
            del self.adapters[name]
            self.active.pop(name, None)

    def become_dense(self, weight: Tensor) -> None:
        """Hold `weight` itself, in the place of the factors."""
        for name in self.factor_names:
            (self._parameters if name in self._parameters else self._buffers).pop(name)
        self.form, self.rank, self.factor_names = "dense", 0, ("weight",)
        self._parameters["weight"] = nn.Parameter(weight.detach().clone())

    def become_form(self, form_name: str, factors: Mapping[str, Tensor]) -> None:
        """Hold `factors` of the form `form_name`, in the place of those that are there."""
        old = next(p for p in self.factors.values() if p.is_floating_point())
        for name in self.factor_names:
            (self._parameters if name in self._parameters else self._buffers).pop(name)
        self.form, self.factor_names = form_name, tuple(factors)
        for name, value in factors.items():
            if isinstance(value, nn.Parameter):
                self._parameters[name] = value
            elif value.is_floating_point():
                self._parameters[name] = nn.Parameter(value.detach().to(old.device, old.dtype).contiguous())
            else:
                self.register_buffer(name, value.to(old.device))

    def merged_weight(self) -> Tensor:
        """Return the dense weight with the active adapters added."""
        total = self.weight
        for name, weight in self.active.items():
            total = total + weight * self._adapter(name).delta_weight(self)
        return total

    @property
    def target(self) -> Target:
        """The layer as its adapters see it."""
        return Target(self.shape, self.layer_kind, core=core_size(self.form, self.factors, self.layer_kind))

    def _adapter(self, name: str) -> BaseAdapter:
        return self.adapters[name]  # type: ignore[return-value]

    def _cored(self, x: Tensor) -> Tensor | None:
        """Return the layer's product with what its core adapters add between the factors; None where there are none."""
        found = [(self._adapter(n), w) for n, w in self.active.items() if self._adapter(n).in_core]
        if not found:
            return None
        position, target = POSITIONS[self.form], self.target
        if position.folded and all(isinstance(a, Core) for a, _ in found):
            tail = self.factors[position.tail]
            steps = [w * position.turned(cast(Core, a).matrix(), tail) for a, w in found]
            return self._through(x, {**self.factors, position.tail: tail + torch.stack(steps).sum(0)})
        z = position.before(self.factors, x, target)
        moved = z
        for adapter, weight in found:
            step = cast(Core, adapter).shift(z, target)
            moved = moved + (step if weight == 1.0 else weight * step)
        return position.after(self.factors, moved, target)

    def _output(self, x: Tensor) -> Tensor:
        """Return the layer's output with what the active adapters add; x is padded already."""
        target = self.target
        outside = [(a, w) for n, w in self.active.items() if not (a := self._adapter(n)).in_core]
        if torch.compiler.is_exporting() or any(a.magnitude is not None for a, _ in outside):
            return self._apart(x, target, outside)
        if self.form != "dense":
            plain = self._product(x)
            y = plain if self.bias is None else plain + self._wide_bias
        else:
            places, weight = target.positions(x), self.factors["weight"]
            for adapter, share in [(a, w) for a, w in outside if a.is_whole(target, places)]:
                weight = adapter.summed(weight, share)
            outside = [(a, w) for a, w in outside if not a.is_whole(target, places)]
            y = target.apply(x, weight, bias=self.bias)
        for adapter, share in outside:
            y = adapter.add_to(y, x, target, share)
        return y

    def _apart(self, x: Tensor, target: Target, outside: Iterable[tuple[BaseAdapter, float]]) -> Tensor:
        """Return the output where the product without bias is needed, or is to stand in a graph by itself."""
        plain = self._product(x)
        y = plain if self.bias is None else plain + self._wide_bias
        for adapter, share in outside:
            correction = adapter.correct(x, target, self, plain)
            y = y + (correction if share == 1.0 else share * correction)
        return y

    def _product(self, x: Tensor) -> Tensor:
        """Return the output of the factors, core adapters included, without bias."""
        cored = self._cored(x)
        return self._through(x, self.factors) if cored is None else cored

    def _through(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """Return what `factors` make of x, as the form multiplies them."""
        raise NotImplementedError

    def _forward_of(self, kind: str) -> Callable[..., Tensor]:
        module = form(self.form)
        plain: Callable[..., Tensor] = getattr(module, kind)
        return getattr(module, f"{kind}_as_loaded", plain) if self.as_loaded else plain

    @property
    def _wide_bias(self) -> Tensor:
        """Return the bias, shaped to broadcast over outputs."""
        assert self.bias is not None
        return self.bias if len(self.shape) == 2 else self.bias.reshape(-1, *(1,) * (len(self.shape) - 2))

    def to_plain(self) -> nn.Module:
        """Return the ordinary layer of torch (or of its origin) with the active adapters merged."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.form}, shape={self.shape}, rank={self.rank}, bias={self.bias is not None}"


class FactorizedLinear(FactorizedLayer):
    """y = factors(x) + b. `transposed` marks an origin that stored (in, out), as transformers' Conv1D does."""

    layer_kind = "linear"

    def __init__(self, *args: Any, transposed: bool = False) -> None:
        super().__init__(*args)
        self.transposed = transposed

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def nf(self) -> int:
        """The name that transformers' Conv1D gives its width."""
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self._output(x)
        # As rows: the output of a product with more axes is a view, over which nothing can be written for free.
        return self._output(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.shape[0])

    def _through(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        return self._forward_of("linear")(factors, x)

    def to_plain(self) -> nn.Module:
        weight = self.merged_weight().detach()
        plain: nn.Module
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            plain = Conv1D(self.shape[0], self.shape[1])
            weight = weight.T.contiguous()
        else:
            plain = nn.Linear(self.shape[1], self.shape[0], bias=self.bias is not None)
        return _filled(plain, weight, self.bias)


class FactorizedConv(FactorizedLayer):
    """A convolution over one, two or three axes; `groups` other than 1 only in the dense form."""

    layer_kind = "conv"

    def __init__(
        self,
        *args: Any,
        geometry: ConvGeometry,
        groups: int = 1,
        padding: tuple[int, ...] | str = 0,  # type: ignore[assignment]
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__(*args)
        self.geometry, self.groups, self.padding, self.padding_mode = geometry, groups, padding, padding_mode
        self._walk, self._pad = _walk(self.shape, geometry, padding, padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        if self._pad is not None:
            x = F.pad(x, self._pad, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        return self._output(x)

    def _through(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        groups = (self.groups,) if self.form == "dense" else ()
        return self._forward_of("conv")(factors, x, self._walk, *groups)

    @property
    def target(self) -> Target:
        return Target(
            self.shape, "conv", self._walk, self.groups, core=core_size(self.form, self.factors, self.layer_kind)
        )

    def to_plain(self) -> nn.Module:
        classes: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        out, inner, *kernel = self.shape
        plain = classes[len(kernel)](
            inner * self.groups, out, tuple(kernel), self.geometry.stride, self.padding, self.geometry.dilation, self.groups,
            self.bias is not None, self.padding_mode,
        )  # fmt: skip
        return _filled(plain, self.merged_weight().detach(), self.bias)


class FactorizedEmbedding(FactorizedLayer):
    """Rows of a factorized table, (V, d). `padding_idx` is kept for the way back only: its row is not special here."""

    layer_kind = "embedding"

    def __init__(self, *args: Any, padding_idx: int | None = None) -> None:
        super().__init__(*args)
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        return self._output(ids)

    def _through(self, ids: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        return form(self.form).embedding(factors, ids)  # type: ignore[no-any-return]

    def to_plain(self) -> nn.Module:
        plain = nn.Embedding(self.shape[0], self.shape[1], padding_idx=self.padding_idx)
        weight = self.merged_weight().detach()
        return _filled(plain, weight if self.bias is None else weight + self.bias.detach(), None)


def _core_words(core: int, groups: int) -> str:
    return f"{core}" if groups == 1 else f"{core} in each of {groups} groups"


def _walk(
    shape: tuple[int, ...], geometry: ConvGeometry, padding: tuple[int, ...] | str, mode: str
) -> tuple[ConvGeometry, list[int] | None]:
    """Return the geometry that the kernels walk with, and what to pad before them (as F.pad takes it)."""
    kernel = shape[2:]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
        before = [(t // 2, t - t // 2) for t in total]
    else:
        before = [(p, p) for p in geometry.padding]
    if mode == "zeros" and all(a == b for a, b in before):
        return ConvGeometry(geometry.stride, tuple(a for a, _ in before), geometry.dilation), None
    flat = [n for pair in reversed(before) for n in pair]
    return ConvGeometry(geometry.stride, (0,) * len(kernel), geometry.dilation), flat


def _filled(plain: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        plain.to(weight.dtype)
        plain.weight.copy_(weight)  # type: ignore[operator]
        if bias is not None:
            plain.bias.copy_(bias)  # type: ignore[operator]
    return plain
