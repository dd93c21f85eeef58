"""Set adapters by closed forms, each only where it lowers its layer's error on held-out answers.

    found = correct(opened, original, module, adapters, fit=train, held=select)
    found.rows                                  # per layer: what was done, and why
    found.applied                               # layers whose adapter is more than zero now

Layers are corrected in depth order, so that later ones make up for what remains of earlier ones. All together are kept
only if the network loses less on held-out inputs; else every adapter is what it was: fresh, ΔW = 0.

What the same bytes do when they are spent on rank is said beside it: on a base that is already the best of its rank,
a correction of rank c gives the best of rank r + c and nothing more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import BaseAdapter
from ..adapt.core import Adapter as Core
from ..adapt.lora import Adapter as LoRA
from ..data import Data
from ..factorize import form
from ..fit import Judge, read_batches
from ..model import OpenedModel
from ..model.layers import FactorizedLayer
from ..progress import Progress
from .closed import Wanted, apart_of, core, relative, residual
from .closed_pass import BATCH, HELD_SAMPLES, Seen, Tried, evenly, observe

#: Kinds that have a closed form.
KINDS = ("lora", "core")
NOTHING_LOST = "nothing is lost here beyond rounding"
#: How the wanted answers are blended with the original's own.
BETAS = (0.0, 0.5, 1.0)
#: An error nearer than this share to that of the same bytes spent on rank is the same.
_AS_WELL = 1e-3
#: A relative error below this is the rounding of single-precision products.
ROUNDING = 1e-3
#: A correction takes at least this share of its layer's error, or is not worth its bytes.
WORTH = 0.01


class Corrected(Tried):
    """`rows`: {layer, kind, rank, bytes, error_before, error_after, error_of_rank, blend, applied, reason}.

    Errors are relative, of held-out answers; `before` and `after` are what the network loses on held-out inputs.
    """


def correct(
    opened: OpenedModel,
    original: nn.Module,
    module: nn.Module,
    adapters: Mapping[str, BaseAdapter],
    *,
    fit: Data,
    held: Data,
    betas: Sequence[float] = BETAS,
    decide: Callable[[], float] | None = None,
    progress: Progress | None = None,
) -> Corrected:
    """Set the fresh, active `adapters` of `module` (on the CPU) in place, solving with `fit` and deciding by `held`.

    `decide`: what `module` loses on held-out inputs; default: the squared distance to the original's answers.
    Raises `ModelError` where the data decide which layers of the network are called; nothing is changed then.
    """
    fresh = {name: adapter.tensors() for name, adapter in adapters.items()}
    fresh = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in fresh.items()}
    if decide is None:
        judge = Judge(opened, original, read_batches(evenly(held, HELD_SAMPLES), BATCH))
        decide = functools.partial(judge.loss, module)
    before = decide()
    rows = []

    def take_back() -> None:
        for name, adapter in adapters.items():
            _put(adapter, fresh[name])

    try:
        with torch.no_grad():
            for seen in observe(opened, original, module, list(adapters), fit=fit, held=held, progress=progress):
                if not isinstance(seen, Seen):
                    rows.append(_row(seen[0], adapters[seen[0]], reason=seen[1]))
                    continue
                layer = module.get_submodule(seen.path)
                assert isinstance(layer, FactorizedLayer)
                rows.append(_correct_one(layer, adapters[seen.name], seen, betas))
    except BaseException:
        take_back()
        raise
    after = decide()
    if not after < before:
        take_back()
        reason = "all corrections together do not lower what the network loses on held-out inputs"
        rows = [{**row, "applied": False, "reason": reason if row["applied"] else row["reason"]} for row in rows]
        after = before
    return Corrected(tuple(rows), before, after)


def refusal(adapter: BaseAdapter, layer: FactorizedLayer) -> str | None:
    """Return why an adapter has no closed form on a layer, or None."""
    if adapter.kind not in KINDS:
        return f"{adapter.kind} has no closed form in the metric of correlated inputs: train it"
    if adapter.magnitude is not None:
        return "a weight-decomposed adapter has no closed form: train it"
    if adapter.scaling == 0:
        return "its scaling is 0"
    if layer.layer_kind == "conv_transpose":
        return "there are no statistics of transposed convolutions: train it"
    if isinstance(adapter, LoRA):
        if "lora_mid" in adapter._parameters:
            return "a middle tensor has no closed form: train it"
        if adapter.groups > 1 and adapter.rank % adapter.groups:
            return f"filters shared by groups have no closed form: take a rank that {adapter.groups} divides"
    return None


def _correct_one(layer: FactorizedLayer, adapter: BaseAdapter, seen: Seen, betas: Sequence[float]) -> dict[str, Any]:
    """Set one adapter by the blend that loses least on held-out answers; leave it as it is if none helps."""
    why = refusal(adapter, layer)
    if why is not None:
        return _row(seen.name, adapter, reason=why)
    bias, base = layer.bias, layer.weight.double()
    fit, held = seen.wanted(bias, held=False), seen.wanted(bias, held=True)
    before = held.loss(base)
    if relative(before, seen.total) < ROUNDING:
        error = relative(before, seen.total)
        return _row(seen.name, adapter, reason=NOTHING_LOST, error_before=error, error_after=error)
    kept = {k: t.clone() for k, t in adapter.tensors().items()}
    best, tensors, beta = before, kept, 0.0
    for b in betas if fit.drift is not None else (0.0,):
        try:
            found = solved(adapter, layer, fit.target(b) - base, fit)
        except ValueError as e:
            return _row(seen.name, adapter, reason=str(e))
        _put(adapter, found)
        loss = held.loss(base + adapter.plain_delta(layer).double())
        if loss < best:
            best, tensors, beta = loss, {k: t.clone() for k, t in adapter.tensors().items()}, b
    _put(adapter, tensors)
    before, after = relative(before, seen.total), relative(best, seen.total)
    row: dict[str, Any] = {"error_before": before, "error_after": after, "blend": beta}
    if not after <= (1 - WORTH) * before:
        _put(adapter, kept)
        return _row(seen.name, adapter, reason=_not_worth(before, after), **row)
    rank, rank_loss = _spent_on_rank(layer, adapter, fit, held, beta)
    other = None if rank_loss is None else relative(rank_loss, seen.total)
    return _row(seen.name, adapter, applied=True, reason=_worth(after, other, rank), error_of_rank=other, **row)


def solved(adapter: BaseAdapter, layer: FactorizedLayer, error: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    """Return the tensors of an adapter that take most of `error` (shaped like the weight), its scaling divided out."""
    if isinstance(adapter, Core):
        parts = core(error, layer.form, layer.factors, adapter.rank, wanted.metric)
        parts[0] = parts[0] / adapter.scaling
        return dict(zip(("core_R",) if len(parts) == 1 else ("core_P", "core_Q"), parts, strict=True))
    assert isinstance(adapter, LoRA)
    b, a = residual(error, adapter.lora_B.shape[1], wanted.metric)
    return {"lora_A": a, "lora_B": b / adapter.scaling}


def _put(adapter: BaseAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters, which stay the same objects."""
    with torch.no_grad():
        for name, value in tensors.items():
            own = adapter._parameters[name]
            assert own is not None
            own.copy_(value.reshape(own.shape))


