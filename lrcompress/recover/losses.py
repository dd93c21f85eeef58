"""What recovery minimises: the distance to the original's answers, the labels, or a weighted sum of such terms.

    logits      τ²·KL(teacher ‖ student) at temperature τ; τ → ∞ is ½ the variance of s − t over the classes
    embedding   1 − cosine, plus the squared distance over the teacher's energy E‖t‖²
    hidden      the mean over blocks of ‖h − ĥ‖² over the teacher's energy E‖h‖²
    labels      cross-entropy

    mix = parse("logits=1,labels=0.5")          # {"logits": 1.0, "labels": 0.5}

Every term is a number per sample, and energies are constants that are measured once: the loss of a batch is the plain
mean over its samples, however it is cut into pieces or spread over processes.

Source: Hinton et al., arXiv 1503.02531 (logits); Romero et al., arXiv 1412.6550 (hidden).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CommandError, DataError

#: Of answers that are scores at many positions: a long tail of classes should weigh little.
TEMPERATURE = 2.0
TERMS = ("logits", "embedding", "hidden", "labels")
#: Stands for the one of logits and embedding that fits what the network answers.
AUTO = "auto"
#: A label that stands for no class.
IGNORED = -100


def parse(text: str) -> dict[str, float]:
    """Read `NAME` or `NAME=WEIGHT,…`; `CommandError` for an unknown name, one given twice, or a weight not above 0."""
    where, known = "lrcompress recover --loss", (AUTO, *TERMS)
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (p.strip() for p in part.partition("="))
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise CommandError(
                where, f"auto or one of {', '.join(TERMS)}, as NAME or NAME=WEIGHT,…", part.strip() or repr(text),
                f"did you mean {near[0]!r}?" if near else "for example logits=1,labels=0.5",
            )  # fmt: skip
        if name in found:
            raise CommandError(where, "each loss once", f"{name} twice", "give the sum of their weights")
        try:
            found[name] = float(weight) if equals else 1.0
        except ValueError:
            found[name] = math.nan
        if not (math.isfinite(found[name]) and found[name] > 0):
            raise CommandError(where, f"a weight of {name} above 0", weight, "for example logits=1,labels=0.5")
    return found


def resolved(mix: Mapping[str, float], fitting: str) -> dict[str, float]:
    """Return the mix with the term that `auto` stands for."""
    out = {fitting if n == AUTO else n: w for n, w in mix.items()}
    if len(out) != len(mix):
        raise CommandError(
            "lrcompress recover --loss", "each loss once", f"{fitting} twice: auto means it", f"leave {fitting} out"
        )
    return out


def auto(output_name: str, output: Tensor) -> str:
    """Return the distillation loss that fits an output: rows that look like scores are logits, named embeddings are not."""
    if "embedding" in output_name or "hidden" in output_name or "pooler" in output_name:
        return "embedding"
    unit = torch.allclose(output.norm(dim=-1), torch.ones(()), atol=1e-3)
    return "embedding" if unit else "logits"


def per_sample(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of `values` (batch, …) over everything but the batch; `mask` (batch, positions) says which count."""
    if values.dim() == 1:
        return values
    if mask is None or values.shape[:2] != mask.shape:
        return values.flatten(1).mean(1)
    weights = mask.to(values.dtype)
    return (values.flatten(2).mean(2) if values.dim() > 2 else values).mul(weights).sum(1) / weights.sum(1).clamp_min(1)


def temperature_for(output: Tensor) -> float:
    """Return the temperature that fits scores: none for one row per sample, whose every class then counts.

    An original that is sure of its training samples says little at a low temperature. (ResNet-20 at 0.35 of its numbers,
    300 steps on blends: test accuracy 90.6 instead of 90.3 %, from 90.4; n = 5,000, about one standard error.)
    """
    return math.inf if output.dim() <= 2 else TEMPERATURE


def logits(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = TEMPERATURE) -> Tensor:
    """Return τ²·KL of each sample; both (batch, …, classes), or one score (batch,) or (batch, 1) against zero."""
    student, teacher = _scores(student), _scores(teacher)
    if math.isinf(temperature):
        return per_sample(0.5 * (student - teacher).var(-1, correction=0), mask)
    s = F.log_softmax(student / temperature, -1)
    t = F.log_softmax(teacher / temperature, -1)
    return per_sample(temperature**2 * F.kl_div(s, t, log_target=True, reduction="none").sum(-1), mask)


def _scores(answer: Tensor) -> Tensor:
    one = answer[:, None] if answer.dim() == 1 else answer
    return F.pad(one, (0, 1)) if one.shape[-1] == 1 else one


def embedding(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, energy: float = 1.0) -> Tensor:
    """Return the distance of each sample; both (batch, …, width). `energy`: E‖t‖² of a row."""
    distance = (student - teacher).square().sum(-1) / energy
    return per_sample(1 - F.cosine_similarity(student, teacher, dim=-1) + distance, mask)


def hidden(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, energy: float = 1.0) -> Tensor:
    """Return ‖h − ĥ‖² of each sample over the energy; both (batch, …). `energy`: the mean square of an element."""
    return per_sample((student - teacher).square() / energy, mask)


def energy_of(teacher: Tensor, mask: Tensor | None, *, rows: bool) -> float:
    """Return the mean square of an element that counts, or of a row (…, width)."""
    squares = teacher.double().square()
    values = squares.sum(-1) if rows else squares
    return max(float(per_sample(values, mask).mean()), 1e-12)


def labels(student: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each sample: scores (batch, …, classes) against classes (batch, …)."""
    rows = F.cross_entropy(student.flatten(0, -2), target.flatten().long(), reduction="none", ignore_index=IGNORED)
    values = rows.reshape(target.shape)
    if values.dim() == 1:
        return values
    counted = (target != IGNORED) if mask is None else (target != IGNORED) & mask.bool()
    return per_sample(values, counted)


def checked_labels(targets: object, answer: Tensor) -> Tensor:
    """Return labels on the device of `answer` (batch, …, classes); `DataError` where they are not its classes."""
    classes = answer.shape[-1]
    if targets is None:
        raise DataError(
            "recovery data", "labels for the loss 'labels'", "none", "add an array y, or distil with --loss logits"
        )
    found = torch.as_tensor(targets)
    if found.shape != answer.shape[:-1]:
        raise DataError(
            "recovery data: labels", f"one class per row of scores {tuple(answer.shape)}", tuple(found.shape)
        )
    if found.is_floating_point() or found.dtype == torch.bool:
        raise DataError(
            "recovery data: labels", "class numbers", str(found.dtype).removeprefix("torch."), "distil with --loss auto"
        )
    inside = found[found != IGNORED] if found.dim() > 1 else found
    if inside.numel() and (int(inside.min()) < 0 or int(inside.max()) >= classes):
        raise DataError("recovery data: labels", f"classes 0…{classes - 1}", f"{int(inside.min())}…{int(inside.max())}")
    return found.to(answer.device)
