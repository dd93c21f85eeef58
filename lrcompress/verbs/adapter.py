"""The verb `adapter`: look at adapter files, and turn them into others. Checking and merging are in `adapter_check`.

An adapter is a folder (ours or PEFT's) or a `.safetensors` file (LyCORIS, kohya). What needs the layers, reading a
LyCORIS file above all, takes a base: a compressed checkpoint, or any model that can be opened as a network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..adapt import BaseAdapter, Target
from ..adapt._combine import expanded, stacked, truncated
from ..adapt._files import CONFIG, MARKER, TENSORS, read_adapter, write_adapter
from ..adapt.interop import lycoris
from ..errors import CommandError, LrcompressError, ModelError
from ..files import check_output, staged_folder, write_atomic
from ..model import InputSpec, OpenedModel, open_model
from ..model.adapting import every_target
from ..model.checkpoint import Compressed, is_compressed, load_compressed, state_of, tensors_digest
from ..model.layers import FactorizedLayer
from ..model.surgery import wrap_dense

MAKER = "lrcompress adapter"
FORMATS = ("native", "peft", "lycoris", "lora")


@dataclass(frozen=True)
class Adapters:
    """The corrections of a file or folder by layer; they may be of several kinds in a LyCORIS file."""

    path: Path
    adapters: Mapping[str, BaseAdapter]
    base: str | None

    @property
    def kind(self) -> str:
        return "+".join(sorted({a.kind for a in self.adapters.values()}))


@dataclass(frozen=True)
class BaseModel:
    """What adapters are for: a network with its digest, and the checkpoint it came from, if it is one."""

    opened: OpenedModel
    module: nn.Module
    digest: str
    compressed: Compressed | None

    def layer(self, name: str) -> FactorizedLayer:
        """Return the layer called `name` with a place for adapters."""
        return wrap_dense(self.module, name)

    def weight(self, name: str) -> Tensor:
        return self.layer(name).weight.detach()


def open_base(
    path: str | Path, *, arch: str | None = None, arch_args: Mapping[str, Any] | None = None,
    inputs: Sequence[InputSpec] = (), trust_pickle: bool = False, trust_remote_code: bool = False,
) -> BaseModel:  # fmt: skip
    """Open a compressed checkpoint, or a model as it is. Raises `ModelError` where there is no network."""
    path = Path(path)
    if is_compressed(path):
        found = load_compressed(path)
        return BaseModel(found.opened, found.need_module("adapter"), found.digest, found)
    opened = open_model(
        path,
        arch=arch,
        arch_args=arch_args,
        inputs=inputs,
        trust_pickle=trust_pickle,
        trust_remote_code=trust_remote_code,
    )
    if opened.module is None:
        raise ModelError(path, "a network", "a state dict has no layers of its own", "give --arch")
    digest = tensors_digest(state_of(opened.module), {})
    return BaseModel(opened, opened.module, digest, None)


def load(path: str | Path, base: BaseModel | None = None) -> Adapters:
    """Read an adapter folder or file. With a base, its layers must be the base's, and it must not be of another one."""
    path = Path(path)
    targets = None if base is None else every_target(base.module)
    if path.is_dir():
        found = read_adapter(path, targets, weight=None if base is None else base.weight)
        if base is not None:
            check_base(found.path, found.base, base, found.adapters, targets or {})
        return Adapters(path, found.adapters, found.base)
    if targets is None:
        raise CommandError(
            path, "an adapter folder, or a file and its base", "a file alone" if path.exists() else "nothing there",
            "name the model with --base" if path.exists() else "check the path",
        )  # fmt: skip
    try:
        tensors = load_file(path)
    except OSError as e:
        raise ModelError(path, "an adapter folder or a .safetensors file", e.strerror or str(e)) from e
    except SafetensorError as e:
        raise ModelError(path, "an intact .safetensors file", str(e)) from e
    return Adapters(path, lycoris.read(tensors, targets, where=path), None)


