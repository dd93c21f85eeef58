"""What the shipped model must be compared with: dense, dense int8, factorized int8, and equal bytes without adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .. import api
from ..data import Data
from .steps import Context, adapter_folders, model_name, runtime_bytes
from .store import Stage

#: Attempts to meet the bytes of factors plus adapter, and how close below counts as met.
_EQUAL_TRIES, _EQUAL_CLOSE = 4, 0.01


def baselines(context: Context, compressed: Stage, recovered: Stage | None, exported: Stage) -> Stage:
    """Export what the shipped model must be compared with, every one as a folder a device could be given."""
    inputs = {
        "model": context.model_key,
        "compressed": compressed.key,
        "exported": exported.key,
        "calibration": context.split_key("calibration"),
    }

    def build(stage: Path) -> dict[str, Any]:
        calibration, name = context.data("calibration"), model_name(context.recipe)
        quiet: dict[str, Any] = {"calib": calibration, "name": name, "progress": context.progress}
        dense = api.export(context.opened, slots=("none",), output=stage / "dense-fp32", **quiet)
        int8 = api.export(context.opened, slots=("none",), quantize="int8", output=stage / "dense-int8", **quiet)
        small = api.export(
            compressed.folder / "compressed",
            slots=context.recipe.export.slots,
            slot_include=context.recipe.export.slot_include,
            quantize="int8",
            adapters=adapter_folders(recovered),
            output=stage / "factorized-int8",
            **quiet,
        )
        equal = _equal_bytes(context, stage, compressed, exported, calibration)
        return {
            "dense_fp32": dense.data["bytes"],
            "dense_int8": int8.data["bytes"],
            "factorized_int8": small.data["bytes"],
            "equal_bytes": equal,
        }

    return context.store.stage("baselines", inputs, build)


def _equal_bytes(
    context: Context, stage: Path, compressed: Stage, exported: Stage, calibration: Data
) -> dict[str, Any]:
    """Factorize less, so that factors alone fill the bytes of factors plus adapter; the closest from below is kept."""
    want = runtime_bytes(exported.result) + sum(p["bytes"] for p in exported.result["payloads"])
    before, after = compressed.result["params_before"], compressed.result["params_after"]
    target = after + (want - runtime_bytes(exported.result)) / 4
    best: dict[str, Any] | None = None
    for _ in range(_EQUAL_TRIES):
        ratio = min(1.0, target / before)
        part = context.recipe.factorize
        api.factorize(
            context.opened,
            ratio=ratio,
            method=part.method,
            include=part.include,
            exclude=part.exclude,
            calib=calibration,
            seed=context.recipe.seed,
            threads=context.recipe.threads,
            compute="cpu",
            output=stage / "try" / "compressed",
            progress=context.progress,
        )
        data = api.export(
            stage / "try" / "compressed",
            slots=("none",),
            calib=calibration,
            name=model_name(context.recipe),
            output=stage / "try" / "exported",
            progress=context.progress,
        ).data
        have = runtime_bytes({**data, "bytes": data["bytes"]})
        fits = have <= want
        if fits and (best is None or have > best["bytes"]):
            best = {"ratio": ratio, "bytes": have, "wanted_bytes": want}
            _replace(stage / "try" / "exported", stage / "equal-bytes")
        if (fits and want - have <= _EQUAL_CLOSE * want) or ratio == 1.0:
            break
        target += (want - have) / 4
    _remove(stage / "try")
    return best or {"ratio": None, "bytes": None, "wanted_bytes": want}


def _replace(source: Path, dest: Path) -> None:
    _remove(dest)
    source.rename(dest)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
