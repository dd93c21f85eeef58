"""From what a payload ships to what a slot takes: every kind's own factors, expanded exactly to a low-rank pair.

    lora  the slot's own A and B                    core  R, or P and Q with R = P Q, between the factors of a layer,
                                                          of a grouped convolution one per group: (groups, …)
    loha  (B₁A₁)∘(B₂A₂) = (B₁•B₂)(A₁⊙A₂)            lokr  W₁⊗(a b) = (W₁⊗a)(I⊗b) = (I⊗a)(W₁⊗b), the shorter one
    lokh  Σ A₁⊙A₂⊙…: no low rank, so ΔW and an identity
    dora  s∘(W + B A): the slot's own A and B, s folded into B, and s, which the slot multiplies W x by

Scaling is folded in before. Tensors of a kind are called `<layer>.<name>` and have the shape of the stored weight that
the slot implies, (out, in·kernel): of an embedding, whose slot looks rows up, the transposed table's. Only LoKH, a chain
over the rows of the table, ships that of the table itself. A layer that is left alone has rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

#: Kind -> the kind of slot it fills.
KINDS = {"lora": "lora", "loha": "lora", "lokr": "lora", "lokh": "lora", "core": "core", "dora": "dora"}
#: Those that bring the slot's own A and B.
_PAIRS = ("lora", "dora")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_SETS: dict[str, tuple[frozenset[str], ...]] = {
    "loha": (frozenset(_LOHA),),
    "lokr": (frozenset({"lokr_w1", "lokr_w2"}), frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"})),
    "lokh": tuple(frozenset(f"lokh_{i}" for i in range(1, n + 1)) for n in range(1, 9)),
    "core": (frozenset({"core_R"}), frozenset({"core_P", "core_Q"})),
}
Tensors = Mapping[str, np.ndarray]


def own_names(slot: Mapping[str, Any], kind: str, given: Tensors) -> frozenset[str]:
    """Return the tensors that `kind` brings for one slot: the variant that fits what is there best."""
    if kind in _PAIRS:
        scale = (slot["scale"]["name"],) if "scale" in slot else ()
        return frozenset((*(t["name"] for t in slot["tensors"]), *scale))
    variants = [frozenset(f"{slot['layer']}.{n}" for n in names) for names in _SETS[kind]]
    here = frozenset().union(*variants) & given.keys()
    return min(variants, key=lambda names: (len(names ^ here), len(names)))


def sides(slot: Mapping[str, Any]) -> tuple[int, int]:
    """Return (out, in·kernel) of what the slot corrects."""
    a, b = (t["shape"] for t in slot["tensors"])
    return (int(b[0]), math.prod(a[1:])) if slot["op"] == "conv" else (int(b[1]), int(a[0]))


def chained(slot: Mapping[str, Any]) -> tuple[int, int]:
    """Return (rows, columns) of what a LoKH of the slot multiplies up to."""
    out, inner = sides(slot)
    return (inner, out) if slot.get("layer_kind") == "embedding" else (out, inner)


def rank_of(slot: Mapping[str, Any], kind: str, given: Tensors) -> int:
    """Return the rank that the slot will take. Raises `ValueError` where the tensors do not fit the slot."""
    out, inner = sides(slot)
    if kind in _PAIRS:
        if "scale" in slot:
            _exactly(given, slot["scale"]["name"], (out,))
        return _rank(given, [(t["name"], tuple(t["shape"])) for t in slot["tensors"]])
    own = {n.removeprefix(f"{slot['layer']}."): given[n] for n in own_names(slot, kind, given)}
    if kind == "loha":
        return _rank(own, list(zip(_LOHA, ((out, "r"), ("r", inner), (out, "r"), ("r", inner)), strict=True))) ** 2
    if kind == "core":
        groups = int(slot.get("groups", 1))
        each, r = out // groups, (groups,) if groups > 1 else ()
        if "core_R" in own:
            _exactly(own, "core_R", (*r, each, each))
            return out
        return groups * _rank(own, [("core_P", (*r, each, "r")), ("core_Q", (*r, "r", each))])
    if kind == "lokh":
        return _lokh_rank(own, *chained(slot))
    return _lokr_rank(slot, own, out, inner)


def _exactly(own: Tensors, name: str, shape: tuple[int, ...]) -> None:
    if own[name].shape != shape:
        raise ValueError(f"{name}: shape {list(shape)}, not {list(own[name].shape)}")


def _rank(own: Tensors, templates: list[tuple[str, tuple[int | str, ...]]]) -> int:
    """Return the one size that stands for every word of the templates."""
    ranks = set()
    for name, template in templates:
        shape = own[name].shape
        if len(shape) != len(template) or any(
            isinstance(t, int) and t != d for t, d in zip(template, shape, strict=True)
        ):
            raise ValueError(f"{name}: shape {list(template)}, not {list(shape)}")
        ranks.add(next(d for t, d in zip(template, shape, strict=True) if isinstance(t, str)))
    if len(ranks) != 1:
        raise ValueError(f"one rank for all factors, not {sorted(ranks)}")
    return int(ranks.pop())


def _lokr_rank(slot: Mapping[str, Any], own: Tensors, out: int, inner: int) -> int:
    w1 = own["lokr_w1"]
    if w1.ndim != 2 or 0 in w1.shape or out % w1.shape[0] or _channels(slot) % w1.shape[1]:
        raise ValueError(f"lokr_w1: a matrix that divides {out}×{_channels(slot)}, not {list(w1.shape)}")
    (m1, n1), m2, n2 = w1.shape, out // w1.shape[0], inner // w1.shape[1]
    if "lokr_w2" in own:
        _exactly(own, "lokr_w2", (m2, n2))
        return int(min(m1, n1) * min(m2, n2))
    return int(min(m1, n1)) * _rank(own, [("lokr_w2_a", (m2, "r")), ("lokr_w2_b", ("r", n2))])


def _channels(slot: Mapping[str, Any]) -> int:
    """Return the columns of the weight without its kernel: W₁ divides those."""
    shape = slot["tensors"][0]["shape"]
    return int(shape[1] if slot["op"] == "conv" else shape[0])


def _lokh_rank(own: Tensors, out: int, inner: int) -> int:
    names = [f"lokh_{i}" for i in range(1, len(own) + 1)]
    if any(own[n].ndim != 3 for n in names):
        raise ValueError("lokh factors: three axes (terms, rows, columns)")
    if math.prod(own[n].shape[1] for n in names) != out or {own[n].shape[2] for n in names} != {inner}:
        raise ValueError(
            f"lokh factors: {out} rows as a product, {inner} columns, not {[list(own[n].shape) for n in names]}"
        )
    terms = {own[n].shape[0] for n in names}
    if len(terms) != 1:
        raise ValueError(f"lokh factors: one number of terms, not {sorted(terms)}")
    return min(out, inner) if terms.pop() else 0


def expand(slot: Mapping[str, Any], kind: str, given: Tensors) -> list[np.ndarray]:
    """Return [A, B] as the slot takes them. Call `rank_of` first: what it accepts always expands."""
    if kind in _PAIRS:
        return [given[t["name"]] for t in slot["tensors"]]
    own = {n.removeprefix(f"{slot['layer']}."): np.asarray(given[n], np.float64) for n in own_names(slot, kind, given)}
    if kind == "lokh":
        a, b = _lokh(own, *chained(slot))
        a, b = (b.T, a.T) if slot.get("layer_kind") == "embedding" else (a, b)
    else:
        a, b = {"loha": _loha, "lokr": _lokr, "core": _core}[kind](own, *sides(slot))
    return as_slot(slot, a, b)


def as_slot(slot: Mapping[str, Any], a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """Return ΔW = b·a, a (r, in·kernel) and b (out, r), in the layout of the slot's two tensors."""
    if slot["op"] == "linear":
        return [a.T, b.T]
    kernel = slot["tensors"][0]["shape"][1:]
    return [a.reshape(len(a), *kernel), b.reshape(*b.shape, *(1,) * (len(kernel) - 1))]