def _spent_on_rank(
    layer: FactorizedLayer, adapter: BaseAdapter, fit: Wanted, held: Wanted, beta: float
) -> tuple[int, float | None]:
    """Return the rank that base and adapter together would pay for, and the loss of the best weight of that rank."""
    if layer.form == "dense":
        return 0, None
    numbers = sum(f.numel() for f in layer.factors.values() if f.is_floating_point())
    numbers += sum(t.numel() for t in adapter.tensors().values())
    target = apart_of(fit.target(beta), fit.metric.groups)
    name = "svd" if fit.metric.groups == 1 else "grouped_svd"
    rank = min(numbers // form(name).n_params(tuple(target.shape), 1), form(name).full_rank(tuple(target.shape)))
    if rank < 1:
        return 0, None
    best = form(name).decompose(target, rank, fit.metric).to_tensor()
    return rank, held.loss(best.reshape(layer.shape))


def _not_worth(before: float, after: float) -> str:
    if after >= before:
        return "it does not lower the error of held-out answers"
    return f"it lowers the error of held-out answers by less than {WORTH:.0%}: not worth its bytes"


def _worth(after: float, other: float | None, rank: int) -> str:
    if other is None:
        return "it lowers the error of held-out answers"
    does = "less" if other > after * (1 + _AS_WELL) else "more" if other < after * (1 - _AS_WELL) else "as well"
    return f"the same bytes spent on rank do {does}: rank {rank} leaves {other:.3g}"


def _row(
    layer: str, adapter: BaseAdapter, *, reason: str, applied: bool = False, error_before: float | None = None,
    error_after: float | None = None, error_of_rank: float | None = None, blend: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    size = sum(t.numel() * t.element_size() for t in adapter.tensors().values())
    return {
        "layer": layer, "kind": adapter.kind, "rank": adapter.rank, "bytes": size, "error_before": error_before,
        "error_after": error_after, "error_of_rank": error_of_rank, "blend": blend, "applied": applied, "reason": reason,
    }  # fmt: skip
