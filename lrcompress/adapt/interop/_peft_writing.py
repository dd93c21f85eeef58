"""Writing PEFT's layout: the configuration that makes PEFT build the same tensors, and what it cannot hold."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import ModelError
from .. import BaseAdapter, adapter
from ..lokr import Adapter as LoKr

PREFIX = "base_model.model."
#: Kinds that PEFT knows by these names, and the layers it knows them on.
KNOWN = {
    "lora": {("linear", 2), ("embedding", 2), ("conv", 3), ("conv", 4), ("conv", 5)},
    "loha": {("linear", 2), ("conv", 3), ("conv", 4)},
    "lokr": {("linear", 2), ("conv", 3), ("conv", 4)},
}


def write(adapters: Mapping[str, BaseAdapter], *, strict: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of `adapters`, which are of one kind.

    `strict`: exactly what PEFT loads; else what it does not know (kinds, layers, cores, factors) goes along under our
    own names.
    """
    kind = next(iter(adapters.values())).kind
    if strict:
        for name, a in adapters.items():
            _check_known(name, a)
    plain = {n: _for_peft(n, a, strict) for n, a in sorted(adapters.items())}
    rslora = kind == "lora" and all(a.rslora for a in plain.values())
    ranks = {n: a.rank for n, a in plain.items()}
    alphas = {n: a.alpha if a.rslora == rslora else a.scaling * a.rank for n, a in plain.items()}
    rank, alpha = _most(ranks), _most(alphas)
    config: dict[str, Any] = {
        "peft_type": kind.upper(), "r": rank, "lora_alpha" if kind == "lora" else "alpha": alpha,
        "target_modules": "|".join(re.escape(n) for n in plain),
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
    }  # fmt: skip
    config |= _own_settings(kind, plain, rslora, strict)
    tensors: dict[str, Tensor] = {}
    for name, a in plain.items():
        for key, value in _named(a).items():
            tensors[f"{PREFIX}{name}.{key}"] = value.detach().contiguous().clone()
    return config, {k: tensors[k] for k in sorted(tensors)}


