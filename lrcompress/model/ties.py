"""Tied weights: one tensor in two layers is factorized once, and both layers hold the same factors.

An embedding (V, d) and the output layer that reads it have one weight of one shape: rows of U then V for the
lookup, V then U for the scores. What the two feel differs, a token frequency here, a covariance there; `combined`
prices an error by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..factorize import Factorization, Statistics, form
from .layers import FactorizedLayer
from .surgery import TIED, Layer

#: Layers that may hold the same factors. A convolution shares with convolutions: the walk is no part of the factors.
_SHARING = ({"linear", "embedding"}, {"conv"})


def lift_ties(model: nn.Module, layers: Sequence[Layer]) -> tuple[list[Layer], dict[str, list[str]]]:
    """Return the layers with the reason lifted from ties that can be kept, and {leader: followers}.

    A tie can be kept where every holder of the tensor is a layer in `layers` that nothing else keeps dense. An
    embedding leads, since forms know to weight its rows.
    """
    holders: dict[object, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        holders.setdefault(place(value), []).append(name)
    members: dict[object, list[Layer]] = {}
    for layer in layers:
        if layer.reason is not None and layer.reason.startswith(TIED):
            members.setdefault(place(layer.weight), []).append(layer)
    lifted: set[str] = set()
    ties: dict[str, list[str]] = {}
    for key, group in members.items():
        own = sorted(f"{layer.name}.weight" for layer in group)
        if (
            len(group) < 2
            or sorted(holders.get(key, ())) != own
            or not any({n.kind for n in group} <= s for s in _SHARING)
        ):
            continue
        leader, *followers = sorted(group, key=lambda n: n.kind != "embedding")
        ties[leader.name] = [n.name for n in followers]
        lifted |= {n.name for n in group}
    return [replace(n, reason=None) if n.name in lifted else n for n in layers], ties


def tied_tensors(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Return {leader: followers} of a bare state dict's layers: names of one tensor."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        if layer.reason is None:
            groups.setdefault(place(layer.weight), []).append(layer)
    sorted_groups = (sorted(g, key=lambda n: n.kind != "embedding") for g in groups.values() if len(g) > 1)
    return {leader.name: [n.name for n in rest] for leader, *rest in sorted_groups}


def place(value: Tensor) -> tuple[object, ...]:
    """Return where a tensor lies and how it is read: equal for tied ones only."""
    if value.is_meta or not value.numel():
        return (id(value),)
    return value.data_ptr(), tuple(value.shape), value.stride()


def can_share(form_name: str, kinds: set[str]) -> bool:
    """Return whether a form serves all these kinds, so that one set of factors is enough."""
    return bool(kinds <= form(form_name).LAYERS)


def combined(group: Sequence[Layer], statistics: Mapping[str, Statistics]) -> Statistics | None:
    """Return moments that price one error in all places where a tied weight acts; None without statistics.

    Each place feels ⟨Δ, R Δ C⟩. The sum of such terms is no single product; this is the product of its marginals,
    ΣR·tr(C) and ΣC·tr(R) over the total: exact for one term, and right in every row and every column total. Terms
    count by how much the answer feels them where gradients were taken, and by their share of the weight otherwise.
    """
    found = [(n, statistics[n.name]) for n in group if statistics.get(n.name, Statistics()).norm != "frobenius"]
    if not found:
        return None
    embedding = any(n.kind == "embedding" for n in group)
    comparable = all(s.output_gram is not None for _, s in found)
    weight = group[0].weight.double().reshape(group[0].shape[0], -1)
    rows = columns = total = None
    for layer, s in found:
        r, c = _sides(layer, s, weight, vector=embedding)
        term = weight * (r[:, None] * weight @ c if r.dim() == 1 else r @ weight @ c)
        scale = s.positions if comparable else 1.0 / max(float(term.sum()), 1e-300)
        tr_r, tr_c = float(r.sum() if r.dim() == 1 else r.trace()), float(c.trace())
        rows = scale * tr_c * r + (0 if rows is None else rows)
        columns = scale * tr_r * c + (0 if columns is None else columns)
        total = scale * tr_r * tr_c + (0.0 if total is None else total)
    assert rows is not None and columns is not None and total is not None
    rows = rows / max(total, 1e-300)
    count = sum(s.count for _, s in found)
    if not embedding:
        return Statistics(gram=columns, output_gram=rows, count=count)
    share = float(rows.sum())
    return Statistics(row_weights=rows / max(share, 1e-300), output_gram=columns * share, count=count)


def _sides(layer: Layer, s: Statistics, weight: Tensor, *, vector: bool) -> tuple[Tensor, Tensor]:
    """Return R (a vector if asked for) and C of one place. A layer without a bias feels the mean of its input too."""
    m, n = weight.shape
    if layer.kind == "embedding":
        assert s.row_weights is not None
        return s.row_weights.double(), torch.eye(
            n, dtype=torch.float64
        ) if s.output_gram is None else s.output_gram.double()
    assert s.gram is not None
    columns = s.gram.double()
    if not layer.has_bias and s.mean is not None:
        columns = columns + torch.outer(s.mean.double(), s.mean.double())
    if s.output_gram is None:
        return torch.ones(m, dtype=torch.float64) if vector else torch.eye(m, dtype=torch.float64), columns
    return s.output_gram.double().diagonal().clone() if vector else s.output_gram.double(), columns


def for_member(found: Factorization, layer: Layer, statistics: Statistics | None) -> Factorization:
    """Return the shared factors as one layer takes them: with its own shift where it has a bias to carry it."""
    shift = None
    if layer.kind != "embedding" and layer.has_bias and statistics is not None and statistics.mean is not None:
        error = layer.weight.double() - found.to_tensor().double()
        shift = (error.reshape(len(error), -1) @ statistics.mean.double()).to(layer.weight.dtype)
    return replace(found, bias_shift=shift)


def share_factors(model: nn.Module, leader: str, followers: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Let factorized layers hold the very factors of another: all of them, or those in `names`."""
    source = model.get_submodule(leader)
    assert isinstance(source, FactorizedLayer)
    for name in followers:
        target = model.get_submodule(name)
        assert isinstance(target, FactorizedLayer)
        for factor in source.factor_names if names is None else names:
            own = "_parameters" if factor in source._parameters else "_buffers"
            getattr(target, own)[factor] = getattr(source, own)[factor]


def shared_with(layers: Sequence[tuple[str, FactorizedLayer]]) -> dict[str, str]:
    """Return {layer: the first layer that holds the very same factors}."""
    first: dict[tuple[int, ...], str] = {}
    out = {}
    for name, layer in layers:
        key = tuple(id(f) for f in layer.factors.values())
        if first.setdefault(key, name) != name:
            out[name] = first[key]
    return out


def bases_with(layers: Sequence[tuple[str, FactorizedLayer]]) -> dict[str, dict[str, str]]:
    """Return {layer: {factor: the first layer that holds it}} for single factors held by several layers."""
    first: dict[int, str] = {}
    out: dict[str, dict[str, str]] = {}
    for name, layer in layers:
        for key, value in layer.factors.items():
            if first.setdefault(id(value), name) != name:
                out.setdefault(name, {})[key] = first[id(value)]
    return out


__all__ = [
    "bases_with",
    "can_share",
    "combined",
    "for_member",
    "lift_ties",
    "place",
    "share_factors",
    "shared_with",
    "tied_tensors",
]
