"""The last stage: sign and publish the corrections, and let one device directory take them and answer.

The repository, its keys and the device stand in the run directory itself, where a person can go on with them. They
are made anew whenever this stage runs; its record keeps the device's own answers, from which every accuracy of a
device row is computed.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .. import edge, metrics, publish
from ..data import Data
from ..errors import DeviceStateError
from ..files import canonical_json, finite, sha256_json, write_atomic
from ..runtime import Session
from .steps import Context, runtime_bytes
from .store import MAKER, Stage, Store

_BATCH = 200
REPOSITORY, KEYS, DEVICE, PASSPHRASE, MARK = "repository", "keys", "device", "passphrase", ".fleet.json"


def places(store: Store) -> dict[str, Path]:
    """Return where the fleet's folders stand."""
    return {n: store.folder / n for n in (REPOSITORY, KEYS, DEVICE)}


def fleet(context: Context, recovered: Stage | None, exported: Stage, compared: Stage, updates: list[Stage]) -> Stage:
    """Publish, update a device, let it answer; then the same for every later correction."""
    recipe, where = context.recipe, places(context.store)
    splits = {n: context.split_key(n) for n in ["test", *(f"{u.name}.test" for u in recipe.updates)]}
    inputs = {
        "exported": exported.key,
        "recover": recovered and recovered.key,
        "baselines": compared.key,
        "updates": [u.key for u in updates],
        "splits": splits,
        "publish": recipe.publish.model_dump(mode="json"),
        "metric": recipe.metric.name,
    }

    # There is one repository and one device in a run directory: they may be those of another state of the recipe.
    mark, about = context.store.folder / MARK, {"made_by": MAKER, "inputs": sha256_json(finite(inputs))}
    if not mark.is_file() or mark.read_bytes() != canonical_json(about):
        mark.unlink(missing_ok=True)

    def build(stage: Path) -> dict[str, Any]:
        mark.unlink(missing_ok=True)
        for folder in where.values():
            shutil.rmtree(folder, ignore_errors=True)
        original = Session(compared.folder / "dense-fp32", threads=1)
        first = None if recovered is None else exported.folder / "exported" / "payloads" / "recover.safetensors"
        result = _Fleet(context, stage, exported, original).run(first, updates)
        write_atomic(mark, canonical_json(about))
        return result

    return context.store.stage("publish", inputs, build, needs=(mark, *where.values()))


class _Fleet:
    """One repository, one device, and the answers it gives."""

    def __init__(self, context: Context, stage: Path, exported: Stage, original: Session) -> None:
        self.context, self.stage, self.exported, self.original = context, stage, exported, original
        self.where = places(context.store)
        self.metric = metrics.get(context.recipe.metric.name)
        self.reference = original.run if self.metric.needs_original else None
        self.group = context.recipe.publish.group
        self.rows: list[dict[str, Any]] = []
        self.releases: list[dict[str, Any]] = []

    def run(self, first: Path | None, updates: list[Stage]) -> dict[str, Any]:
        recipe, context = self.context.recipe, self.context
        given = os.environ.get("LRCOMPRESS_KEY_PASSPHRASE")
        self.passphrase = given or secrets.token_urlsafe(18)
        folder = self.exported.folder / "exported"
        publish.init_repository(self.where[REPOSITORY], folder, self.where[KEYS], passphrase=self.passphrase)
        if not given:
            # Nobody was asked: it is kept beside the keys, for the owner of this folder to go on with them.
            write_atomic(self.where[KEYS] / PASSPHRASE, self.passphrase.encode(), mode=0o600)
        root = self.where[REPOSITORY] / "metadata" / "1.root.json"
        edge.Device.init(self.where[DEVICE], folder, root, str(self.where[REPOSITORY]), self.group)
        self.device = edge.Device(self.where[DEVICE])
        test = context.data("test")
        shifts: list[dict[str, Any]] = []
        with context.progress.task(
            "publish and update a device", total=1 + (first is not None) + 2 * len(updates)
        ) as advance:
            self._answer("as delivered", "test", test)
            advance(1, "answered as delivered")
            if first is not None:
                self._release("recover", first)
                self._answer("after update 1 (recover)", "test", test)
                advance(1, "update 1")
            start = 1 if first is None else 2
            for number, (part, update) in enumerate(zip(recipe.updates, updates, strict=True), start=start):
                split, after = f"{part.name}.test", f"after update {number} ({part.name})"
                shifted = context.data(split)
                original = self.metric.evaluate(self.original.run, shifted, _BATCH, original=self.reference)
                before = self._answer(f"before update {number} ({part.name})", split, shifted)
                advance(1, part.name)
                self._release(part.name, update.folder / "adapters" / part.name)
                answered = self._answer(after, split, shifted)
                kept = self._answer(after, "test", test)
                values = {"before": before.value, "after": answered.value, "kept": kept.value}
                shifts.append({"name": part.name, "original": original.value, **values})
                advance(1, f"update {number}")
        size = runtime_bytes(self.exported.result)
        return {
            "device_rows": self.rows,
            "releases": self.releases,
            "shifts": shifts,
            "model_bytes": size,
            "fleet": self._fleet_bytes(size),
        }

    def _release(self, name: str, source: Path) -> None:
        """Publish `source` and let the device take it; an update that is not taken ends the run."""
        recipe = self.context.recipe
        added = publish.add(
            self.where[REPOSITORY],
            source,
            group=self.group,
            encoding=recipe.publish.encoding,
            passphrase=self.passphrase,
        )
        taken = self.device.update()
        if taken["state"] != "updated":
            raise DeviceStateError(
                self.where[DEVICE], f"update {name!r} to be taken", taken["state"], str(taken.get("reason") or "")
            )
        keep = ("seq", "sha256", "encoding", "payload_bytes", "metadata_bytes", "sizes")
        got = {k: taken.get(k) for k in ("bytes_downloaded", "requests", "ms")}
        self.releases.append({"name": name, **{k: added.get(k) for k in keep}, **got})

    def _answer(self, name: str, split: str, data: Data) -> metrics.MetricResult:
        """Let the device answer a split; keep its outputs, return the metric they give."""
        parts = [self.device.infer(batch.inputs) for batch in data.batches(_BATCH)]
        outputs = {k: np.concatenate([p[k] for p in parts]) for k in [metrics.answer_name(parts[0])]}
        file = f"answers/{len(self.rows):02d}.npz"
        (self.stage / "answers").mkdir(exist_ok=True)
        np.savez(self.stage / file, **outputs)  # type: ignore[arg-type]
        result = of_outputs(self.metric, outputs, data, self.reference)
        about = {"metric": result.name, "value": result.value, "n": result.n, "stderr": result.stderr}
        self.rows.append(
            {"name": name, "split": split, "answers": file, **about, "serving": self.device.status()["serving"]}
        )
        return result

    def _fleet_bytes(self, model: int) -> dict[str, Any]:
        devices = self.context.recipe.publish.fleet
        updates = [r["bytes_downloaded"] or (r["payload_bytes"] + r["metadata_bytes"]) for r in self.releases]
        return {"devices": devices, "updates_bytes": [devices * u for u in updates], "model_bytes": devices * model}


def of_outputs(
    metric: metrics.Metric, outputs: dict[str, np.ndarray], data: Data, original: metrics.Predict | None
) -> metrics.MetricResult:
    """Return the metric of answers that were given before, in the order of `data`."""
    place = 0

    def replay(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal place
        size = len(next(iter(inputs.values())))
        place += size
        return {k: v[place - size : place] for k, v in outputs.items()}

    return metric.evaluate(replay, data, _BATCH, original=original)
