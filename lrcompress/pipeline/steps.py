"""The stages that make files: base network, factorization, correction, export, baselines, later corrections.

Every function here takes the `Context` of the run, asks the store for its stage, and returns it. What decides a
stage's content goes into its inputs, by content and never by path.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .. import api, metrics
from ..data import Data
from ..data._callables import is_callable_source, load_callable
from ..errors import DataError, ModelError, RecipeError
from ..files import sha256_file, sha256_tree, write_json
from ..model import OpenedModel, open_model
from ..model.checkpoint import MARKER as CHECKPOINT
from ..progress import Progress
from ..recipe import Recipe, TrainingPart, open_split, resolve, split_part
from .store import Stage, Store

#: Layers whose spectrum is kept for the report, and numbers per spectrum.
_SPECTRA, _SPECTRUM_POINTS = 60, 200


@dataclass
class Context:
    """What every stage may use."""

    recipe: Recipe
    store: Store
    progress: Progress
    base: Stage | None = None

    @cached_property
    def source(self) -> str:
        """The path of the network's weights."""
        if self.base is not None:
            return str(self.base.folder / "base" / "model.safetensors")
        assert self.recipe.model.source is not None
        return resolve(self.recipe, self.recipe.model.source)

    @cached_property
    def arch(self) -> str | None:
        return None if self.recipe.model.arch is None else resolve(self.recipe, self.recipe.model.arch)

    @cached_property
    def opened(self) -> OpenedModel:
        """The original network, opened when the first stage that is not there asks for it."""
        model = self.recipe.model
        found = open_model(
            self.source,
            arch=self.arch,
            arch_args=model.arch_args,
            inputs=self.recipe.inputs,
            trust_pickle=model.trust_pickle,
        )
        if found.module is None:
            raise ModelError(self.source, "a network", "a state dict has no graph", "name model.arch in the recipe")
        return found

    def data(self, split: str) -> Data:
        """Open a split for the network."""
        folder = self.opened.extra.get("folder")
        return open_split(
            self.recipe,
            split,
            inputs=self.opened.inputs,
            tokenizer=Path(folder) if folder and not self.recipe.data.tokenizer else None,
        )

    @cached_property
    def model_key(self) -> dict[str, Any]:
        """What identifies the network: its bytes and the code that builds it."""
        base = self.base.key if self.base is not None else content_digest(self.source)
        arch = None if self.arch is None else code_digest(self.arch)
        part = self.recipe.model
        inputs = {k: v.model_dump(mode="json") for k, v in part.inputs.items()}
        return {
            "source": base,
            "arch": arch,
            "arch_args": part.arch_args,
            "inputs": inputs,
            "threads": self.recipe.threads,
            "seed": self.recipe.seed,
        }

    def split_key(self, split: str) -> dict[str, Any]:
        """What identifies a split: the bytes it is read from and how it is read."""
        part, data = split_part(self.recipe, split), self.recipe.data
        source = resolve(self.recipe, part.source)
        content = code_digest(source) if is_callable_source(source) else content_digest(source)
        how = data.model_dump(mode="json", include={"preprocess", "columns", "max_length"})
        return {"content": content, "how": how, **part.model_dump(mode="json", exclude={"source"})}


def content_digest(source: str) -> str:
    """Return the hash of a file or of a folder's files; raises `DataError` where there is nothing."""
    path = Path(source)
    if path.is_dir():
        return sha256_tree(path)
    if not path.is_file():
        raise DataError(
            path, "a file or folder that the recipe names", "nothing there", "check the path, or set the variable in it"
        )
    return sha256_file(path)


def code_digest(spec: str) -> str:
    """Return the hash of the file that holds `file.py:name` or `pkg.mod:name`, and the name."""
    head, _, name = spec.rpartition(":")
    if head.endswith(".py"):
        return f"{content_digest(head)}:{name}"
    try:
        found = importlib.util.find_spec(head)
    except ModuleNotFoundError:
        found = None
    if found is None or not found.origin:
        raise RecipeError(spec, "an importable module", f"no module {head}")
    return f"{content_digest(found.origin)}:{name}"


