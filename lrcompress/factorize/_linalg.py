"""Small linear algebra shared by the forms: fixed signs, metric roots, convolution by kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._types import ConvGeometry


def fix_signs(left: Tensor, right: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Make the largest-magnitude entry of each column of `left` positive; flip the rows of `right` alike."""
    if left.numel() == 0:
        return left, right
    pivot = left.gather(0, left.abs().argmax(0, keepdim=True)).squeeze(0)
    sign = torch.where(pivot < 0, -1.0, 1.0).to(left.dtype)
    return left * sign, None if right is None else right * sign[:, None]


def top_eigenvectors(k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues of a symmetric matrix, descending and clipped at 0, and the leading `rank` eigenvectors."""
    values, vectors = torch.linalg.eigh((k + k.T) / 2)
    leading, _ = fix_signs(vectors.flip(1)[:, :rank])
    return values.flip(0).clamp_min(0), leading


def root(s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a PSD matrix and the pseudo-inverse of that root."""
    values, vectors = torch.linalg.eigh((s + s.T) / 2)
    values = values.clamp_min(0)
    keep = values > values.max() * len(values) * 2.2e-16
    roots = values.sqrt()
    inverse = torch.where(keep, 1 / torch.where(keep, roots, 1.0), 0.0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def cholesky(s: Tensor) -> Tensor:
    """Return a lower Cholesky factor of a PSD matrix; one that is singular in float64 is raised until it has one."""
    scale = float(s.diagonal().mean())
    eye = torch.eye(len(s), dtype=s.dtype, device=s.device)
    for jitter in (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6):
        found, info = torch.linalg.cholesky_ex(s if not jitter else s + jitter * scale * eye)
        if not int(info):
            return found  # type: ignore[no-any-return]
    raise ValueError(f"expected a positive semidefinite matrix, got one of size {len(s)} that is not")


def convolve(x: Tensor, kernel: Tensor, geometry: ConvGeometry, groups: int = 1, bias: Tensor | None = None) -> Tensor:
    """Convolve over as many axes as `kernel` (out, in/groups, *k) has."""
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[kernel.dim() - 2]
    return call(x, kernel, bias, geometry.stride, geometry.padding, geometry.dilation, groups)


def pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """Apply `matrix` (out, in) to the channels of x (batch, in, *space), as a 1×1 convolution."""
    return convolve(x, matrix.reshape(*matrix.shape, *(1,) * (x.dim() - 2)), ConvGeometry.default(x.dim() - 2))


def unfolded(weight: Tensor) -> Tensor:
    """Return a weight as the matrix (out, in·kernel)."""
    return weight.reshape(len(weight), -1)
