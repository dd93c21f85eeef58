"""The compressed checkpoint: plain tensors and one JSON file, nothing that runs.

    compressed/  lrcompress.json   what the model is, what each layer became, from which source, by which versions
                 model.safetensors factors, biases and everything that stayed, by module path; shards and an index if large
                 …                 the source's own config and tokenizer, or its graph without weights

`digest` names the tensors and the per-layer spec: adapters and exports are bound to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..factorize import Rank
from ..files import contained, made_by, sha256_json, write_json
from ..graphs import is_graph_checkpoint
from . import OpenedModel, describe, open_model, skeleton
from .folding import refold
from .layers import FactorizedLayer
from .stored import StoredTensors, described, open_index, open_stored, reader
from .surgery import empty_layer, factorized_layers
from .ties import bases_with, share_factors, shared_with
from .writing import INDEX, SHARD_BYTES, TENSORS, weights_of, write_tensors

MAKER = "lrcompress factorize"
#: Who makes one of another whose factors were trained; whoever opens a checkpoint takes both.
RETRAINER = "lrcompress recover --train factors"
MARKER = "lrcompress.json"
SCHEMA = 1


@dataclass
class Compressed:
    """A compressed model in memory. `module` is None for a bare state dict, whose tensors are in `tensors`."""

    path: Path | None
    digest: str
    spec: dict[str, Any]
    opened: OpenedModel
    module: nn.Module | None
    tensors: Mapping[str, Tensor] | None = None

    def need_module(self, verb: str) -> nn.Module:
        """Return the module; `ModelError` where there is only a state dict."""
        if self.module is None:
            raise ModelError(
                f"{verb} {self.path or ''}".strip(), "a network", "a state dict has no graph",
                "give --arch and --input: factorize again with --arch pkg.mod:callable --input NAME:DTYPE:DIMS",
            )  # fmt: skip
        return self.module

    def open_original(self, override: Path | None = None, **trust: bool) -> OpenedModel:
        """Open the model this was made from, at its recorded place or at `override`; its digest must agree."""
        source = self.spec["source"]
        if override is None:
            if self.path is None or not source.get("path"):
                raise ModelError(
                    "the original", "the model this was made from", "no recorded path", "name it with --original"
                )
            override = (self.path / source["path"]).resolve()
        if not override.exists():
            raise ModelError(override, "the model this was made from", "nothing there", "name it with --original")
        arch = self.spec["model"].get("arch") or {}
        spec = self.opened.arch["spec"] if self.opened.arch else None
        opened = open_model(override, arch=spec, arch_args=arch.get("args"), inputs=self.opened.inputs, **trust)
        if opened.digest != source["digest"]:
            raise ModelError(
                override,
                f"the original with digest {source['digest'][:12]}",
                opened.digest[:12],
                "it changed since: factorize it again",
            )
        return opened


def layer_spec(
    kind: str, form: str, shape: Sequence[int], rank: Rank, factors: Mapping[str, Sequence[int]], *, bias: bool
) -> dict[str, Any]:
    """Return what a checkpoint keeps of one factorized layer."""
    return {
        "kind": kind,
        "form": form,
        "shape": list(shape),
        "rank": list(rank) if isinstance(rank, tuple) else rank,
        "factors": {k: list(v) for k, v in factors.items()},
        "bias": bias,
    }


def module_layers(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the specs of all factorized layers of a module (dense ones with a place for adapters are not among them).

    A layer that holds the factors of an earlier one says so under `tied`; single ones are named under `shares`.
    """
    found = [(name, m) for name, m in factorized_layers(module) if m.form != "dense"]
    tied, bases = shared_with(found), bases_with(found)
    specs = {}
    for name, m in found:
        shapes = {k: tuple(v.shape) for k, v in m.factors.items()}
        specs[name] = layer_spec(m.layer_kind, m.form, m.shape, m.rank, shapes, bias=m.bias is not None)
        if name in tied:
            specs[name]["tied"] = tied[name]
        elif name in bases:
            specs[name]["shares"] = bases[name]
    return specs


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module by name, adapters left out, tied ones under their first name."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    for name, value in module.state_dict().items():
        if ".adapters." in f".{name}" or name.startswith("adapters."):
            continue
        key = (value.data_ptr(), value.storage_offset(), tuple(value.shape))
        if value.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = value.detach().cpu().contiguous().clone()
    return kept


