"""What fewer bits lose in a network: predicted for each layer, scaled by measurements of the whole."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnxruntime as ort
import torch
from torch import Tensor

from ..data import Data
from ..errors import LrcompressWarning
from ..export.graph import trace
from ..export.quantize import quantize
from ..export.rewrites import simplify
from ..fit import Bench
from ..fit.rounding import with_bits
from ..plan import Menu
from ..plan.bits import BLOCK, Precision, input_loss, precisions, rounding_loss
from ..runtime import session_options
from .export import calibration_feeds
from .planning import Prepared

Noise = dict[str, dict[Precision, float]]
#: How far measured rounding may lie from what is predicted before it is taken for noise.
_TRUST = 30.0


def rounding_noise(
    menus: Sequence[Menu], prepared: Prepared, bits: Sequence[int], steps: Mapping[str, float],
    factors: Mapping[str, float],
) -> Noise:  # fmt: skip
    """Return what rounding loses, by layer and precision, in the unit of the menus."""
    usual = sorted(factors.values())[len(factors) // 2] if factors else 1.0
    found: dict[str, dict[Precision, float]] = {}
    for m in menus:
        layer, statistics = m.layer, prepared.priced.get(m.layer.name)
        if layer.reason is not None:
            found[layer.name] = {}
            continue
        scale = factors.get(layer.name, usual) * (statistics.scale if statistics is not None else 1.0)
        if statistics is None or statistics.output_gram is None:  # relative losses, as in the menu
            energy = layer.energy(statistics)
            scale = factors.get(layer.name, usual) / energy if energy > 0 else 0.0
        found[layer.name] = {
            p: scale * rounding_loss(layer, p.bits, statistics, p.block or BLOCK)
            for p in precisions(bits)
            if p.bits != 32
        }
        if 8 in bits:
            found[layer.name][Precision(8)] += scale * input_loss(layer, steps.get(layer.name, 0.0), statistics)
    return found


def measured_noise(
    bench: Bench, menus: Sequence[Menu], noise: Mapping[str, Mapping[Precision, float]], bits: Sequence[int],
    kinds: Mapping[str, str],
) -> Noise:  # fmt: skip
    """Scale what rounding loses by a measurement of the whole network in each precision of 8 and 4 bits.

    Depthwise layers have no moments; rounding is measured of each alone.
    """
    scale = {}
    names = [m.layer.name for m in menus if m.layer.reason is None]
    for p in (p for p in precisions(bits) if p.bits in (8, 4)):
        predicted = sum(noise[n].get(p, 0.0) for n in names)
        loss = bench.loss({}, changed=functools.partial(with_bits, bits=dict.fromkeys(names, p), kinds=kinds))
        if loss is not None and math.isfinite(loss) and predicted > 0:
            scale[p] = min(max(loss / predicted, 1 / _TRUST), _TRUST)
    found = {n: {p: v * scale.get(p, 1.0) for p, v in own.items()} for n, own in noise.items()}
    for m in menus:
        if m.layer.reason is not None and m.layer.may_be_rounded:
            found[m.layer.name] = _alone(bench, m.layer.name, bits, kinds)
    return found


def _alone(bench: Bench, name: str, bits: Sequence[int], kinds: Mapping[str, str]) -> dict[Precision, float]:
    """Return what rounding one layer loses, where that can be measured."""
    found = {}
    for p in (p for p in precisions(bits) if p.bits != 32):
        loss = bench.loss({}, changed=functools.partial(with_bits, bits={name: p}, kinds=kinds))
        if loss is not None and math.isfinite(loss):
            found[p] = max(loss, 0.0)
    return found


def won_by_refits(
    prepared: Prepared, bench: Bench, menus: Sequence[Menu], kinds: Mapping[str, str], data: Data | None
) -> float:
    """Return what share of the loss of 4 bits is left when the export has refitted: both measured on the dense network."""
    names = [m.layer.name for m in menus if m.layer.reason is None]
    four = dict.fromkeys(names, Precision(4, BLOCK))
    plain = bench.loss({}, changed=functools.partial(with_bits, bits=four, kinds=kinds))
    if plain is None or not plain > 0 or not math.isfinite(plain) or data is None:
        return 1.0
    try:
        model, _ = simplify(
            trace(replace(prepared.opened, module=prepared.network), prepared.network, where="lrcompress plan")
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LrcompressWarning)
            small = quantize(model, 4, slots=(), calibration=calibration_feeds(data)).model
        session = ort.InferenceSession(
            small.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
        )
    except (
        Exception
    ):  # ONNX Runtime's errors have no common base: what cannot be exported, export refuses with the reason
        return 1.0
    outputs, wanted = [o.name for o in session.get_outputs()], {i.name for i in session.get_inputs()}

    def answers(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(outputs, {k: v.numpy() for k, v in batch.items() if k in wanted})
        return {n: torch.from_numpy(v) for n, v in zip(outputs, found, strict=True)}

    return min(max(bench.judge.loss_of(answers) / plain, 1e-4), 1.0)
