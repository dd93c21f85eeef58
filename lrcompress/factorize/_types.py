"""What every decomposition takes and returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shrinkage import share

Rank = int | tuple[int, ...]
#: Numbers that are multiplied together at a time.
_BLOCK = 4_000_000


class Refused(ValueError):
    """A form does not hold this weight at this rank accurately; its curve does not offer the rank."""

    def __init__(self, expected: str, got: str, remedy: str) -> None:
        self.expected, self.got, self.remedy = expected, got, remedy
        super().__init__(f"expected {expected}, got {got}: {remedy}")


class Point(NamedTuple):
    """One choice of a form for one weight: its rank, the numbers it stores, its loss in the metric of the statistics."""

    rank: Rank
    n_params: int
    loss: float


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution walks: per spatial axis. `padding` is symmetric; other modes pad before the layer is called."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def default(cls, axes: int) -> ConvGeometry:
        return cls((1,) * axes, (0,) * axes, (1,) * axes)


@dataclass(frozen=True)
class Statistics:
    """Moments of a layer's input and of the gradient at its output, float64.

    `gram`: centred covariance of the input rows, (n, n); convolution patches are ordered (channel, *kernel).
    `mean`: (n,). `output_gram`: E[g gᵀ] at one position, (m, m). `row_weights`: share of each row of an embedding,
    whose outputs are its columns.
    `positions`: positions per sample, which scales the loss when layers are compared.
    `groups`: of a grouped convolution, whose moments all carry a first axis of that length, as its weight does.
    """

    gram: Tensor | None = None
    mean: Tensor | None = None
    output_gram: Tensor | None = None
    row_weights: Tensor | None = None
    count: int = 0
    positions: float = 1.0
    groups: int = 1

    #: Share of mean(diag G) added to G: directions the probes did not see must not be free.
    OUTPUT_DAMPING = 0.1
    #: The same for S, only large enough to break ties among directions that carry nothing.
    INPUT_DAMPING = 1e-10

    def check(self, weight: Tensor) -> None:
        """Raise `ValueError` where the moments are not of this weight, or not finite."""
        groups: tuple[int, ...] = () if self.groups == 1 else (self.groups,)
        rows, columns = weight.shape[len(groups)], math.prod(weight.shape[len(groups) + 1 :])
        outputs = rows if self.row_weights is None else columns
        expected: dict[str, tuple[int, ...]] = {
            "gram": (*groups, columns, columns), "mean": (*groups, columns), "output_gram": (*groups, outputs, outputs),
            "row_weights": (rows,),
        }  # fmt: skip
        for name, shape in expected.items():
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name}: expected shape {shape} for a weight {tuple(weight.shape)}, got {tuple(value.shape)}"
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} is not finite")

    @property
    def norm(self) -> str:
        """The name of the metric: frobenius, activation or two_sided."""
        if self.gram is None and self.row_weights is None:
            return "frobenius"
        return "two_sided" if self.output_gram is not None else "activation"

    @cached_property
    def s(self) -> Tensor | None:
        """The input metric S, with ties broken; None if it is the identity or carries nothing."""
        return _raised(self.gram, self.INPUT_DAMPING)

    @cached_property
    def g(self) -> Tensor | None:
        """The damped output metric G; None if it is the identity or carries nothing."""
        return _raised(self.output_gram, self.OUTPUT_DAMPING)

    def group(self, i: int) -> Statistics:
        """Return the moments of one group."""
        own: dict[str, Any] = {
            k: None if t is None else t[i] for k in ("gram", "mean", "output_gram") for t in (getattr(self, k),)
        }
        return replace(self, **own, groups=1)

    def loss(self, error: Tensor) -> float:
        """Return the squared size of `error` (shaped like the weight) in the metric of these moments."""
        return max(_inner(self.weighted(error), error), 0.0)

    def weighted(self, error: Tensor) -> Tensor:
        """Return L E R, shaped like `error`: half the gradient of `loss`."""
        left, right = self.sides
        e = error.double().reshape(*error.shape[: 1 if self.groups == 1 else 2], -1)
        if right is not None:
            e = e @ right
        if left is not None:
            e = left[:, None] * e if left.dim() == 1 else left @ e
        return e.reshape(error.shape)

    @property
    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        """The metric ⟨E, L E R⟩ as (L, R): G and S; for an embedding the row weights (a vector) and G."""
        if self.row_weights is None:
            return self.g, self.s
        weights = self.row_weights.double()
        return weights if float(weights.sum()) > 0 else None, self.g

    @property
    def scale(self) -> float:
        """What a loss is multiplied by so that layers can be compared: positions per sample."""
        return self.positions


@dataclass(frozen=True)
class Factorization:
    """A weight as factors. `to_tensor()` has `shape`; `rel_error` is measured in `norm`, never predicted.

    `bias_shift` (out,): what to add to the layer's bias so that the mean output is unchanged; None without a mean.
    """

    form: str
    factors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    rank: Rank
    norm: str = "frobenius"
    loss: float = 0.0
    rel_error: float = 0.0
    rel_error_frobenius: float = 0.0
    bias_shift: Tensor | None = None
    extra: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        form: str,
        factors: Mapping[str, Tensor],
        weight: Tensor,
        rank: Rank,
        statistics: Statistics | None = None,
    ) -> Factorization:
        """Measure `factors` against `weight` and carry the mean in the bias. Factors take the dtype of `weight`."""
        from . import form as load

        stored = {k: (v.to(weight.dtype) if v.is_floating_point() else v).contiguous() for k, v in factors.items()}
        exact = {k: v.double() if v.is_floating_point() else v for k, v in stored.items()}
        rebuilt = load(form).to_tensor(exact, tuple(weight.shape))
        error = weight.double() - rebuilt
        del rebuilt  # as large as the error itself
        metric = statistics or Statistics()
        shift = None
        if metric.mean is not None:
            mean = metric.mean.double()[..., None]
            shift = (error.reshape(*mean.shape[:-2], -1, mean.shape[-2]) @ mean).flatten().to(weight.dtype)
        loss = metric.loss(error)
        return cls(
            form=form,
            factors=stored,
            shape=tuple(weight.shape),
            rank=rank,
            norm=metric.norm,
            loss=loss,
            rel_error=relative(loss, metric.loss(weight)),
            rel_error_frobenius=relative(_inner(error, error), _inner(weight, weight)),
            bias_shift=shift,
        )

    def to_tensor(self) -> Tensor:
        """Return the weight that the factors stand for, shape `shape`."""
        return self._form.to_tensor(self.factors, self.shape)  # type: ignore[no-any-return]

    def named_factors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.factors.items()

    def apply(self, x: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
        """Return the layer's output without bias, factor by factor: x (…, in), or (batch, in, *space) for a convolution."""
        if len(self.shape) == 2:
            return self._form.linear(self.factors, x)  # type: ignore[no-any-return]
        return self._form.conv(self.factors, x, geometry or ConvGeometry.default(len(self.shape) - 2))  # type: ignore[no-any-return]

    @property
    def n_params(self) -> int:
        """Stored numbers; a permutation is no number of the model."""
        return sum(f.numel() for f in self.factors.values() if f.is_floating_point())

    def n_macs(self, positions: int) -> int:
        """Return multiply-adds for `positions` input rows (output positions of a convolution at stride 1)."""
        return int(self._form.n_macs(self.shape, self.rank, positions))

    @property
    def _form(self):  # type: ignore[no-untyped-def]
        from . import form as load

        return load(self.form)