def base(context: Context) -> Stage:
    """Train the base network: the recipe has no pretrained one."""
    from safetensors.torch import save_file

    recipe = context.recipe
    part = recipe.model
    assert part.train is not None
    spec = resolve(recipe, part.train)
    inputs = {"code": code_digest(spec), "args": part.train_args, "seed": recipe.seed, "threads": recipe.threads}

    def build(stage: Path) -> dict[str, Any]:
        import time

        started = time.perf_counter()
        with context.progress.task("train the base network", total=part.train_args.get("steps")) as advance:
            network = load_callable(spec)(seed=recipe.seed, advance=advance, **part.train_args)
        if not isinstance(network, torch.nn.Module):
            raise RecipeError(
                f"{recipe.path}: model.train", "a callable that returns a torch.nn.Module", type(network).__name__
            )
        (stage / "base").mkdir()
        state = {k: v.detach().contiguous().clone() for k, v in sorted(network.state_dict().items())}
        save_file(state, stage / "base" / "model.safetensors")
        return {"train_seconds": time.perf_counter() - started, "params": sum(p.numel() for p in network.parameters())}

    return context.store.stage("base", inputs, build)


def factorize(context: Context) -> Stage:
    """Make the network small."""
    part = context.recipe.factorize
    options = part.model_dump(mode="json")
    plan = None if part.plan is None else resolve(context.recipe, part.plan)
    inputs = {
        "model": context.model_key,
        "options": options,
        "plan": plan and content_digest(plan),
        "calibration": context.split_key("calibration"),
    }

    def build(stage: Path) -> dict[str, Any]:
        options["plan"] = plan
        found = api.factorize(
            context.opened,
            **options,
            calib=context.data("calibration"),
            seed=context.recipe.seed,
            threads=context.recipe.threads,
            compute="cpu",
            output=stage / "compressed",
            progress=context.progress,
        )
        size = _same_anywhere(stage / "compressed", context.store.folder)
        result = {**_without_paths(found.data), "bytes_after": size}
        return {**result, "spectra": spectra(context.opened.module, found.data["layers"])}

    return context.store.stage("factorize", inputs, build)


def _same_anywhere(folder: Path, run: Path) -> int:
    """Make a checkpoint's record the same bytes in every run directory, return its size.

    A path that leads out of the run directory becomes absolute: a relative one would say how deep the directory lies.
    """
    path = folder / CHECKPOINT
    record = json.loads(path.read_text())
    source = record["source"].get("path")
    if source and not (folder / source).resolve().is_relative_to(run):
        record["source"]["path"] = str((folder / source).resolve())
    arch = record["model"].get("arch") or {}
    if arch.get("relative") and Path(arch["spec"].rpartition(":")[0]).is_absolute():
        del arch["relative"]
    write_json(path, record)
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _without_paths(data: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k != "output"}


