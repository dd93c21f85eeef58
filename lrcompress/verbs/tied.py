"""Tied weights in a choice of forms: chosen once, by what all their layers feel, and the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..factorize import Statistics, form
from ..model.surgery import Layer
from ..model.ties import can_share, combined
from ..plan import Choice, read_plan, select

Ties = Mapping[str, Sequence[str]]


def weighed(layers: Sequence[Layer], ties: Ties, statistics: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Return the statistics to decompose by: those of a tied weight price all its places."""
    by_name = {layer.name: layer for layer in layers}
    found = dict(statistics)
    for leader, followers in ties.items():
        both = combined([by_name[n] for n in (leader, *followers)], statistics)
        if both is not None:
            found[leader] = both
    return found


def choose(
    layers: Sequence[Layer], ties: Ties, *, total: int, statistics: Mapping[str, Statistics], **how: Any
) -> list[Choice]:
    """Return one choice per layer for a model of `total` numbers; a tied weight is offered, and paid for, once."""
    followers = {n for names in ties.values() for n in names}
    heads = [layer for layer in layers if layer.name not in followers]
    chosen = select(heads, statistics=statistics, fixed_params=total - sum(n.weight.numel() for n in heads), **how)
    return spread(layers, ties, {c.name: c for c in chosen})


def planned(path: Path, layers: Sequence[Layer], ties: Ties, model_digest: str | None = None) -> list[Choice]:
    """Return the choices of a plan file, which may name a tied weight by any of its layers. Raises `PlanError`."""
    choices = {c.name: c for c in read_plan(path, layers, model_digest)}
    for leader, followers in ties.items():
        members = [leader, *followers]
        named = [choices[n] for n in members if choices[n].form != "dense"]
        if len({(c.form, c.rank) for c in named}) > 1:
            raise PlanError(
                f"{path}: {leader}",
                f"one form and rank for the tied layers {', '.join(members)}",
                f"{len(named)} of them",
            )
        if named:
            size = int(form(named[0].form).n_params(next(n.shape for n in layers if n.name == leader), named[0].rank))
            choices[leader] = Choice(leader, named[0].form, named[0].rank, size)
    return spread(layers, ties, choices)


def spread(layers: Sequence[Layer], ties: Ties, choices: Mapping[str, Choice]) -> list[Choice]:
    """Let every tied layer become what its leader does, or stay dense with it."""
    by_name = {layer.name: layer for layer in layers}
    out = dict(choices)
    for leader, followers in ties.items():
        chosen = choices[leader]
        kinds = {by_name[n].kind for n in (leader, *followers)}
        if chosen.form != "dense" and not can_share(chosen.form, kinds):
            out[leader] = chosen = Choice(
                leader,
                "dense",
                0,
                by_name[leader].weight.numel(),
                f"{chosen.form} does not serve {' and '.join(sorted(kinds))}",
            )
        for n in followers:
            reason = (
                f"shares the factors of {leader}" if chosen.form != "dense" else f"tied to {leader}: {chosen.reason}"
            )
            out[n] = Choice(n, chosen.form, chosen.rank, 0, reason)
    return [out[layer.name] for layer in layers]
