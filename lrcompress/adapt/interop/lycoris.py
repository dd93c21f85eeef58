"""LyCORIS and kohya single files: `<prefix>_<path with _ for .>.<tensor>`, an `alpha` per layer.

    tensors = write(adapters)                           # ModelError for what LyCORIS cannot hold
    adapters = read(tensors, targets, where=path)       # the layers are needed: names in the file lose their dots

LyCORIS's own rules, kept here: the scale is alpha/rank with everything else (rsLoRA, scalars) baked into the file; a
LoKr whose factors are both whole has scale 1; a grouped convolution's filters are shared by its groups; `dora_scale`
is the magnitude along rows or columns; cores have one axis per kernel axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import ModelError
from .. import BaseAdapter, Target, adapter
from .peft import checked

#: What stands before the path in names; the first is LyCORIS's own, the others are kohya's and those of model families.
PREFIXES = (
    "lycoris_", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lora_transformer_", "lora_prior_", "lora_",
    "base_model.model.", "diffusion_model.", "transformer.", "unet.", "text_encoder.", "",
)  # fmt: skip
_LORA = {
    "lora_up.weight": "lora_B", "lora_down.weight": "lora_A", "lora_mid.weight": "lora_mid",
    "lora_B.weight": "lora_B", "lora_A.weight": "lora_A",
}  # fmt: skip
_OWN = {
    "lora": _LORA,
    "loha": {n: n for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    "lokr": {n: n for n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
_SHARED = {"alpha", "dora_scale"}
_KIND_OF = {name: kind for kind, names in _OWN.items() for name in names}
_LAYERS = {("linear", 2), ("conv", 3), ("conv", 4), ("conv", 5)}


def write(adapters: Mapping[str, BaseAdapter], *, prefix: str = "lycoris_") -> dict[str, Tensor]:
    """Return the tensors of `adapters` (of any kinds that LyCORIS knows) under its names."""
    out: dict[str, Tensor] = {}
    for name, a in adapters.items():
        stem = prefix + name.replace(".", "_")
        if f"{stem}.alpha" in out:
            raise ModelError(f"layer {name}", "paths that differ without their dots", stem, "rename a layer")
        for key, value in _named(name, a).items():
            out[f"{stem}.{key}"] = value.detach().contiguous().clone()
    return {k: out[k] for k in sorted(out)}


def _named(name: str, a: BaseAdapter) -> dict[str, Tensor]:
    if a.kind not in _OWN:
        known = ", ".join(_OWN)
        raise ModelError(f"layer {name}", f"a kind that LyCORIS knows ({known})", a.kind, "expand it with --to lora")
    if (a.layer_kind, len(a.weight_shape)) not in _LAYERS:
        raise ModelError(f"layer {name}", "a linear layer or a convolution", a.layer_kind, "leave the layer out")
    found, theirs = a.tensors(), {v: k for k, v in reversed(_OWN[a.kind].items())}
    out: dict[str, Tensor] = {}
    if a.kind == "lora" and found["lora_B"].shape[1] != a.rank:
        parts = found["lora_B"].flatten(1).chunk(a.groups)
        b: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        found["lora_B"] = b.reshape(*b.shape, *(1,) * (len(a.weight_shape) - 2))
    alpha = a.scaling * a.rank
    if "lokr_w1" in found and "lokr_w2" in found:
        found["lokr_w1"], alpha = found["lokr_w1"] * a.scaling, float(a.rank)
    magnitude = found.pop("magnitude", None)
    if magnitude is not None:
        out["dora_scale"] = magnitude
    out["alpha"] = torch.tensor(alpha)
    return out | {theirs[n]: t for n, t in found.items()}


def read(tensors: Mapping[str, Tensor], targets: Mapping[str, Target], *, where: object) -> dict[str, BaseAdapter]:
    """Return the adapters of a file by layer. Raises `ModelError` for names that fit no layer, or tensors that do not fit theirs."""
    by_stem = _by_stem(tensors, where)
    if not by_stem:
        raise ModelError(where, "at least one layer", "none")
    layers = _match(by_stem, targets, where)
    found = {}
    for stem, layer in layers.items():
        try:
            found[layer] = _one(by_stem[stem], targets[layer])
        except (ValueError, RuntimeError) as e:
            raise ModelError(
                f"{where}: {stem}", f"tensors that fit the layer {layer}", e, "is it for another model?"
            ) from e
    return {n: found[n] for n in sorted(found)}


def _by_stem(tensors: Mapping[str, Tensor], where: object) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    names = sorted(_SHARED | set(_KIND_OF), key=len, reverse=True)
    for key, value in sorted(tensors.items()):
        name = next((n for n in names if key.endswith(f".{n}")), None)
        if name is None:
            known = "lora_up, lora_down, hada_*, lokr_*, alpha and dora_scale"
            raise ModelError(
                where, f"tensors of LoRA, LoHa or LoKr ({known})", key, "another algorithm: train one of these"
            )
        found.setdefault(key.removesuffix(f".{name}"), {})[name] = checked(value, f"{where}: {key}")
    return found


def _match(stems: Mapping[str, object], targets: Mapping[str, Target], where: object) -> dict[str, str]:
    """Return {name in the file: layer}: the prefix that all of them fit under, dots and underscores alike."""
    flat: dict[str, list[str]] = {}
    for name in targets:
        flat.setdefault(re.sub(r"[.]", "_", name), []).append(name)
    found: dict[str, str] = {}
    for stem in stems:
        candidates = [
            layer
            for p in PREFIXES
            if stem.startswith(p)
            for layer in flat.get(stem.removeprefix(p).replace(".", "_"), ())
        ]
        exact = [c for c in candidates if stem.endswith(c)]
        chosen = list(dict.fromkeys(exact or candidates))
        if not chosen:
            near = ", ".join(list(targets)[:3])
            raise ModelError(
                f"{where}: {stem}", "the name of a layer of the base", "none of that name", f"layers are {near}, …"
            )
        if len(chosen) > 1:
            raise ModelError(f"{where}: {stem}", "the name of one layer", " or ".join(chosen), "rename a layer")
        if chosen[0] in found.values():
            raise ModelError(
                f"{where}: {stem}", "one correction per layer", f"two for {chosen[0]}", "combine them first"
            )
        found[stem] = chosen[0]
    return found


def _one(tensors: Mapping[str, Tensor], target: Target) -> BaseAdapter:
    kinds = sorted({_KIND_OF[n] for n in tensors if n in _KIND_OF})
    if len(kinds) != 1:
        raise ValueError(f"expected the tensors of one kind, got {' and '.join(kinds) or 'none'}")
    own = {_OWN[kinds[0]][n]: t for n, t in tensors.items() if n not in _SHARED}
    rank, whole = _rank(own)
    if "alpha" in tensors and tensors["alpha"].numel() != 1:
        raise ValueError(f"alpha: expected one number, got shape {tuple(tensors['alpha'].shape)}")
    alpha = float(tensors["alpha"]) if "alpha" in tensors and not whole else float(rank)
    if alpha == 0:  # LyCORIS's word for "no scaling"
        alpha = float(rank)
    made = adapter(
        kinds[0], weight_shape=target.shape, rank=rank, alpha=alpha, groups=target.groups, core=target.core,
        layer_kind=target.kind,
    )  # fmt: skip
    magnitude = tensors.get("dora_scale")
    if magnitude is not None:
        own["magnitude"] = magnitude
    made.load(own)
    return made


def _rank(own: Mapping[str, Tensor]) -> tuple[int, bool]:
    """Return the rank that the tensors have, and whether both factors of a LoKr are whole."""
    for name in ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in own and own[name].dim() > 1:
            return max(int(own[name].shape[0]), 1), False
    if "lokr_w1" in own and "lokr_w2" in own:
        return 1, True
    raise ValueError("expected lora_down, hada_w1_b, or the factors of a LoKr")
