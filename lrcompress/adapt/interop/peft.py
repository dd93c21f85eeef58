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
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from .. import BaseAdapter, Target, adapter, adapter_class, kinds
from ..lokh import as_full_rank
from ._peft_writing import PREFIX, write

#: Settings that change what the tensors mean, and that nothing here can express.
_REFUSED = (
    "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config", "lora_bias",
)  # fmt: skip
#: Initializations after which the base is another one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_PATTERN = 1000
#: What torch and Python raise for numbers and shapes of a file that do not go together.
_MISFITS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ZeroDivisionError, RuntimeError)

__all__ = ["checked", "guess", "of_pair", "plain", "read", "write"]


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
        except (*_MISFITS, re.error) as e:
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
        if value.numel() == 0 or (value.dim() < 2 and "magnitude" not in name):
            raise ModelError(f"{where}: {key}", "a matrix or kernels", f"shape {tuple(value.shape)}")
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
