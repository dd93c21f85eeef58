"""Refit what a compressed network already stores, by least squares: no numbers more, but for a bias that was not there.

    found = refit(opened, original, module, fit=train, held=select)      # `module` changes in place

In depth order every layer tries, and takes what loses least on held-out answers, if it loses less than what is there:

    bias       b' = E t − Ŵ E x̂
    affine     one gain per output, absorbed in its factor, and the bias
    U, V, U V  one factor given the other, or one after the other; any other form, all its factors in turn
    weight     of a layer that is not factorized

Factors that several layers hold stay. All together are kept only if the network loses less on held-out inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data
from ..factorize import Drift, Statistics, form
from ..factorize._linalg import unfolded
from ..factorize._refit import sweep
from ..factorize.grouped_svd import apart
from ..fit import Judge, read_batches
from ..model import OpenedModel
from ..model.layers import FactorizedLayer
from ..model.surgery import factorized_layers, find_layers
from ..progress import Progress
from .closed import affine, left_given_right, relative, right_given_left
from .closed_adapters import BETAS, NOTHING_LOST, ROUNDING
from .closed_pass import BATCH, HELD_SAMPLES, Seen, Tried, evenly, observe

#: The factor whose first axis is the outputs, by form: it takes a gain per output.
_OUTPUTS = {"svd": "U", "shared": "U", "als": "U", "tucker": "O", "spatial_svd": "second", "dense": "weight"}
#: Forms whose factors obey more than the product: only their bias moves.
_CONSTRAINED = frozenset({"nmf"})
#: Rounds over the factors of a form without a closed form for a pair.
_SWEEPS = 2


class Refitted(Tried):
    """`rows`: {layer, form, changed, bytes, error_before, error_after, blend, applied, reason}; losses of the network."""


@dataclass(frozen=True)
class _Trial:
    """What a layer could become: new factors by name (others stay), what they stand for, and how it is called."""

    changed: str
    factors: Mapping[str, Tensor]
    weight: Tensor


def refit(
    opened: OpenedModel,
    original: nn.Module,
    module: nn.Module,
    *,
    fit: Data,
    held: Data,
    betas: Sequence[float] = BETAS,
    progress: Progress | None = None,
) -> Refitted:
    """Refit `module` (on the CPU, without adapters) in place, solving with `fit` and deciding by `held`.

    Raises `ModelError` where the data decide which layers of the network are called; `module` is no use then.
    """
    judge = Judge(opened, original, read_batches(evenly(held, HELD_SAMPLES), BATCH))
    before = judge.loss(module)
    names = _names(module)
    kept = {n: _state(module.get_submodule(n)) for n in names}
    shared = _held_twice(module)
    rows = []
    with torch.no_grad():
        for seen in observe(opened, original, module, names, fit=fit, held=held, progress=progress):
            if not isinstance(seen, Seen):
                rows.append(_row(seen[0], module.get_submodule(seen[0]), reason=seen[1]))
                continue
            rows.append(_refit_one(module.get_submodule(seen.path), seen, shared, betas))
    after = judge.loss(module)
    if not after < before:
        for name, state in kept.items():
            _restore(module.get_submodule(name), state)
        reason = "all refits together do not lower what the network loses on held-out inputs"
        rows = [{**r, "applied": False, "reason": reason if r["applied"] else r["reason"]} for r in rows]
        after = before
    return Refitted(tuple(rows), before, after)


def _names(module: nn.Module) -> list[str]:
    """Return factorized layers, and plain ones whose weight is their own to change."""
    plain = [n.name for n in find_layers(module) if n.kind in ("linear", "conv", "grouped") and n.reason is None]
    return [*(n for n, _ in factorized_layers(module)), *plain]


def _refit_one(layer: nn.Module, seen: Seen, shared: frozenset[int], betas: Sequence[float]) -> dict[str, Any]:
    """Put what loses least on held-out answers into one layer."""
    if isinstance(seen.fit, Statistics) or isinstance(seen.held, Statistics):
        return _row(seen.name, layer, reason="the rows of a table are not refitted")
    own = _Own(layer)
    zero = torch.zeros(seen.held.answer_mean.numel(), dtype=torch.float64)
    shift = zero if own.bias is None else own.bias.double()
    before = lowest = seen.held.loss(own.weight, None, shift)
    best: tuple[_Trial, Tensor | None, float] | None = None
    total = seen.total
    if relative(before, total) < ROUNDING:
        error = relative(before, total)
        return _row(seen.name, layer, reason=NOTHING_LOST, error_before=error, error_after=error)
    for beta in betas:
        drift = seen.fit.blended(seen.weight, beta)
        if beta < 1 and seen.bias is not None:  # the blend is of products; the original's bias is in its answers
            drift = _with_mean(drift, (1 - beta) * seen.bias.double())
        for trial in _trials(own, drift, shared, sweeping=beta == max(betas)):
            bias = drift.shift(trial.weight) if own.takes_bias else None
            loss = seen.held.loss(trial.weight, None, shift if bias is None else bias)
            if loss < lowest:
                lowest, best = loss, (trial, bias, beta)
    row: dict[str, Any] = {"error_before": relative(before, total), "error_after": relative(lowest, total)}
    if best is None:
        return _row(seen.name, layer, reason="no refit lowers the error of held-out answers", **row)
    trial, bias, beta = best
    size = own.put(trial, bias)
    stored = own.bias.double() if own.bias is not None else zero
    row["error_after"] = relative(seen.held.loss(own.weight, None, stored), total)
    reason = "it lowers the error of held-out answers"
    return _row(
        seen.name, layer, reason=reason, changed=trial.changed, applied=True, size_bytes=size, blend=beta, **row
    )


class _Own:
    """The tensors of one layer, factorized or not, as a refit sees them."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.factorized = isinstance(layer, FactorizedLayer)
        # Transformers' Conv1D stores (in, out).
        self._turned = not self.factorized and type(layer).__name__ == "Conv1D" and not hasattr(layer, "kernel_size")

    @property
    def form(self) -> str:
        return self.layer.form if isinstance(self.layer, FactorizedLayer) else "dense"

    @property
    def factors(self) -> dict[str, Tensor]:
        if isinstance(self.layer, FactorizedLayer):
            return self.layer.factors
        return {"weight": _plain_weight(self.layer)}

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.layer, "bias", None)

    @property
    def takes_bias(self) -> bool:
        """A factorized layer stores a bias if it gets one; the architecture decides for a plain one."""
        return self.factorized or self.bias is not None

    @property
    def weight(self) -> Tensor:
        """The weight (out, in/groups, *k) that is stood for, float64."""
        if isinstance(self.layer, FactorizedLayer):
            return self.layer.weight.double()
        return (_plain_weight(self.layer).T if self._turned else _plain_weight(self.layer)).double()

    def put(self, trial: _Trial, bias: Tensor | None) -> int:
        """Store a trial in the dtype of what is there; return the bytes that it adds."""
        dtype = next(iter(self.factors.values())).dtype
        for name, value in trial.factors.items():
            stored = value.T if self._turned else value
            self.layer._parameters[name] = nn.Parameter(stored.to(dtype).contiguous())
        if bias is None:
            return 0
        added = 0 if self.bias is not None else bias.numel() * dtype.itemsize
        self.layer.bias = nn.Parameter(bias.to(dtype))
        return added