def check_base(
    path: Path,
    recorded: str | None,
    base: BaseModel,
    adapters: Mapping[str, BaseAdapter],
    targets: Mapping[str, Target],
) -> None:
    """Raise `ModelError` for an adapter of another base, or for layers that this one does not have so."""
    if recorded is not None and recorded != base.digest:
        raise ModelError(
            path,
            f"an adapter for the base {base.digest[:12]}",
            f"one for {recorded[:12]}",
            "use the base it was made for",
        )
    for name, a in adapters.items():
        target = targets.get(name)
        if target is None:
            raise ModelError(f"{path}: layer {name}", "a layer of the base", "none of that name")
        if target.shape != a.weight_shape or (a.in_core and target.core != a.core):
            expected = f"a core of {target.core}" if a.in_core else f"shape {target.shape}"
            raise ModelError(f"{path}: layer {name}", expected, a.core if a.in_core else a.weight_shape)


def listing(folder: str | Path = "adapters") -> dict[str, Any]:
    """Return a row for every adapter in `folder`; one that cannot be read has its error in the row."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CommandError(folder, "a folder of adapters", "no folder", "train one with 'lrcompress recover'")
    rows: list[dict[str, Any]] = []
    for path in sorted(p for p in (folder, *folder.iterdir()) if (p / CONFIG).is_file()):
        row: dict[str, Any] = {"name": path.name, "path": str(path), "bytes": _bytes(path / TENSORS)}
        try:
            found = load(path)
            ranks = Counter(a.rank for a in found.adapters.values())
            params = sum(p.numel() for a in found.adapters.values() for p in a.parameters())
            row |= {
                "kind": found.kind,
                "layers": len(found.adapters),
                "ranks": sorted(ranks),
                "params": params,
                "base": found.base,
            }
        except LrcompressError as e:
            row |= {"kind": None, "error": str(e)}
        rows.append(row)
    return {"adapters": rows}


def show(adapter: str | Path, base: BaseModel | None = None) -> dict[str, Any]:
    """Return what an adapter is, layer by layer."""
    found = load(adapter, base)
    rows: list[dict[str, Any]] = []
    for name, a in found.adapters.items():
        layer = None if base is None else base.layer(name)
        row: dict[str, Any] = {
            "name": name, "kind": a.kind, "layer": a.layer_kind, "shape": list(a.weight_shape), "groups": a.groups,
            "rank": a.rank, "alpha": a.alpha, "scaling": a.scaling, "params": sum(p.numel() for p in a.parameters()),
            "decomposed": a.magnitude is not None, "tensors": {n: list(t.shape) for n, t in a.tensors().items()},
        }  # fmt: skip
        if layer is not None or (a.magnitude is None and not a.in_core):
            delta = float(a.delta_weight(layer).detach().norm())
            row |= {
                "delta_norm": delta,
                "share": delta / float(layer.weight.detach().norm()) if layer is not None else None,
            }
        rows.append(row)
    total = sum(int(r["params"]) for r in rows)
    return {"path": str(found.path), "kind": found.kind, "base": found.base, "params": total, "layers": rows}


def convert(
    adapter: str | Path, *, to: str, output: str | Path, base: BaseModel | None = None, rank: int | None = None,
    include: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write an adapter in another format; `to="lora"` (or any with `rank`) expands it to LoRA first.

    Expansion is exact; a `rank` below its own cuts it, and the report has the error of every layer. Raises
    `CommandError` and `ModelError`; nothing is written then.
    """
    _check_request("convert", to, rank)
    found = load(adapter, base)
    chosen = included(found.adapters, include, "convert")
    made, rows = {}, []
    for name, a in chosen.items():
        error = 0.0
        layer = base.layer(name) if base is not None else None
        try:
            if rank is not None:
                made[name], error = truncated(a, rank, layer)
            else:
                made[name] = expanded(a, layer) if to == "lora" else a
        except ValueError as e:
            raise ModelError(
                f"{found.path}: layer {name}",
                "a correction that LoRA can hold",
                e,
                "name its base with --base, or merge it",
            ) from e
        rows.append(
            {"name": name, "from": a.kind, "kind": made[name].kind, "rank": made[name].rank, "rel_error": error}
        )
    written = _write(made, to, Path(output), found.base, {"converted_from": found.kind})
    return {"output": str(output), "format": to, "layers": rows, **written}


