"""What every adapter is: a correction ΔW of a weight (out, in, *k), with a rank, an alpha and a scaling."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..factorize import ConvGeometry


class BaseAdapter(nn.Module, abc.ABC):
    """A correction of rank `rank`; `scaling` (alpha/rank) multiplies it.

    Subclasses name their tensors as PEFT does (`tensor_names`), start at ΔW = 0, and apply themselves to activations.
    """

    kind: ClassVar[str]
    #: Parameter -> name of that tensor in PEFT's files.
    tensor_names: ClassVar[Mapping[str, str]]

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        rank: int,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {rank}")
        self.weight_shape, self.rank, self.alpha = tuple(weight_shape), rank, float(rank if alpha is None else alpha)
        self.scaling = self.alpha / rank
        self.reset(generator)

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in·kernel)."""
        return self.weight_shape[0], math.prod(self.weight_shape[1:])

    @abc.abstractmethod
    def reset(self, generator: torch.Generator | None) -> None:
        """Create the parameters, ΔW = 0 with a live gradient."""

    @abc.abstractmethod
    def delta_weight(self) -> Tensor:
        """Return ΔW in the shape of the weight, scaling included."""

    @abc.abstractmethod
    def expand(self) -> tuple[Tensor, Tensor]:
        """Return (A, B) with ΔW = B·A exactly: A (R, in, *k), B (out, R), scaling folded into B."""

    @abc.abstractmethod
    def forward(self, x: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
        """Return the correction of the output: x (…, in), or (batch, in, *space) with a geometry."""

    @classmethod
    @abc.abstractmethod
    def n_params(cls, weight_shape: tuple[int, ...], rank: int) -> int:
        """Return the numbers an adapter of this rank ships."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by PEFT name, detached, scaling not folded."""
        return {name: getattr(self, p).detach() for p, name in self.tensor_names.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by PEFT name; `ValueError` names the first that is missing, extra or of another shape."""
        for p, name in self.tensor_names.items():
            target: Tensor = getattr(self, p)
            if name not in tensors:
                raise ValueError(f"tensor {name} is missing")
            if tuple(tensors[name].shape) != tuple(target.shape):
                raise ValueError(f"{name}: expected shape {tuple(target.shape)}, got {tuple(tensors[name].shape)}")
        extra = sorted(set(tensors) - set(self.tensor_names.values()))
        if extra:
            raise ValueError(f"unexpected tensor {extra[0]}")
        with torch.no_grad():
            for p, name in self.tensor_names.items():
                getattr(self, p).copy_(tensors[name])
