"""What every adapter is: a correction ΔW of a stored weight, with a rank, an alpha and a scaling.

Any kind may be weight-decomposed (DoRA): W' = m·(W + ΔW)/‖W + ΔW‖ along one axis of the weight, m being the
`magnitude`. The norm is a constant of the gradient.

Source: Liu et al., arXiv 2402.09353 (DoRA); Kalajdzievski, arXiv 2312.03732 (scaling by √rank).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._target import Base, Target

#: Positions whose products cost as much as building a ΔW of rank 1 and taking its gradient apart again.
_BUILDING = 6


class BaseAdapter(nn.Module, abc.ABC):
    """A correction of rank `rank`; `scaling`, alpha/rank or alpha/√rank, multiplies it.

    Subclasses name their tensors as PEFT and LyCORIS do, start at ΔW = 0, and apply themselves to activations.
    """

    kind: ClassVar[str]
    #: Every tensor the kind may have, in the order in which they are stored; `shapes` says which of them it needs.
    tensor_names: ClassVar[tuple[str, ...]]
    #: Whether it lives in the core between a layer's factors, and has no meaning without them.
    in_core: ClassVar[bool] = False

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        rank: int,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
        *,
        groups: int = 1,
        core: int = 0,
        layer_kind: str = "",
        rslora: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {rank}")
        if len(weight_shape) < 2 or min(weight_shape) < 1 or weight_shape[0] % groups:
            raise ValueError(f"expected a weight of two axes or more in {groups} groups, got {weight_shape}")
        self.weight_shape, self.rank = tuple(weight_shape), rank
        self.alpha, self.rslora = float(rank if alpha is None else alpha), rslora
        self.groups, self.core = groups, core
        self.layer_kind = layer_kind or ("linear" if len(weight_shape) == 2 else "conv")
        self.register_parameter("magnitude", None)
        for name, value in self.fresh(generator, **options).items():
            setattr(self, name, nn.Parameter(value))

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def target(self) -> Target:
        """The layer it was made for, as far as the adapter knows it: no geometry."""
        return Target(self.weight_shape, self.layer_kind, groups=self.groups, core=self.core)

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns·kernel) of the stored weight."""
        return self.weight_shape[0], math.prod(self.weight_shape[1:])

    @abc.abstractmethod
    def fresh(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return tensors with ΔW = 0 and a live gradient: exactly one factor is zero."""

    @abc.abstractmethod
    def shapes(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes that tensors of the given names and shapes must have at `rank` on this weight."""

    @abc.abstractmethod
    def plain_delta(self, base: Base | None = None) -> Tensor:
        """Return ΔW in the shape of the weight, scaling included, magnitude not."""

    @abc.abstractmethod
    def expand(self, base: Base | None = None) -> tuple[Tensor, Tensor]:
        """Return (A, B) with ΔW = B·A exactly: A (R, columns, *k), B (rows, R), scaling folded into B."""

    def forward(self, x: Tensor, target: Target) -> Tensor:
        """Return the correction of the output of the layer `target`, magnitude left out."""
        return target.apply(x, self.plain_delta())

    def n_macs(self, target: Target) -> int:
        """Return the multiply-adds per position of `forward`, those of ΔW itself left out."""
        return math.prod(self.weight_shape)

    def is_whole(self, target: Target, positions: int) -> bool:
        """Tell whether one product with W + ΔW is cheaper than W's and `forward`'s apart.

        Counted for a step of training with W frozen: one product has a gradient of the weight and the two do not, but the
        factors' products run three times, forward and for both gradients. Embeddings only look rows up.
        """
        if target.kind == "embedding" or self.magnitude is not None:
            return False
        dense = math.prod(self.weight_shape)
        return 3 * self.n_macs(target) * positions > dense * (positions + _BUILDING * self.rank)

    def summed(self, weight: Tensor, share: float) -> Tensor:
        """Return weight + share·ΔW."""
        delta = self.plain_delta().to(weight.dtype)
        return torch.add(weight, delta, alpha=share)

    def add_to(self, y: Tensor, x: Tensor, target: Target, share: float) -> Tensor:
        """Return y + share·(the correction for x); y is the caller's to give away and may be overwritten."""
        correction: Tensor = self(x, target)
        if y._is_view() or y.dtype != correction.dtype:
            return torch.add(y, correction, alpha=share)
        return y.add_(correction, alpha=share)

    @property
    def random_side(self) -> nn.Parameter | None:
        """The factor whose rows are the directions of the input that a fresh adapter sees; None where there is no such one."""
        return None

    @classmethod
    def rank_for(cls, target: Target, rank: int) -> int:
        """Return the rank that asking for `rank` means on a layer: no more than its own."""
        return max(1, min(rank, target.shape[0], math.prod(target.shape[1:])))

    # weight decomposition ---------------------------------------------------------------------------------------------

    def decompose(self, weight: Tensor, axis: int = 0) -> None:
        """Make the adapter weight-decomposed: from now on W' keeps, along `axis`, the norms that W + ΔW has now."""
        total = weight.detach() + self.plain_delta().detach()
        self.magnitude = nn.Parameter(_norms(total, axis))

    @property
    def magnitude_axis(self) -> int:
        assert self.magnitude is not None
        # A single number lies along an axis of length 1.
        return next((i for i, d in enumerate(self.magnitude.shape) if d > 1), int(self.weight_shape[0] > 1))

    def gain(self, base: Base) -> Tensor:
        """Return m/‖W + ΔW‖, shaped to broadcast over the weight."""
        assert self.magnitude is not None
        total = base.weight.detach() + self.plain_delta().detach().to(base.weight.dtype)
        norms = _norms(total, self.magnitude_axis)
        return self.magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)  # a row of zeros has no direction

    def delta_weight(self, base: Base | None = None) -> Tensor:
        """Return W' − W in the shape of the weight. `base`: the layer, for kinds that depend on it (DoRA, core)."""
        delta = self.plain_delta(base)
        if self.magnitude is None:
            return delta
        if base is None:
            raise ValueError("expected the layer: a weight-decomposed adapter depends on the weight")
        weight = base.weight
        return self.gain(base) * (weight + delta.to(weight.dtype)) - weight

    def correct(self, x: Tensor, target: Target, base: Base, plain: Tensor) -> Tensor:
        """Return what is added to the layer's output. `plain`: that output without bias."""
        if self.magnitude is None:
            return self(x, target)
        if self.magnitude_axis != target.output_axis or target.kind == "conv_transpose":
            return target.apply(x, self.delta_weight(base))
        gain = self.gain(base).flatten()
        if target.kind == "conv":
            gain = gain.reshape(-1, *(1,) * (plain.dim() - 2))
        correction: Tensor = self(x, target)
        return (gain - 1) * plain + gain * correction

    # files ------------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name, detached, scaling not folded."""
        names = (*self.tensor_names, "magnitude")
        return {n: p.detach() for n in names if (p := self._parameters.get(n)) is not None}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by name; `ValueError` names the first that is missing, extra or of another shape."""
        given = {n: tuple(t.shape) for n, t in tensors.items()}
        magnitude = given.pop("magnitude", None)
        expected = self.shapes(given)
        for name, shape in expected.items():
            if name not in given:
                raise ValueError(f"tensor {name} is missing")
            if given[name] != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {given[name]}")
        extra = sorted(set(given) - set(expected))
        if extra:
            raise ValueError(f"unexpected tensor {extra[0]}")
        if magnitude is not None:
            axes = range(len(self.weight_shape))
            if magnitude not in [
                tuple(d if i == axis else 1 for i, d in enumerate(self.weight_shape)) for axis in axes[:2]
            ]:
                raise ValueError(
                    f"magnitude: expected one number per row or column of {self.weight_shape}, got {magnitude}"
                )
        for name in self.tensor_names:
            self._parameters.pop(name, None)
        for name in (*expected, *(("magnitude",) if magnitude is not None else ())):
            setattr(self, name, nn.Parameter(tensors[name].detach().clone()))


def _norms(weight: Tensor, axis: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=[i for i in range(weight.dim()) if i != axis], keepdim=True)
    return norms