def combine(
    adapters: Sequence[str | Path], *, weights: Sequence[float] = (), output: str | Path, to: str = "native",
    base: BaseModel | None = None, rank: int | None = None, include: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write the weighted sum of several adapters as one: exact by stacking, or cut to `rank` with the error per layer."""
    _check_request("combine", to, rank)
    weights = list(weights) or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise CommandError("lrcompress adapter combine --weight", f"{len(adapters)} weights", len(weights))
    several = [load(a, base) for a in adapters]
    bases = {a.base for a in several if a.base is not None}
    if len(bases) > 1:
        raise ModelError(
            several[1].path, "adapters of one base", f"{len(bases)} bases", "combine those that belong together"
        )
    names = sorted({n for a in several for n in a.adapters})
    parts = {n: [(a.adapters[n], w) for a, w in zip(several, weights, strict=True) if n in a.adapters] for n in names}
    # A folder holds one kind, so where the parts are of several kinds all become LoRA.
    same = len({a.kind for found in several for a in found.adapters.values()}) == 1
    made: dict[str, BaseAdapter] = {}
    rows: list[dict[str, Any]] = []
    for name in included(parts, include, "combine"):
        layer = base.layer(name) if base is not None else None
        try:
            whole, error = stacked(parts[name], layer), 0.0
            whole = whole if same and whole.kind in ("lora", "core") else expanded(whole, layer)
            if rank is not None:
                whole, error = truncated(whole, rank, layer)
        except ValueError as e:
            raise ModelError(f"layer {name}", "corrections that add up", e, "name the base with --base") from e
        made[name] = whole
        rows.append(
            {"name": name, "parts": len(parts[name]), "kind": whole.kind, "rank": whole.rank, "rel_error": error}
        )
    written = _write(made, to, Path(output), next(iter(bases), None), {"combined": [str(a.path) for a in several]})
    return {"output": str(output), "format": to, "layers": rows, **written}


def included(adapters: Mapping[str, Any], include: Sequence[str], verb: str) -> dict[str, Any]:
    """Return what the patterns choose; `CommandError` for one that matches nothing."""
    for pattern in include:
        if not any(fnmatchcase(n, pattern) for n in adapters):
            raise CommandError(
                f"lrcompress adapter {verb} --include", "a pattern that matches a layer of the adapter", pattern,
                f"layers are {', '.join(list(adapters)[:4])}, …",
            )  # fmt: skip
    return {n: a for n, a in adapters.items() if not include or any(fnmatchcase(n, p) for p in include)}


def _check_request(verb: str, to: str, rank: int | None) -> None:
    if to not in FORMATS:
        raise CommandError(f"lrcompress adapter {verb} --to", " or ".join(FORMATS), to)
    if rank is not None and rank < 1:
        raise CommandError(f"lrcompress adapter {verb} --rank", "a whole number of at least 1", rank)


def _write(
    adapters: Mapping[str, BaseAdapter], to: str, output: Path, base: str | None, info: Mapping[str, Any]
) -> dict[str, Any]:
    """Write one folder, or one file for LyCORIS; complete or not at all."""
    if to == "lycoris":
        if output.suffix != ".safetensors" or output.exists():
            got = "one that exists" if output.exists() else output.name
            raise CommandError(f"{output}", "the name of a new .safetensors file", got, "choose another with -o")
        data = save(lycoris.write(adapters), metadata={"format": "pt"})
        if not output.parent.is_dir():
            raise CommandError(output, "a place in a folder", "no such folder", "make it first")
        write_atomic(output, data)
        return {"bytes": len(data)}
    kinds = sorted({a.kind for a in adapters.values()})
    if len(kinds) > 1:
        raise ModelError(
            "the adapter", "one kind, which a folder holds", " and ".join(kinds), "expand it with --to lora"
        )
    check_output(output, maker=MAKER, marker=MARKER)
    with staged_folder(output, maker=MAKER, marker=MARKER) as stage:
        write_adapter(stage, adapters, maker=MAKER, base=base, info={"name": output.name, **info}, strict=to == "peft")
    return {"bytes": _bytes(output / TENSORS)}


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


__all__ = ["Adapters", "BaseModel", "combine", "convert", "listing", "load", "open_base", "show"]