def tensors_digest(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> str:
    """Return the digest of named tensors (names, dtypes, shapes, bytes) and layer specs."""
    read, hashes = reader(tensors), {}
    for name in tensors:
        t = read(name).detach().cpu().contiguous()
        data = t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b""
        hashes[name] = hashlib.sha256(data).hexdigest()
        del t, data  # or they would be there beside the next one
    return _digest(tensors, hashes, layers)


def _digest(tensors: Mapping[str, Tensor], hashes: Mapping[str, str], layers: Mapping[str, Any]) -> str:
    about = described(tensors)
    listed = {n: [str(about[n].dtype), list(about[n].shape), hashes[n]] for n in sorted(about)}
    return sha256_json({"tensors": listed, "layers": layers})


def write_compressed(
    stage: Path,
    dest: Path,
    opened: OpenedModel,
    *,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Any],
    report: Mapping[str, Any],
    folded: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a checkpoint into the folder `stage` that will become `dest`, tensor by tensor; return its digest.

    `folded`: {normalization: the layer that it was folded into}.
    """
    digest = _digest(tensors, write_tensors(stage, tensors, shard_bytes=shard_bytes), layers)
    source = None if opened.path is None else os.path.relpath(opened.path.resolve(), dest.resolve())
    spec = {
        "schema": SCHEMA,
        "made_by": MAKER,
        "digest": digest,
        "source": {"path": source, "digest": opened.digest, "kind": opened.kind},
        "model": describe(opened, stage),
        "layers": dict(layers),
        **({"folded": dict(folded)} if folded else {}),
        **report,
    }
    write_json(stage / MARKER, spec)
    return digest


def write_retrained(
    stage: Path, dest: Path, base: Compressed, *, tensors: Mapping[str, Tensor], layers: Mapping[str, Any],
    report: Mapping[str, Any],
) -> str:  # fmt: skip
    """Write `base` with other numbers into the folder `stage` that will become `dest`; return its digest.

    What it was made from, and how it is built, stays what `base` says; paths are taken from where `dest` is.
    """
    spec = json.loads(json.dumps(base.spec))
    for name in spec["model"].get("files", ()):
        assert base.path is not None
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(contained(base.path, name), stage / name)
    if base.path is not None:
        arch = spec["model"].get("arch") or {}
        for part, key in ((spec["source"], "path"), (arch, "relative")):
            if part.get(key) and not os.path.isabs(part[key]):  # noqa: PTH117
                place, colon, name = part[key].partition(":") if key == "relative" else (part[key], "", "")
                part[key] = os.path.relpath((base.path / place).resolve(), dest.resolve()) + colon + name
    digest = _digest(tensors, write_tensors(stage, tensors), layers)
    write_json(stage / MARKER, {**spec, "made_by": RETRAINER, "digest": digest, "layers": dict(layers), **report})
    return digest


def open_weights(path: Path) -> StoredTensors:
    """Open the weights of a checkpoint: the one file, or what the index names beside it."""
    return open_index(path) if path.name == INDEX else open_stored(path)


def is_compressed(folder: Path) -> bool:
    return folder.is_dir() and made_by(folder, MARKER) in (MAKER, RETRAINER)


def load_compressed(folder: Path) -> Compressed:
    """Open a compressed checkpoint; `ModelError` for anything that is none, or is damaged."""
    if not is_compressed(folder):
        got = "a folder that is none" if folder.is_dir() else ("a file" if folder.exists() else "nothing there")
        raise ModelError(
            folder, "a folder made by 'lrcompress factorize'", got, "factorize a model first, or name the folder"
        )
    if is_graph_checkpoint(folder):
        raise ModelError(
            folder,
            "a network in torch",
            "a compressed ONNX graph",
            "export it; to train it, factorize the network itself",
        )
    try:
        spec = json.loads((folder / MARKER).read_text())
        tensors = open_weights(weights_of(folder))
        layers, recorded = spec["layers"], spec["digest"]
    except (OSError, ValueError, KeyError, ModelError) as e:
        raise ModelError(folder, "an intact compressed checkpoint", str(e), "factorize again") from e
    digest = tensors_digest(tensors, layers)
    if digest != recorded:
        raise ModelError(
            folder / TENSORS, f"tensors with digest {recorded[:12]}", digest[:12], "the file changed: factorize again"
        )
    opened = skeleton(spec["model"], folder)
    if opened.module is None:
        return Compressed(folder, digest, spec, opened, None, tensors)
    module = opened.module
    try:
        refold(module, spec.get("folded", {}))
    except AttributeError as e:
        raise ModelError(
            folder,
            "an architecture with the layers it was made from",
            str(e),
            "the architecture changed: factorize again",
        ) from e
    for name, layer in layers.items():
        rank = tuple(layer["rank"]) if isinstance(layer["rank"], list) else layer["rank"]
        shapes = {k: tuple(v) for k, v in layer["factors"].items()}
        try:
            empty_layer(
                module,
                name,
                form_name=layer["form"],
                factors=shapes,
                shape=tuple(layer["shape"]),
                rank=rank,
                bias=layer["bias"],
            )
        except (AttributeError, KeyError) as e:
            raise ModelError(
                folder, f"an architecture with the layer {name}", str(e), "the architecture changed: factorize again"
            ) from e
    for name, layer in layers.items():
        if "tied" in layer:
            share_factors(module, layer["tied"], [name])
        for factor, leader in layer.get("shares", {}).items():
            share_factors(module, leader, [name], [factor])
    _fill(folder, module, tensors)
    return Compressed(folder, digest, spec, opened, module.eval())


def _fill(folder: Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = state_of(module)
    unknown = sorted(set(tensors) - set(module.state_dict()))
    missing = sorted(set(expected) - set(tensors))
    if unknown or missing:
        got = f"{unknown[0]} too many" if unknown else f"{missing[0]} missing"
        raise ModelError(
            folder / TENSORS,
            "exactly the tensors of the architecture",
            got,
            "the architecture changed: factorize again",
        )
    for name, value in tensors.items():
        if tuple(module.state_dict()[name].shape) != tuple(value.shape):
            shape = tuple(module.state_dict()[name].shape)
            raise ModelError(f"{folder / TENSORS}: {name}", f"shape {shape}", tuple(value.shape), "factorize again")
    module.load_state_dict(dict(tensors), strict=False)


__all__ = ["Compressed", "FactorizedLayer", "load_compressed", "write_compressed"]
