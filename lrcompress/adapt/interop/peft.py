"""PEFT's adapter layout: a configuration and tensors named `base_model.model.<layer>.<tensor>`.

    config, tensors = write(adapters, strict=True)         # ModelError for what PEFT cannot hold
    adapters = read(config, tensors, targets, where=path)  # ModelError for what does not fit the layers

PEFT's own rules, kept here: patterns are regular expressions that match the end of a path; LoRA on an embedding is
stored transposed; on a grouped convolution A (r, in, *k) is dense over all channels (only a block-diagonal one is a
kernel); rsLoRA scales by alpha/√r; a LoKr whose factors are both whole keeps alpha/r. PiSSA and OLoRA start from a base
that they changed: with the base's weights they become the plain change, rank 2r, else they are refused.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from .. import BaseAdapter, Target, adapter, adapter_class, kinds
from ..lokh import as_full_rank
from ..lokr import Adapter as LoKr

PREFIX = "base_model.model."
#: Kinds that PEFT knows by these names, and the layers it knows them on.
KNOWN = {
    "lora": {("linear", 2), ("embedding", 2), ("conv", 3), ("conv", 4), ("conv", 5)},
    "loha": {("linear", 2), ("conv", 3), ("conv", 4)},
    "lokr": {("linear", 2), ("conv", 3), ("conv", 4)},
}
#: Settings that change what the tensors mean, and that nothing here can express.
_REFUSED = (
    "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config", "lora_bias",
)  # fmt: skip
#: Initializations after which the base is another one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_PATTERN = 1000


# writing --------------------------------------------------------------------------------------------------------------


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


# reading --------------------------------------------------------------------------------------------------------------


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Target] | None = None,
    *,
    where: object,
    weight: Callable[[str], Tensor] | None = None,
) -> dict[str, BaseAdapter]:
    """Return the adapters of a PEFT folder by layer.

    `targets`: the layers of the base, where it is known: an adapter for any other is refused, and kernels and groups
    are theirs. `weight`: a layer's weight, for adapters that changed their base. Raises `ModelError`.
    """
    kind = _kind(config, where)
    _refuse(config, where)
    by_layer = _by_layer(kind, tensors, where)
    if not by_layer:
        raise ModelError(where, "at least one layer", "none")
    if targets is not None:
        unknown = sorted(set(by_layer) - set(targets))
        if unknown:
            raise ModelError(
                f"{where}: layer {unknown[0]}", "a layer of the base", "none of that name", "is it for another model?"
            )
    found = {}
    for layer in sorted(by_layer):
        target = None if targets is None else targets[layer]
        try:
            made = _one(kind, config, layer, by_layer[layer], target)
        except (ValueError, KeyError, TypeError, AttributeError, re.error, OverflowError) as e:
            raise ModelError(f"{where}: {layer}", f"the configuration and tensors of a {kind} adapter", e) from e
        found[layer] = _without_init(made, str(config.get("init_lora_weights")), layer, weight, where)
    return found


def _kind(config: Mapping[str, Any], where: object) -> str:
    kind = str(config.get("peft_type", "")).lower()
    if kind not in kinds():
        raise ModelError(where, f"a peft_type of {', '.join(k.upper() for k in kinds())}", config.get("peft_type"))
    return kind


def _refuse(config: Mapping[str, Any], where: object) -> None:
    for key in _REFUSED:
        if config.get(key):
            what = config[key]
            names = ", ".join(map(str, what)) if isinstance(what, list | dict) else what
            raise ModelError(
                f"{where}: {key}", "corrections of weights, which a payload can ship", names, "train without it"
            )
    if config.get("bias", "none") != "none":
        raise ModelError(f"{where}: bias", "none", config["bias"], "train without it: a payload ships no biases")
    init = str(config.get("init_lora_weights"))
    if init.startswith(_CHANGES_BASE) and init not in ("pissa", "olora"):
        raise ModelError(
            f"{where}: init_lora_weights", "an adapter of the original base", f"{init}, which changed the base",
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )  # fmt: skip


def _names(kind: str) -> dict[str, str]:
    """Return PEFT's tensor names of a kind -> ours."""
    own = {n: n for n in adapter_class(kind).tensor_names} | {"magnitude": "magnitude"}
    if kind != "lora":
        return own
    found = {f"{n}.weight": n for n in ("lora_A", "lora_B", "lora_mid")} | {"magnitude": "magnitude"}
    return found | {
        "lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B",
        "lora_magnitude_vector": "magnitude_vector", "lora_magnitude_vector.weight": "magnitude_vector",
    }  # fmt: skip