def spectra(module: torch.nn.Module | None, layers: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the singular values, over the largest, of the original weights of factorized layers."""
    out: dict[str, list[float]] = {}
    weights = {} if module is None else dict(module.named_parameters())
    for row in [r for r in layers if r["form"] != "dense"][:_SPECTRA]:
        weight = weights.get(f"{row['name']}.weight")
        if weight is None or weight.dim() < 2:
            continue
        w = weight.detach().double().flatten(1)
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
        top = float(values[0]) or 1.0
        out[row["name"]] = [round(float(v) / top, 6) for v in values[:_SPECTRUM_POINTS]]
    return out


def _training(context: Context, part: TrainingPart, kind: str, closed: str) -> dict[str, Any]:
    """Return the options of `recover`; the metric decides only where the loss is a poor guide."""
    return {"adapter_kind": kind, "rank": part.rank, "closed": closed, **_options(context, part)}


def _options(context: Context, part: TrainingPart) -> dict[str, Any]:
    name = context.recipe.metric.name
    own = (
        "steps", "batch_size", "accumulate", "learning_rate", "patience", "max_seconds", "temperature", "hidden",
        "augment", "mix", "checkpointing", "precision",
    )  # fmt: skip
    return {
        "loss": part.teacher,
        **{n: getattr(part, n) for n in own},
        "metric": None if name in ("accuracy", "top5") else name,
        "seed": context.recipe.seed,
        "threads": context.recipe.threads,
        "compute": "cpu",
    }


def retrain(context: Context, compressed: Stage) -> Stage:
    """Train the factors, or refit them, where the recipe says so; what comes of it takes their place.

    A refit that helps nowhere leaves the factorized network as it is.
    """
    part = context.recipe.recover
    if not part.rebases:
        return compressed
    options: dict[str, Any] = {"train": "factors", **_options(context, part)}
    if part.closed == "refit":
        options = {"closed": "refit", "seed": context.recipe.seed, "threads": context.recipe.threads}
    inputs = {
        "compressed": compressed.key,
        "options": options,
        **{n: context.split_key(n) for n in ("train", "select")},
    }

    def build(stage: Path) -> dict[str, Any]:
        found = api.recover(
            compressed.folder / "compressed",
            data=context.data("train"),
            select=context.data("select"),
            name="recovered",
            output=stage / "compressed",
            original=context.opened,
            progress=context.progress,
            **options,
        )
        result = {**compressed.result, "trained": _without_paths(found.data), "changed": found.output is not None}
        if found.output is not None:
            result["bytes_after"] = _same_anywhere(stage / "compressed", context.store.folder)
        return result

    stage = context.store.stage("retrain", inputs, build)
    return stage if stage.result["changed"] else compressed


def recover(context: Context, compressed: Stage) -> Stage | None:
    """Train the first correction, once per kind; the best on `select` ships. None where the recipe wants no correction."""
    part = context.recipe.recover
    if not part.corrects:
        return None
    # A refit has had its turn: what is left is for training, from wherever that starts best.
    closed = "auto" if part.closed == "refit" else part.closed
    tries = {kind: _training(context, part, kind, closed) for kind in part.kinds}
    inputs = {
        "compressed": compressed.key,
        "tries": tries,
        "train": context.split_key("train"),
        "select": context.split_key("select"),
    }

    def build(stage: Path) -> dict[str, Any]:
        train, select = context.data("train"), context.data("select")
        found = {
            kind: api.recover(
                compressed.folder / "compressed",
                data=train,
                select=select,
                name="recover",
                output=stage / kind / "recover",
                original=context.opened,
                progress=context.progress,
                **options,
            ).data
            for kind, options in tries.items()
        }
        chosen = min(found, key=lambda kind: _rank_key(context, found[kind]))
        return {
            "chosen": chosen,
            "tries": {k: _without_paths(v) for k, v in found.items()},
            **_without_paths(found[chosen]),
        }

    return context.store.stage("recover", inputs, build)


def _rank_key(context: Context, data: dict[str, Any]) -> tuple[float, int]:
    """Order corrections: the better value on `select` first, then the smaller payload."""
    after = float(data["after"])
    known = data["metric"] in metrics.METRICS
    upward = known and metrics.get(data["metric"]).direction == "max"
    return (-after if upward else after, int(data["payload_bytes"]))


def adapter_folders(stage: Stage | None) -> list[Path]:
    """Return the adapter that the stage `recover` chose, if there is one."""
    return [] if stage is None else [stage.folder / str(stage.result["chosen"]) / "recover"]


def export(context: Context, compressed: Stage, recovered: Stage | None) -> Stage:
    """Write what a device is given, and the first correction, if there is one, as a payload."""
    part = context.recipe.export
    options = part.model_dump(mode="json")
    inputs = {
        "compressed": compressed.key,
        "recover": recovered and recovered.key,
        "options": options,
        "name": model_name(context.recipe),
    }

    def build(stage: Path) -> dict[str, Any]:
        data = api.export(
            compressed.folder / "compressed",
            **options,
            calib=context.data("calibration"),
            adapters=adapter_folders(recovered),
            name=model_name(context.recipe),
            output=stage / "exported",
            progress=context.progress,
        ).data
        return _without_payload_paths(data)

    return context.store.stage("export", inputs, build)


def _without_payload_paths(data: dict[str, Any]) -> dict[str, Any]:
    payloads = [{"name": Path(p["path"]).stem, "bytes": p["bytes"]} for p in data["payloads"]]
    return {**_without_paths(data), "payloads": payloads}


def model_name(recipe: Recipe) -> str:
    return recipe.model.name or recipe.name


def runtime_bytes(export_data: dict[str, Any]) -> int:
    """Return the bytes a device needs to run a model: the graph and its constants."""
    return int(export_data["bytes"]["graph"]) + int(export_data["bytes"]["base"])


def update(context: Context, number: int, compressed: Stage) -> Stage:
    """Train a later correction on the samples of a changed world."""
    part = context.recipe.updates[number]
    options = _training(context, part, part.kind, part.closed)
    splits = {n: context.split_key(f"{part.name}.{n}") for n in ("train", "select")}
    inputs = {"compressed": compressed.key, "options": options, "name": part.name, "splits": splits}

    def build(stage: Path) -> dict[str, Any]:
        found = api.recover(
            compressed.folder / "compressed",
            data=context.data(f"{part.name}.train"),
            select=context.data(f"{part.name}.select"),
            name=part.name,
            output=stage / "adapters" / part.name,
            original=context.opened,
            progress=context.progress,
            **options,
        )
        return _without_paths(found.data)

    return context.store.stage(f"update-{part.name}", inputs, build)
