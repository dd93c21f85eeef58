"""What recovery minimises: the distance to the original's answers, or the labels.

    logits      τ²·KL(teacher ‖ student) at temperature τ
    embedding   1 − cosine, plus the squared distance relative to the teacher's energy
    labels      cross-entropy

Source: Hinton et al., arXiv 1503.02531 (logits).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 2.0
Loss = Callable[[Tensor, Tensor], Tensor]


def logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all rows of both (…, classes)."""
    s = F.log_softmax(student.flatten(0, -2) / TEMPERATURE, -1)
    t = F.log_softmax(teacher.flatten(0, -2) / TEMPERATURE, -1)
    return TEMPERATURE**2 * F.kl_div(s, t, log_target=True, reduction="batchmean")


def embedding(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all rows of both (…, width)."""
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    energy = teacher.square().mean().clamp_min(1e-12)
    return (1 - cosine).mean() + (student - teacher).square().mean() / energy


def labels(student: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of logits (batch, classes) against class numbers (batch,)."""
    return F.cross_entropy(student, target.long())


LOSSES: dict[str, Loss] = {"logits": logits, "embedding": embedding, "labels": labels}


def auto(output_name: str, output: Tensor) -> str:
    """Return the distillation loss that fits an output: rows that look like scores are logits, named embeddings are not."""
    if "embedding" in output_name or "hidden" in output_name or "pooler" in output_name:
        return "embedding"
    unit = torch.allclose(output.norm(dim=-1), torch.ones(()), atol=1e-3)
    return "embedding" if unit else "logits"
