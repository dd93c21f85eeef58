"""The weight as it is: the form of a layer that was not worth factorizing. Exact at its only rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ._linalg import convolve
from ._types import ConvGeometry, Rank

LAYERS = frozenset({"linear", "conv", "embedding"})


def n_params(shape: tuple[int, ...], rank: Rank = 0) -> int:
    return math.prod(shape)


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return factors["weight"]


def linear(factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, factors["weight"])


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry, groups: int = 1) -> Tensor:
    return convolve(x, factors["weight"], geometry, groups)


def embedding(factors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    return F.embedding(ids, factors["weight"])


def factor_shapes(shape: tuple[int, ...], rank: Rank = 0) -> dict[str, tuple[int, ...]]:
    return {"weight": shape}


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return math.prod(shape) * positions
