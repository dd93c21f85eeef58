"""What a recipe may say of recovery: closed forms, factors alone, both; a two-layer network through all stages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lrcompress import pipeline
from lrcompress.report import table_text
from tests.support.nets import images

ARCH = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(768, 5))
"""
RECIPE = """
schema: 1
name: two-layers
model: {source: net.safetensors, arch: "net.py:net", inputs: {x: {dtype: float32, shape: [batch, 3, 8, 8]}}}
data:
  calibration: {source: train.npz, limit: 32}
  train: {source: train.npz}
  select: {source: select.npz}
  test: {source: test.npz}
metric: {max_drop: 1.0}
factorize: {method: svd, rank: 2, exclude: ["3"]}
recover: RECOVER
publish: {fleet: 10}
"""


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRCOMPRESS_KEY_PASSPHRASE", "only for tests")
    monkeypatch.setattr("lrcompress.pipeline.measure._ROUNDS", 2)
    monkeypatch.setattr(sys.modules["lrcompress.pipeline.baselines"], "_EQUAL_TRIES", 1)  # the name is a function, too


def run(folder: Path, recover: str, more: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the recipe with `recover` in `folder`; return the report and the stages' results by name."""
    torch.manual_seed(0)
    (folder / "net.py").write_text(ARCH)
    scope: dict[str, Any] = {}
    exec(ARCH, scope)
    save_file(scope["net"]().state_dict(), folder / "net.safetensors")
    for i, (name, n) in enumerate({"train": 160, "select": 60, "test": 80}.items()):
        x, y = images(n, i)
        np.savez(folder / f"{name}.npz", x=x, y=y)
    (folder / "r.yaml").write_text(RECIPE.replace("RECOVER", recover) + more)
    report = pipeline.run(folder / "r.yaml", folder / "run")
    again = pipeline.run(folder / "r.yaml", folder / "run")
    assert again["nothing_to_do"] and again["hashes"] == report["hashes"]
    assert "verdict:" in table_text(report) and (folder / "run" / "report.html").is_file()
    listed = json.loads((folder / "run" / "run.json").read_text())["stages"]
    records = {s["name"]: json.loads((folder / "run" / s["folder"] / "stage.json").read_text()) for s in listed}
    return report, {name: r["result"] for name, r in records.items()}


def names(report: dict[str, Any]) -> set[str]:
    return {r["name"] for r in report["rows"]}


WITHOUT = {"original fp32", "dense int8", "factorized", "factorized + int8"}
WITH = WITHOUT | {"factorized + adapter", "factorized + int8 + adapter"}


def test_factors_alone_ship_no_correction(tmp_path: Path) -> None:
    report, found = run(tmp_path, "{train: factors, steps: 4, learning_rate: 1.0e-3}")
    assert "recover" not in found and found["retrain"]["trained"]["train"] == "factors" and found["retrain"]["changed"]
    assert names(report) - {"factorized, equal bytes"} == WITHOUT
    assert report["updates"] == [] and [r["name"] for r in report["device_rows"]] == ["as delivered"]
    assert set(report["training_seconds"]) == {"retrain"}
    assert found["export"]["payloads"] == []


@pytest.mark.slow
def test_a_later_update_is_the_first_release_where_only_factors_were_trained(tmp_path: Path) -> None:
    later = """
updates:
  - {name: later, steps: 3, learning_rate: 1.0e-3, teacher: labels, rank: 2, closed: off,
     data: {train: {source: train.npz}, select: {source: select.npz}, test: {source: test.npz}}}
"""
    report, _ = run(tmp_path, "{train: factors, steps: 2, learning_rate: 1.0e-3}", later)
    assert [u["name"] for u in report["updates"]] == ["later"] and report["updates"][0]["seq"] == 1
    assert [r["name"] for r in report["device_rows"]][1] == "before update 1 (later)"


@pytest.mark.slow
def test_factors_first_then_adapters(tmp_path: Path) -> None:
    report, found = run(tmp_path, "{train: both, rank: 2, steps: 4, learning_rate: 1.0e-3}")
    assert found["retrain"]["trained"]["train"] == "factors" and found["recover"]["train"] == "adapters"
    assert names(report) - {"factorized, equal bytes"} == WITH
    assert [u["name"] for u in report["updates"]] == ["recover"]


def test_closed_forms_alone_train_nothing(tmp_path: Path) -> None:
    report, found = run(tmp_path, "{closed: only, kinds: [lora, core], rank: 2}")
    for row in found["recover"]["tries"].values():
        assert row["steps"] == 0 and row["closed"]["mode"] == "only"
    assert "retrain" not in found and names(report) - {"factorized, equal bytes"} == WITH


@pytest.mark.slow
def test_off_starts_from_zero(tmp_path: Path) -> None:
    _, found = run(tmp_path, "{closed: off, rank: 2, steps: 3, learning_rate: 1.0e-3}")
    assert found["recover"]["closed"] is None and found["recover"]["steps"] == 3


@pytest.mark.parametrize("train", [pytest.param("adapters", marks=pytest.mark.slow), "both"])
@pytest.mark.slow
def test_a_refit_takes_the_place_of_the_factorized_network(train: str, tmp_path: Path) -> None:
    report, found = run(tmp_path, f"{{closed: refit, train: {train}, rank: 2, steps: 3, learning_rate: 1.0e-3}}")
    kept = found["retrain"]
    assert kept["trained"]["metric"] == "squared_distance_to_original"
    assert kept["changed"] == any(r["applied"] for r in kept["trained"]["layers"])
    assert ("recover" in found) == (train == "both")
    assert names(report) - {"factorized, equal bytes"} == (WITH if train == "both" else WITHOUT)


@pytest.mark.slow
def test_a_refit_that_helps_nowhere_leaves_the_network_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrcompress.verbs import closed

    def nothing(*args: Any, **kwargs: Any) -> Any:
        return closed.Refitted(rows=({"layer": "0", "applied": False, "bytes": 0},), before=1.0, after=1.0)

    monkeypatch.setattr(closed, "refit", nothing)
    with pytest.warns(UserWarning, match="nothing is written"):
        report, found = run(tmp_path, "{closed: refit}")
    assert not found["retrain"]["changed"] and names(report) - {"factorized, equal bytes"} == WITHOUT
