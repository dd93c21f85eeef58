"""What the answer feels at each layer: gradients g at a layer's output whose Gram G = E[g gᵀ] is a metric of the loss.

Each loss is a cotangent v of the answer y with a known E[v vᵀ] = H, so that G = Jᵀ H J, and δᵀ G δ is what an error δ
at the layer's output costs in the quadratic form H of the answer:

    logits   v = P ε, P centring      H = P                E‖P δy‖²: squared logit error, up to a common shift of them
    kl       v = √p∘ε − p ⟨√p, ε⟩     H = diag(p) − p pᵀ   the curvature of KL: ½·loss is the KL in nats per sample
    labels   v = p − onehot(label)    H = E[v vᵀ]          cross entropy of the given labels (empirical Fisher)

ε is Gaussian, p the softmax of the network's own answer. `logits` and `kl` need no labels. Positions of a padded text
count for nothing.

Source: maths.md §2.4; the root of the curvature: (diag(√p) − p √pᵀ)(…)ᵀ = diag(p) − p pᵀ as ‖√p‖ = 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, ModelError
from ..metrics import TELLING

LOSSES = ("logits", "kl", "labels")
#: Answers that are no logits, whatever their width.
_EMBEDDINGS = ("sentence_embedding", "last_hidden_state", "pooler_output")


def telling_output(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the output that stands for the answer: logits, an embedding, or the first one."""
    return outputs[telling_name(outputs)]


def telling_name(outputs: Mapping[str, Tensor]) -> str:
    """Return the name of the output that stands for the answer."""
    return next((name for name in TELLING if name in outputs), next(iter(outputs)))


def cotangent(
    loss: str,
    outputs: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    labels: np.ndarray | None = None,
) -> Tensor:
    """Return v, shaped like the answer (…, classes), such that the gradients of ⟨y, v⟩ are those of `loss`.

    `mask`: (batch, tokens), True at real positions. Raises `ModelError` where the answer has no classes, `DataError`
    where labels are missing or are none of them.
    """
    y = telling_output(outputs).detach()
    y = y if y.dtype == torch.float64 else y.float()
    if loss != "logits" and (y.dim() < 2 or y.shape[-1] < 2 or telling_name(outputs) in _EMBEDDINGS):
        got = f"{telling_name(outputs)} {tuple(y.shape)}"
        raise ModelError(f"the loss {loss!r}", "a network that answers with logits", got, "use the loss 'logits'")
    if loss == "labels":
        v = y.softmax(-1) - _one_hot(labels, y)
    else:
        noise = torch.randn(y.shape, generator=generator).to(y)
        if loss == "kl":
            p = y.softmax(-1)
            root = p.sqrt()
            v = root * noise - p * (root * noise).sum(-1, keepdim=True)
        else:
            v = noise - noise.mean(-1, keepdim=True) if y.shape[-1] > 1 else noise
    if mask is not None and y.dim() == 3 and y.shape[:2] == mask.shape:
        v = v * mask.unsqueeze(-1)
    return v


def _one_hot(labels: np.ndarray | None, y: Tensor) -> Tensor:
    classes = y.shape[-1]
    expected = f"one class below {classes} per answer"
    if labels is None:
        raise DataError("the loss 'labels'", expected, "data without labels", "give labels, or use 'kl' or 'logits'")
    given = np.asarray(labels)
    whole = given.dtype.kind in "iu" or (given.dtype.kind == "f" and bool(np.all(given == np.floor(given))))
    if (
        not whole
        or given.shape != tuple(y.shape[:-1])
        or (given.size and not 0 <= given.min() <= given.max() < classes)
    ):
        got = f"labels {given.shape} of {given.dtype}" + (
            f", {given.min()}…{given.max()}" if given.size and whole else ""
        )
        raise DataError("the loss 'labels'", expected, got, "use the loss 'kl' or 'logits'")
    return torch.nn.functional.one_hot(torch.from_numpy(given.astype(np.int64)), classes).to(y)