def _trials(own: _Own, drift: Drift, shared: frozenset[int], *, sweeping: bool) -> Iterator[_Trial]:
    """Yield what a layer could become for these wanted answers; sweeps over many factors take time, and are optional."""
    base, factors = own.weight, own.factors
    if own.takes_bias:
        yield _Trial("bias", {}, base)
    if own.form in _CONSTRAINED or any(id(f) in shared for f in factors.values()):
        return
    grouped = drift.drifted.dim() == 3
    outputs = _OUTPUTS.get(own.form)
    if outputs is not None and own.takes_bias:
        gain = affine(base, drift)
        scaled = factors[outputs].double() if own.factorized else base
        scaled = gain.reshape(-1, *[1] * (scaled.dim() - 1)) * scaled
        yield _Trial("affine", {outputs: scaled}, gain.reshape(-1, *[1] * (base.dim() - 1)) * base)
    if own.form == "dense":
        if own.takes_bias:
            target = drift.target(base)
            yield _Trial("weight", {"weight": target}, target)
    elif set(factors) == {"U", "V"} and not grouped:
        yield from _pair(own, drift)
    elif sweeping:
        yield from _swept(own, drift, grouped=grouped)


def _pair(own: _Own, drift: Drift) -> Iterator[_Trial]:
    """Yield U given V, V given U, and V after U."""
    shape = own.weight.shape
    u, stored = own.factors["U"].double(), own.factors["V"].double()
    v = unfolded(stored)
    better_u = left_given_right(v, drift, u)
    yield _Trial("U", {"U": better_u}, (better_u @ v).reshape(shape))
    for changed, left in (("V", u), ("U V", better_u)):
        right = right_given_left(left, drift, v)
        factors = {"V": right.reshape(stored.shape)} | ({} if left is u else {"U": left})
        yield _Trial(changed, factors, (left @ right).reshape(shape))


def _swept(own: _Own, drift: Drift, *, grouped: bool) -> Iterator[_Trial]:
    """Yield all factors refitted in turn to A*, by conjugate gradients: every form is linear in each of its factors."""
    assert isinstance(own.layer, FactorizedLayer)
    shape, groups = own.layer.shape, len(drift.drifted) if grouped else 1
    metric = Statistics(gram=drift.drifted, groups=groups)
    exact = {k: f.double() if f.is_floating_point() else f for k, f in own.factors.items()}
    made = form(own.form)

    def split(weight: Tensor) -> Tensor:
        return apart(weight, groups) if grouped else weight

    def build(f: Mapping[str, Tensor]) -> Tensor:
        return split(made.to_tensor(f, shape))

    names = [k for k, f in exact.items() if f.is_floating_point() and f.numel()]
    found = sweep(build, exact, split(drift.target(own.weight)), metric, names=names, sweeps=_SWEEPS)
    yield _Trial("factors", {k: found[k] for k in names}, build(found).reshape(shape))


def _with_mean(drift: Drift, more: Tensor) -> Drift:
    """Return moments of answers to which `more` (out,) is added."""
    return Drift(
        drift.drifted, drift.drifted_mean, drift.cross, drift.answers, drift.answer_mean + more.reshape(drift.answer_mean.shape)
    )  # fmt: skip


def _plain_weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _held_twice(module: nn.Module) -> frozenset[int]:
    """Return the ids of parameters that several modules hold."""
    counts = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    return frozenset(k for k, n in counts.items() if n > 1)


def _state(layer: nn.Module) -> dict[str, nn.Parameter | None]:
    return dict(layer._parameters)


def _restore(layer: nn.Module, state: Mapping[str, nn.Parameter | None]) -> None:
    layer._parameters.clear()
    layer._parameters.update(state)


def _row(
    name: str, layer: nn.Module, *, reason: str, changed: str = "", applied: bool = False, size_bytes: int = 0,
    error_before: float | None = None, error_after: float | None = None, blend: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "layer": name, "form": _Own(layer).form, "changed": changed, "bytes": size_bytes, "error_before": error_before,
        "error_after": error_after, "blend": blend, "applied": applied, "reason": reason,
    }  # fmt: skip