def _by_layer(kind: str, tensors: Mapping[str, Tensor], where: object) -> dict[str, dict[str, Tensor]]:
    names = _names(kind)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in sorted(tensors.items()):
        bare = key.removeprefix(PREFIX)
        name = next((n for n in sorted(names, key=len, reverse=True) if bare.endswith(f".{n}")), None)
        if name is None:
            expected = ", ".join(n for n in names if n != "magnitude")
            raise ModelError(where, f"tensors named <layer>.{{{expected}}}", key, f"is it a {kind} adapter?")
        layers.setdefault(bare.removesuffix(f".{name}"), {})[names[name]] = checked(value, f"{where}: {key}")
    return layers


def checked(value: Tensor, where: str) -> Tensor:
    """Return a tensor of a file as float32 (float64 stays); `ModelError` unless it is finite floating point."""
    if not value.is_floating_point():
        raise ModelError(where, "floating point numbers", str(value.dtype).removeprefix("torch."))
    if not torch.isfinite(value).all():
        raise ModelError(where, "finite numbers", "NaN or infinity")
    return value if value.dtype == torch.float64 else value.float()


def _setting(config: Mapping[str, Any], patterns: str, layer: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the path, as PEFT does."""
    for key, value in (config.get(patterns) or {}).items():
        if len(key) <= _MAX_PATTERN and re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default


def _one(
    kind: str, config: Mapping[str, Any], layer: str, tensors: dict[str, Tensor], target: Target | None
) -> BaseAdapter:
    rank = _setting(config, "rank_pattern", layer, config["r"])
    alpha = _setting(config, "alpha_pattern", layer, config.get("lora_alpha" if kind == "lora" else "alpha", rank))
    if type(rank) is not int or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"expected a whole rank and a finite alpha, got {rank} and {alpha}")
    if kind == "lora":
        tensors, target = _lora_here(tensors, target)
    elif target is None:
        target = guess(kind, tensors)
    if target is not None and len(target.shape) == 3:
        tensors = {n: t[..., 0] if n[-2:] in ("t1", "t2") and t.dim() == 4 else t for n, t in tensors.items()}
    if (
        kind == "lokr"
        and "lokr_w2" in tensors
        and len(target.shape) == 3
        and tensors["lokr_w2"].dim() == 3
        and not config.get("lrcompress")
    ):
        return _misshapen_kron(rank, alpha, tensors, target)
    options: dict[str, Any] = {"groups": target.groups, "core": target.core, "layer_kind": target.kind}
    rslora = bool(config.get("use_rslora")) and kind == "lora"
    made = adapter(kind, weight_shape=target.shape, rank=rank, alpha=alpha, rslora=rslora, **options)
    made.load(tensors)
    return made


def _lora_here(tensors: dict[str, Tensor], target: Target | None) -> tuple[dict[str, Tensor], Target]:
    """Return our tensors of a LoRA, and its layer where the base did not tell."""
    found = dict(tensors)
    if "lora_embedding_A" in found or "lora_embedding_B" in found:
        a, b = found.pop("lora_embedding_A"), found.pop("lora_embedding_B")
        found |= {"lora_B": a.T, "lora_A": b.T}
        target = target or Target((a.shape[1], b.shape[0]), "embedding")
    a, b = found["lora_A"], found["lora_B"]
    if target is None:
        groups = a.shape[0] // b.shape[1] if "lora_mid" not in found else 1
        kernel = found.get("lora_mid", a).shape[2:]
        target = Target((b.shape[0], a.shape[1] // groups, *kernel), "conv" if a.dim() > 2 else "linear", groups=groups)
    if target.groups > 1 and a.shape[1] == target.shape[1] * target.groups:
        found["lora_A"] = _own_channels(a, target.groups)
    vector = found.pop("magnitude_vector", None)
    if vector is not None:
        axis = target.output_axis
        found["magnitude"] = vector.reshape([-1 if i == axis else 1 for i in range(len(target.shape))])
    return found, target


def _own_channels(a: Tensor, groups: int) -> Tensor:
    """Return A (r, in/groups, *k) of a block-diagonal A (r, in, *k); `ValueError` where a group reads another's channels."""
    if len(a) % groups:
        raise ValueError(f"expected a rank that {groups} groups divide, got {len(a)}")
    blocks = a.reshape(groups, len(a) // groups, groups, -1, *a.shape[2:])
    own = torch.stack([blocks[g, :, g] for g in range(groups)])
    if int(torch.count_nonzero(blocks)) != int(torch.count_nonzero(own)):
        raise ValueError(
            "lora_A reads channels of other groups: no grouped kernel holds that, PEFT cannot merge it either"
        )
    return own.flatten(0, 1)


def guess(kind: str, tensors: Mapping[str, Tensor]) -> Target:
    """Return the layer that tensors alone tell of; a kernel is not among that where they are flat."""
    if kind == "loha":
        t = tensors.get("hada_t1")
        a, b = tensors["hada_w1_a"], tensors["hada_w1_b"]
        if t is not None:
            return Target((a.shape[1], b.shape[1], *t.shape[2:]), "conv")
        return Target((a.shape[0], b.shape[1]))
    if kind == "lokr":
        w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        t, w2 = tensors.get("lokr_t2"), tensors.get("lokr_w2")
        if t is not None:
            sides, kernel = (tensors["lokr_w2_a"].shape[1], tensors["lokr_w2_b"].shape[1]), tuple(t.shape[2:])
        elif w2 is not None:
            sides, kernel = (w2.shape[0], w2.shape[1]), tuple(w2.shape[2:])
        else:
            sides, kernel = (tensors["lokr_w2_a"].shape[0], tensors["lokr_w2_b"].shape[1]), ()
        shape = (w1.shape[0] * sides[0], w1.shape[1] * sides[1], *kernel)
        return Target(shape, "conv" if kernel else "linear")
    raise ValueError("expected the base: these tensors do not tell the layer")


def _misshapen_kron(rank: int, alpha: float, tensors: Mapping[str, Tensor], target: Target) -> BaseAdapter:
    """Return what PEFT computes of a whole W₂ on a 1-D convolution: kron(W₁, W₂) over misaligned axes, as a plain change."""
    w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    delta = torch.kron(w1.contiguous(), tensors["lokr_w2"].contiguous()).reshape(target.shape) * (alpha / rank)
    return plain(delta, target)


def plain(delta: Tensor, target: Target) -> BaseAdapter:
    """Return a LoRA that is exactly `delta`, at full rank."""
    a, b = as_full_rank(delta)
    return of_pair(a, b, target)


def of_pair(a: Tensor, b: Tensor, target: Target) -> BaseAdapter:
    """Return the LoRA with ΔW = B·A: a (r, columns, *k), b (rows, r)."""
    made = adapter(
        "lora", weight_shape=target.shape, rank=len(a), groups=target.groups, core=target.core, layer_kind=target.kind
    )
    made.load({"lora_A": a, "lora_B": b.reshape(*b.shape, *(1,) * (len(target.shape) - 2))})
    return made


def _without_init(
    a: BaseAdapter, init: str, layer: str, weight: Callable[[str], Tensor] | None, where: object
) -> BaseAdapter:
    """Return the change of the original base: PiSSA and OLoRA took s·B₀A₀, a function of the weight, out of it first."""
    if init not in ("pissa", "olora"):
        return a
    if weight is None:
        raise ModelError(
            f"{where}: init_lora_weights", "an adapter of the original base", f"{init}, which changed the base",
            "name the base with --base",
        )  # fmt: skip
    w = weight(layer).detach().flatten(1).double()
    if init == "pissa":
        u, d, vt = torch.linalg.svd(w, full_matrices=False)
        taken = (u[:, : a.rank] * d[: a.rank], vt[: a.rank])
    else:
        q, r = torch.linalg.qr(w)
        taken = (a.scaling * q[:, : a.rank], r[: a.rank])
    own_a, own_b = a.expand()
    left = torch.cat([own_b.detach().double(), -taken[0]], 1).to(own_b.dtype)
    right = torch.cat([own_a.detach().flatten(1).double(), taken[1]]).to(own_a.dtype)
    return of_pair(right.reshape(-1, *a.weight_shape[1:]), left, a.target)
