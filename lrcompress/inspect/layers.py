"""Look at one layer: its spectra, the form that represents it best at equal parameters, whether that is worth it.

found = look(layer, statistics, Terms(share=0.5))
found.facts()["best"]["form"], found.why
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..factorize import Statistics, form
from ..factorize._types import relative
from ..model.surgery import Layer
from ..plan.options import bias_cost
from .comparing import Candidate, LeftOut, compare
from .spectra import Spectrum

#: Shares of the energy whose rank and size are reported.
ENERGIES = (0.90, 0.95, 0.99)
#: A loss below this share of the weight's energy is rounding: no ratio is formed with it.
_NOTHING = 1e-24


@dataclass(frozen=True)
class Terms:
    """What forms are compared at: `share` of a layer's numbers; `max_loss`, the share of its energy that may be lost there."""

    share: float = 0.5
    max_loss: float = 0.25
    all_forms: bool = False


@dataclass(frozen=True)
class Found:
    """What was seen of one layer. `plain` is None where there are no numbers to look at, `weighted` without statistics."""

    layer: Layer
    plain: Spectrum | None
    weighted: Spectrum | None
    total: float
    candidates: Sequence[Candidate]
    left_out: Sequence[LeftOut]
    why: str | None

    @property
    def spectrum(self) -> Spectrum | None:
        """The spectrum in the metric that forms were compared in."""
        return self.weighted or self.plain

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None

    def rel_error(self, candidate: Candidate) -> float:
        return relative(candidate.loss, self.total)

    def facts(self) -> dict[str, Any]:
        """Return the layer as plain values, `why` telling why it is not worth factorizing (None: it is)."""
        shape, size = self.layer.shape, self.layer.weight.numel()
        spectra = {"plain": self.plain, "weighted": self.weighted}
        return {
            "name": self.layer.name,
            "kind": self.layer.kind,
            "shape": list(shape),
            "params": size,
            "norm": None if self.spectrum is None else self.spectrum.norm,
            "spectrum": {k: None if s is None else _spectrum_facts(s, self.layer) for k, s in spectra.items()},
            "forms": [
                {
                    "form": c.form,
                    "rank": list(c.rank) if isinstance(c.rank, tuple) else c.rank,
                    "params": c.n_params,
                    "rel_error": self.rel_error(c),
                    "macs_ratio": c.macs_ratio,
                }
                for c in self.candidates
            ],
            "best": self._best_facts(),
            "not_compared": [{"form": n.form, "cause": n.cause, "why": n.why} for n in self.left_out],
            "worth": self.why is None,
            "why": self.why,
        }

    def _best_facts(self) -> dict[str, Any] | None:
        if self.best is None:
            return None
        plain_svd = next((c for c in self.candidates if c.form == svd_of(self.layer)), None)
        second = self.candidates[1] if len(self.candidates) > 1 else None
        return {
            "form": self.best.form,
            "loss_over_svd": self._ratio(plain_svd),
            "runner_up": None if second is None else second.form,
            "loss_over_runner_up": self._ratio(second),
        }

    def _ratio(self, other: Candidate | None) -> float | None:
        """Return the best loss over another's; None where that is nothing, or there is no other."""
        if other is None or self.best is None or not other.loss > _NOTHING * self.total:
            return None
        return self.best.loss / other.loss


def svd_of(layer: Layer) -> str:
    """Return the form that is the plain SVD of a layer, group by group where it has groups."""
    return "grouped_svd" if layer.kind == "grouped" else "svd"


def _spectrum_facts(spectrum: Spectrum, layer: Layer) -> dict[str, Any]:
    energies, size = [], layer.weight.numel()
    for share in ENERGIES:
        rank = spectrum.rank_at(share)
        numbers = form(svd_of(layer)).n_params(layer.shape, rank)
        energies.append({"energy": share, "rank": rank, "params": numbers, "params_ratio": numbers / size})
    return {
        "norm": spectrum.norm,
        "full_rank": len(spectrum.squares),
        "stable_rank": spectrum.stable_rank,
        "effective_rank": spectrum.effective_rank,
        "energies": energies,
    }


def look(layer: Layer, statistics: Statistics | None, terms: Terms) -> Found:
    """Measure one layer; `statistics` that hold no moments (a layer that was never reached) count as none."""
    if statistics is not None and statistics.norm == "frobenius":
        statistics = None
    unusable = _unusable(layer)
    if unusable is not None:
        return Found(layer, None, None, 0.0, (), (), layer.reason or unusable)
    grouped = layer.kind == "grouped"
    plain = Spectrum.of(layer.weight, grouped=grouped)
    weighted = None if statistics is None else Spectrum.of(layer.weight, statistics, grouped=grouped)
    total = (statistics or Statistics()).loss(layer.weight)
    if layer.reason is not None:
        return Found(layer, plain, weighted, total, (), (), layer.reason)
    budget = math.floor(terms.share * layer.weight.numel()) - bias_cost(layer, statistics)
    candidates, left_out = compare(layer, statistics, weighted or plain, budget, all_forms=terms.all_forms)
    why = _why_not(layer, total, candidates, budget, terms)
    return Found(layer, plain, weighted, total, candidates, left_out, why)


def _unusable(layer: Layer) -> str | None:
    """Return why there are no numbers to look at, or None."""
    weight = layer.weight
    if weight.is_meta:
        return "its weight is on the meta device: there are no numbers"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not floating point"
    if weight.numel() == 0:
        return "its weight has no elements"
    return None if bool(torch.isfinite(weight).all()) else "its weight is not finite"


def _why_not(layer: Layer, total: float, candidates: Sequence[Candidate], budget: int, terms: Terms) -> str | None:
    size = layer.weight.numel()
    if not bool(layer.weight.any()):
        return "all zeros: nothing to represent"
    if not candidates:
        least = form(svd_of(layer)).n_params(layer.shape, 1)
        return f"would not shrink: rank 1 takes {least:,} numbers, the budget is {max(budget, 0):,} of {size:,}"
    lost = candidates[0].loss / total if total > 0 else 0.0
    if lost > terms.max_loss:
        return f"flat spectrum: at {terms.share:.0%} of its numbers even {candidates[0].form} loses {lost:.1%} of its energy, more than {terms.max_loss:.0%}"
    return None