def _most(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _check_known(name: str, a: BaseAdapter) -> None:
    where = f"layer {name}"
    if a.kind not in KNOWN:
        raise ModelError(where, f"a kind that PEFT knows ({', '.join(KNOWN)})", a.kind, "expand it with --to lora")
    if (a.layer_kind, len(a.weight_shape)) not in KNOWN[a.kind]:
        got = f"{a.layer_kind} over {len(a.weight_shape) - 2} axes"
        raise ModelError(where, f"a layer that PEFT's {a.kind} knows", got, "leave the layer out")
    if a.magnitude is not None and a.kind != "lora":
        raise ModelError(where, "a weight decomposition that PEFT knows (lora)", a.kind, "merge it")
    if a.magnitude is not None and (a.magnitude_axis != a.target.output_axis or a.groups > 1):
        raise ModelError(where, "magnitudes per output of an ungrouped layer", "others", "merge it")
    if "lokr_w2" in a.tensors() and len(a.weight_shape) == 3:
        raise ModelError(
            where,
            "a LoKr that PEFT multiplies as it should",
            "a whole W2 on a 1-D convolution",
            "expand it with --to lora",
        )


def _for_peft(name: str, a: BaseAdapter, strict: bool) -> BaseAdapter:
    """Return an equal adapter as PEFT stores it: filters of a group are its own, a middle tensor is multiplied in."""
    if a.kind != "lora" or not strict:
        return a
    found = a.tensors()
    if "lora_mid" in found:
        found = {**found, "lora_A": a.expand()[0].detach()}
        del found["lora_mid"]
    rank = a.rank
    if a.groups > 1 and found["lora_B"].shape[1] == rank:
        rank = a.rank * a.groups
        found["lora_A"] = found["lora_A"].repeat(a.groups, *(1,) * (found["lora_A"].dim() - 1))
    if rank == a.rank and found.keys() == a.tensors().keys():
        return a
    same = adapter("lora", weight_shape=a.weight_shape, rank=rank, alpha=a.scaling * rank, **_layer(a))
    same.load(found)
    return same


def _layer(a: BaseAdapter) -> dict[str, Any]:
    return {"groups": a.groups, "core": a.core, "layer_kind": a.layer_kind}


def _named(a: BaseAdapter) -> dict[str, Tensor]:
    """Return the tensors of one adapter under PEFT's names."""
    found, out = a.tensors(), dict[str, Tensor]()
    for name, value in found.items():
        if name == "magnitude" and a.kind == "lora":
            flat = value.flatten()
            out["lora_magnitude_vector"] = flat if value.dim() == 2 else flat.reshape(1, -1, *(1,) * (value.dim() - 2))
            if a.magnitude_axis != a.target.output_axis:
                out = {k: v for k, v in out.items() if k != "lora_magnitude_vector"} | {"magnitude": value}
        elif a.kind == "lora" and a.layer_kind == "embedding":
            out["lora_embedding_A" if name == "lora_B" else "lora_embedding_B"] = value.T
        elif name == "lora_A" and a.groups > 1 and found["lora_B"].shape[1] != a.rank:
            out["lora_A.weight"] = _dense_over_channels(value, a.groups)
        elif a.kind == "lora":
            out[f"{name}.weight"] = value
        elif name in ("hada_t1", "hada_t2", "lokr_t2") and len(a.weight_shape) == 3:
            out[name] = value[..., None]
        else:
            out[name] = value
    return out


def _dense_over_channels(a: Tensor, groups: int) -> Tensor:
    """Return A (r, in, *k) of a grouped LoRA: the filters of each group over its own channels, zeros elsewhere."""
    blocks = a.new_zeros(groups, len(a) // groups, groups, *a.shape[1:])
    for g, part in enumerate(a.chunk(groups)):
        blocks[g, :, g] = part
    return blocks.reshape(len(a), groups * a.shape[1], *a.shape[2:])


def _own_settings(kind: str, adapters: Mapping[str, BaseAdapter], rslora: bool, strict: bool) -> dict[str, Any]:
    if kind == "lora":
        dora = {a.magnitude is not None for a in adapters.values()}
        if strict and len(dora) > 1:
            raise ModelError("the adapter", "magnitudes on all layers or on none", "on some", "split it, or merge it")
        common = {"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "init_lora_weights": True}
        return common | {"use_rslora": rslora, "use_dora": dora == {True}}
    if kind not in KNOWN:
        return {}
    settings: dict[str, Any] = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}
    wanted = {n: {k: tuple(v.shape) for k, v in _named(a).items()} for n, a in adapters.items()}
    for own in _candidates(kind, adapters):
        if all(_peft_shapes(kind, a, own) == wanted[n] for n, a in adapters.items()):
            return settings | own
    if strict:
        remedy = "expand it with --to lora, or split it by shape"
        raise ModelError(f"the {kind} adapter", "factors that one configuration of PEFT makes", "others", remedy)
    return settings


def _candidates(kind: str, adapters: Mapping[str, BaseAdapter]) -> list[dict[str, Any]]:
    cores = any(n.endswith(("_t1", "_t2")) for a in adapters.values() for n in a.tensors())
    if kind == "loha":
        return [{"use_effective_conv2d": cores}]
    split = any("lokr_w1_a" in a.tensors() for a in adapters.values())
    firsts: set[int] = set()
    for a in adapters.values():
        assert isinstance(a, LoKr)
        firsts |= set(a.first.shape)
    factors = [
        -1,
        *sorted(
            firsts | {a.weight_shape[0] // d for a in adapters.values() for d in firsts if a.weight_shape[0] % d == 0}
        ),
    ]
    return [{"decompose_both": split, "decompose_factor": f, "use_effective_conv2d": cores} for f in factors]


def _peft_factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Return PEFT's two factors of a dimension: the wanted one first, whatever its size; else the smaller first."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    top = min(math.isqrt(dimension), factor if factor > 0 else dimension)
    m = max(d for d in range(1, top + 1) if dimension % d == 0)
    return m, dimension // m


def _peft_shapes(kind: str, a: BaseAdapter, own: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that PEFT makes for the adapter's layer under these settings."""
    rows, columns, *kernel = a.weight_shape
    r, taps = a.rank, math.prod(kernel)
    cores = bool(own["use_effective_conv2d"]) and taps > 1
    t_shape = (r, r, *kernel, *(1,) * (2 - len(kernel)))
    if kind == "loha":
        sides = ((r, rows), (r, columns)) if cores else ((rows, r), (r, columns * taps))
        found: dict[str, tuple[int, ...]] = {
            f"hada_w{i}_{ab}": s for i in (1, 2) for ab, s in zip("ab", sides, strict=True)
        }
        return found | ({"hada_t1": t_shape, "hada_t2": t_shape} if cores else {})
    factor = own["decompose_factor"]
    (m1, m2), (n1, n2) = _peft_factorization(rows, factor), _peft_factorization(columns, factor)
    split = own["decompose_both"] and r < max(m1, n1) / 2
    found = {"lokr_w1_a": (m1, r), "lokr_w1_b": (r, n1)} if split else {"lokr_w1": (m1, n1)}
    if r >= max(m2, n2) / 2:
        return found | {"lokr_w2": (m2, n2, *kernel)}
    if cores:
        return found | {"lokr_w2_a": (r, m2), "lokr_w2_b": (r, n2), "lokr_t2": t_shape}
    return found | {"lokr_w2_a": (m2, r), "lokr_w2_b": (r, n2 * taps)}
