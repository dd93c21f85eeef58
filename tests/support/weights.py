"""Weights and moments on which theory is tested: nothing diagonal, nothing isotropic."""

from __future__ import annotations

import torch

from lrcompress.factorize import Statistics


def weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g, dtype=torch.float64)
    decay = 0.7 ** torch.arange(w[0].numel(), dtype=torch.float64)
    return (w.reshape(len(w), -1) * decay).reshape(shape)


def statistics(w: torch.Tensor, seed: int = 1, *, two_sided: bool = False) -> Statistics:
    """Moments of inputs that fill the space unevenly: nothing here is diagonal or isotropic."""
    g = torch.Generator().manual_seed(seed)
    n = w[0].numel()
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) * (0.8 ** torch.arange(n, dtype=torch.float64))
    x = torch.randn(4 * n, n, generator=g, dtype=torch.float64) @ mix + 0.3
    mean = x.mean(0)
    gram = (x - mean).T @ (x - mean) / len(x)
    out = None
    if two_sided:
        d = torch.randn(3 * len(w), len(w), generator=g, dtype=torch.float64)
        out = d.T @ d / len(d)
    return Statistics(gram=gram, mean=mean, output_gram=out, count=len(x))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return a float64 Gaussian tensor that depends on `seed` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