def _loha(own: Tensors, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    w1a, w1b, w2a, w2b = (own[n] for n in _LOHA)
    rank = w1a.shape[1] * w2a.shape[1]
    b = np.einsum("or,os->ors", w1a, w2a).reshape(out, rank)
    return np.einsum("rn,sn->rsn", w1b, w2b).reshape(rank, inner), b


def _lokr(own: Tensors, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    w1 = own["lokr_w1"]
    m1, n1 = w1.shape
    if "lokr_w2" in own:
        w2 = own["lokr_w2"]
        a, b = (np.eye(len(w2)), w2) if w2.shape[0] <= w2.shape[1] else (w2, np.eye(w2.shape[1]))
    else:
        a, b = own["lokr_w2_a"], own["lokr_w2_b"]
    left, right = (w1, np.eye(n1)) if n1 <= m1 else (np.eye(m1), w1)
    rank = left.shape[1] * a.shape[1]
    return np.einsum("pb,rd->prbd", right, b).reshape(rank, inner), np.einsum("ap,cr->acpr", left, a).reshape(out, rank)


def _lokh(own: Tensors, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    product = own["lokh_1"]
    if not len(product):
        return np.zeros((0, inner)), np.zeros((out, 0))
    for i in range(2, len(own) + 1):
        product = np.einsum("kin,kjn->kijn", product, own[f"lokh_{i}"]).reshape(len(product), -1, inner)
    delta = product.sum(0)
    return (delta, np.eye(out)) if out <= inner else (np.eye(inner), delta)


def _core(own: Tensors, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """R, or P and Q, those of groups along the diagonal."""
    whole = {n: v if v.ndim == 2 else _block_diagonal(v) for n, v in own.items()}
    if "core_R" in whole:
        return whole["core_R"], np.eye(out)
    return whole["core_Q"], whole["core_P"]


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    groups, rows, columns = blocks.shape
    found = np.zeros((groups, rows, groups, columns), blocks.dtype)
    found[np.arange(groups), :, np.arange(groups)] = blocks
    return found.reshape(groups * rows, groups * columns)
