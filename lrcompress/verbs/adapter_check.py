"""Checking that an adapter does the same everywhere, and merging it for good.

Check: every layer by itself, on random inputs of its own, three ways: the adapter beside the layer, merged into its
weight, and in ONNX Runtime through slots (where it has one, else merged there).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import payload as payloads
from ..adapt import BaseAdapter, Target
from ..errors import CommandError, ModelError, PayloadError
from ..export.merging import merge_into
from ..export.payloads import tensors_for
from ..files import staged_folder
from ..model import InputSpec, OpenedModel
from ..model.checkpoint import MAKER as COMPRESSED_MAKER
from ..model.checkpoint import MARKER, module_layers, state_of, write_compressed
from ..model.layers import FactorizedLayer
from ..model.surgery import factorized_layers, set_submodule, to_dense
from ..progress import Progress, Silent
from ..runtime import Session
from .adapter import Adapters, BaseModel, included, load
from .export import export

#: Largest difference, relative to the largest output (at least 1), between two ways of computing the same in fp32.
TOLERANCE = 1e-4
_BATCH = 2


class _Side(nn.Module):
    """Layers side by side, each on an input of its own."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, xs, strict=True))


def check(
    adapter: str | Path, base: BaseModel, *, include: Sequence[str] = (), seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:  # fmt: skip
    """Return, per layer, how far forward, merged, and ONNX Runtime lie apart; `passed` if nowhere beyond `TOLERANCE`."""
    progress = progress or Silent()
    found = load(adapter, base)
    chosen = included(found.adapters, include, "check")
    names = list(chosen)
    layers = [copy.deepcopy(base.layer(n)).float().eval() for n in names]
    generator = torch.Generator().manual_seed(seed)
    xs = [example(layer.target, generator) for layer in layers]
    with progress.task("check", total=3) as advance, torch.no_grad():
        plain = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        for layer, a in zip(layers, chosen.values(), strict=True):
            layer.add_adapter("check", copy.deepcopy(a).float())
        beside = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        merged = [to_dense(layer)(x) for layer, x in zip(layers, xs, strict=True)]
        advance(1, "torch")
        runtime = [_in_runtime(kind, layers, xs) for kind in sorted({a.kind for a in chosen.values()})]
        advance(2, "runtime")
    rows = []
    for i, (name, a) in enumerate(chosen.items()):
        route, outputs = next((r, o) for r, o in runtime if i in o)
        scale = max(1.0, float(beside[i].abs().max()))
        distances = {
            "merged": float((beside[i] - merged[i]).abs().max()) / scale,
            "runtime": float((beside[i] - torch.from_numpy(outputs[i])).abs().max()) / scale,
        }
        rows.append({
            "name": name, "kind": a.kind, "layer": layers[i].layer_kind, "form": layers[i].form, "rank": a.rank, "route": route,
            "moves": float((beside[i] - plain[i]).abs().max()), **distances,
            "passed": all(d <= TOLERANCE for d in distances.values()),
        })  # fmt: skip
    return {"path": str(found.path), "tolerance": TOLERANCE, "passed": all(r["passed"] for r in rows), "layers": rows}


def example(target: Target, generator: torch.Generator) -> Tensor:
    """Return a random input of a layer, as small as its kernel allows; a padded convolution gets it before padding."""
    rows, columns, *kernel = target.shape
    if target.kind == "embedding":
        return torch.randint(0, rows, (_BATCH, 5), generator=generator)
    if target.kind == "linear":
        return torch.randn(_BATCH, 3, columns, generator=generator)
    assert target.geometry is not None
    channels = rows if target.kind == "conv_transpose" else columns * target.groups
    space = [
        max(6, d * (k - 1) + 1 + s)
        for k, d, s in zip(kernel, target.geometry.dilation, target.geometry.stride, strict=True)
    ]
    return torch.randn(_BATCH, channels, *space, generator=generator)


def _in_runtime(
    kind: str, layers: Sequence[FactorizedLayer], xs: Sequence[Tensor]
) -> tuple[str, dict[int, np.ndarray]]:
    """Return ("slot" or "merged", outputs by index) of the layers that carry an adapter of `kind`."""
    here = [i for i, layer in enumerate(layers) if _own(layer).kind == kind]
    inputs = {f"x{j}": xs[i].numpy() for j, i in enumerate(here)}
    specs = tuple(InputSpec(n, str(x.dtype), tuple(x.shape)) for n, x in inputs.items())
    adapters = {f"layers.{j}": _own(layers[i]) for j, i in enumerate(here)}
    bare = [copy.deepcopy(layers[i]) for i in here]
    for layer in bare:
        layer.remove_adapter("check")
    with tempfile.TemporaryDirectory() as folder:
        slots = ("core",) if adapters["layers.0"].in_core else ("lora",)
        if any(a.magnitude is not None and a.layer_kind != "conv_transpose" for a in adapters.values()):
            slots = ("dora",)
        opened = OpenedModel(None, "module", "", _Side(bare), inputs=specs)
        export(opened, slots=slots, slot_include=("*",), output=Path(folder) / "slots")
        session = Session(Path(folder) / "slots")
        try:
            found, tensors = tensors_for(
                adapters, session.manifest, where="check", base=lambda name: bare[int(name.removeprefix("layers."))]
            )
        except PayloadError:  # this kind reaches a device merged, so that is what is checked
            opened = OpenedModel(None, "module", "", _Side([to_dense(layers[i]) for i in here]), inputs=specs)
            export(opened, slots=("none",), output=Path(folder) / "merged")
            return "merged", _outputs(Session(Path(folder) / "merged"), inputs, here)
        data = payloads.build(tensors, manifest=session.manifest, kind=found, encoding="f32")
        session.swap(payloads.parse(data))
        return "slot", _outputs(session, inputs, here)


def _own(layer: FactorizedLayer) -> BaseAdapter:
    return layer.adapters["check"]  # type: ignore[return-value]


def _outputs(session: Session, inputs: Mapping[str, np.ndarray], here: Sequence[int]) -> dict[int, np.ndarray]:
    found = session.run(inputs)
    return {i: found[name] for i, name in zip(here, session.output_names, strict=True)}


def merge(
    adapters: Sequence[str | Path], base: BaseModel, *, weights: Sequence[float] = (), output: str | Path
) -> dict[str, Any]:
    """Write the compressed checkpoint with `adapters` merged into it; the one it came from stays as it is.

    Factors stay factors where the form allows it exactly, else the layer becomes dense: the report says which. Raises
    `CommandError`, `ModelError`; nothing is written then.
    """
    if base.compressed is None:
        raise CommandError(
            "lrcompress adapter merge", "a folder made by 'lrcompress factorize'", base.opened.path or "a module"
        )
    weights = list(weights) or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise CommandError("lrcompress adapter merge --weight", f"{len(adapters)} weights", len(weights))
    dest = Path(output)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise CommandError(dest, "a place where nothing is yet", "something", "choose another place with -o")
    several = [load(a, base) for a in adapters]
    rows = _merged(several, weights, base)
    for name, layer in list(factorized_layers(base.module)):
        if layer.form == "dense" and not len(layer.adapters):
            set_submodule(base.module, name, layer.to_plain().train(layer.training))
    spec = base.compressed.spec
    report = {k: v for k, v in spec.items() if k not in ("schema", "made_by", "digest", "source", "model", "layers")}
    report["merged"] = [
        {"path": str(a.path), "kind": a.kind, "weight": w} for a, w in zip(several, weights, strict=True)
    ]
    layers = module_layers(base.module)
    with staged_folder(dest, maker=COMPRESSED_MAKER, marker=MARKER) as stage:
        digest = write_compressed(
            stage, dest, _original(base), tensors=state_of(base.module), layers=layers, report=report
        )
    return {"output": str(dest), "digest": digest, "layers": rows}


def _original(base: BaseModel) -> OpenedModel:
    """Return the opened model with path and digest of what the checkpoint was made from."""
    assert base.compressed is not None and base.compressed.path is not None
    source, opened = base.compressed.spec["source"], copy.copy(base.opened)
    opened.path = None if source.get("path") is None else (base.compressed.path / source["path"]).resolve()
    opened.digest, opened.kind = source["digest"], source["kind"]
    if opened.kind == "huggingface":
        opened.extra = {**opened.extra, "folder": str(base.compressed.path)}
    return opened


def _merged(several: Sequence[Adapters], weights: Sequence[float], base: BaseModel) -> list[dict[str, Any]]:
    """Merge layer by layer; a layer whose result differs from the sum is a bug, one that is not finite an error."""
    rows = []
    for name in sorted({n for a in several for n in a.adapters}):
        layer = base.layer(name)
        parts = [(a.adapters[name], w) for a, w in zip(several, weights, strict=True) if name in a.adapters]
        before, form_before = layer.weight.detach().clone(), layer.form
        with torch.no_grad():
            wanted = before + sum(w * a.delta_weight(layer) for a, w in parts)
            # Cores act on the factors as they were, so they go in first and as one.
            for a, w in sorted(parts, key=lambda p: not p[0].in_core):
                merge_into(layer, a, w)
        error = float((layer.weight - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error < 1e-3:
            raise ModelError(
                f"layer {name}",
                "corrections that merge one after the other",
                f"an error of {error:.2g}",
                "combine them first",
            )
        rows.append(
            {"name": name, "parts": len(parts), "form_before": form_before, "form": layer.form, "rel_error": error}
        )
    return rows