def _raised(moment: Tensor | None, damping: float) -> Tensor | None:
    """Return a moment in float64 with `damping`·mean(diag) added, group by group; None if it carries nothing."""
    if moment is None:
        return None
    value = moment.double()
    scale = value.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((scale > 0).any()):
        return None
    eye = torch.eye(value.shape[-1], dtype=torch.float64, device=value.device)
    # A group without input gets the identity: its weights cost what they are.
    damped = torch.where(scale > 0, damping * scale, 1.0)
    return value + damped[..., None, None] * eye


def _inner(a: Tensor, b: Tensor) -> float:
    """Return Σ a b in float64, in blocks: the product of two large weights is a third one."""
    blocks = zip(torch.split(a.reshape(-1), _BLOCK), torch.split(b.reshape(-1), _BLOCK), strict=True)
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in blocks)


def relative(loss: float, total: float) -> float:
    """Return √(loss/total); 0 of 0 is 0."""
    if total <= 0:
        return 0.0 if loss <= 0 else math.inf
    return math.sqrt(max(loss, 0.0) / total)


def shrinkage(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what is kept of a covariance (…, p, p) of `count` positions, and what each direction has more, (…, 1, 1) both."""
    p = covariance.shape[-1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = covariance.square().sum((-2, -1))
    found = [share(float(t), float(q), p, count) for t, q in zip(trace.flatten(), squares.flatten(), strict=True)]
    rho = covariance.new_tensor(found).reshape(trace.shape)
    return (1 - rho)[..., None, None], (rho * trace / p)[..., None, None]


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """Return a covariance whose positions were fewer than its columns as `shrinkage` has it; others as they are."""
    if not 0 < count < covariance.shape[-1]:
        return covariance
    kept, more = shrinkage(covariance, count)
    return kept * covariance + more * torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
