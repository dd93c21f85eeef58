"""y + s·(h through b) in one pass over y: the last product of a correction, written where the layer's output lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def added(y: Tensor, h: Tensor, b: Tensor, scale: float, *, channels_first: bool) -> Tensor:
    """Return y + scale·(b applied to the channels of h), overwriting y where that is possible.

    y (…, k·m), h (…, k, r), b (m, r); with `channels_first` y (batch, m, …), h (batch, r, …). h may have more or fewer axes
    than y as long as it holds its numbers in that order. y must not be needed by anyone, not even by its own gradient.
    """
    if y.is_contiguous() and not y._is_view() and y.dtype == h.dtype == b.dtype:
        out: Tensor = _Added.apply(y, h, b, scale, channels_first)  # type: ignore[no-untyped-call]
        return out
    if channels_first:
        product = torch.matmul(scale * b, h.reshape(len(h), b.shape[1], -1))
    else:
        product = h.reshape(-1, b.shape[1]) @ (scale * b).T
    return y + product.reshape(y.shape)


class _Added(torch.autograd.Function):
    """What is kept for the gradient is h and b; y goes on as it came."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, scale: float, channels_first: bool) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, b)
        ctx.scale, ctx.channels_first = scale, channels_first
        if channels_first:
            flat = h.reshape(len(h), b.shape[1], -1)
            y.view(len(h), len(b), -1).baddbmm_(b.expand(len(h), *b.shape), flat, alpha=scale)
        else:
            y.view(-1, len(b)).addmm_(h.reshape(-1, b.shape[1]), b.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, b) = gradients, ctx.saved_tensors
        grad_h = grad_b = None
        if ctx.channels_first:
            g3, h3 = g.reshape(len(h), len(b), -1), h.reshape(len(h), b.shape[1], -1)
            if ctx.needs_input_grad[1]:
                grad_h = torch.matmul(ctx.scale * b.T, g3).reshape(h.shape)
            if ctx.needs_input_grad[2]:
                grad_b = ctx.scale * torch.bmm(g3, h3.transpose(1, 2)).sum(0)
        else:
            g2, h2 = g.reshape(-1, len(b)), h.reshape(-1, b.shape[1])
            if ctx.needs_input_grad[1]:
                grad_h = (g2 @ (ctx.scale * b)).reshape(h.shape)
            if ctx.needs_input_grad[2]:
                grad_b = ctx.scale * (g2.T @ h2)
        return g, grad_h, grad_b, None, None
