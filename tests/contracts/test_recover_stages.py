"""A recipe that trains factors before adapters: a stage more, on which all that follows is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lrcompress.adapt._files import read_adapter
from lrcompress.model.checkpoint import load_compressed
from lrcompress.pipeline import steps
from lrcompress.pipeline.store import Store
from lrcompress.progress import Silent
from lrcompress.recipe import Recipe
from tests.support.nets import images, small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(small().state_dict(), tmp_path / "net.safetensors")
    x, y = images(120)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    return tmp_path


def recipe_in(folder: Path, **recover: object) -> Recipe:
    split = {"source": str(folder / "a.npz")}
    made = Recipe.model_validate({
        "schema": 1,
        "name": "small",
        "model": {
            "source": str(folder / "net.safetensors"), "arch": "tests.support.nets:small",
            "inputs": {"x": {"dtype": "float32", "shape": ["batch", 3, 8, 8]}},
        },
        "data": {"calibration": split, "train": split, "select": {**split, "every": 4}, "test": split},
        "factorize": {"rank": 3, "method": "svd"},
        "recover": {"rank": 2, "steps": 20, "learning_rate": 0.003, **recover},
    })  # fmt: skip
    made._path = folder / "small.yaml"
    return made


def through(folder: Path, recipe: Recipe) -> list[steps.Stage]:
    """Return the stages up to the first correction: factorize, retrain where there is one, recover."""
    context = steps.Context(recipe, Store(folder / "run", Silent(), 3), Silent())
    steps.recover(context, steps.retrain(context, steps.factorize(context)))
    return context.store.done


def test_both_trains_the_factors_and_then_an_adapter_on_them(folder: Path) -> None:
    factorized, retrained, recovered = through(folder, recipe_in(folder, train="both"))
    assert [s.name for s in (factorized, retrained, recovered)] == ["factorize", "retrain", "recover"]
    before, after = (s.folder / "compressed" for s in (factorized, retrained))
    one, other = (load_file(p / "model.safetensors") for p in (before, after))
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}
    assert any(not torch.equal(one[n], other[n]) for n in one)
    # The adapter belongs to what was trained, begins where that ended, and both lower the same loss.
    adapter = read_adapter(*steps.adapter_folders(recovered))
    assert adapter.base == load_compressed(after).digest != load_compressed(before).digest
    factors, adapters = retrained.result["trained"]["loss"], recovered.result["loss"]
    assert factors["after"] < factors["before"] and adapters["after"] < adapters["before"]
    assert adapters["before"] == pytest.approx(factors["after"], rel=1e-4)
    assert retrained.result["params_after"] == factorized.result["params_after"]
    assert retrained.result["bytes_after"] == sum(p.stat().st_size for p in after.rglob("*") if p.is_file())


def test_a_second_run_finds_all_of_it_and_another_place_makes_the_same_bytes(folder: Path) -> None:
    first = through(folder, recipe_in(folder, train="both"))
    assert all(s.reused for s in through(folder, recipe_in(folder, train="both")))
    shutil.move(folder / "run", folder / "elsewhere")
    again = through(folder, recipe_in(folder, train="both"))
    assert not any(s.reused for s in again) and [s.digest for s in again] == [s.digest for s in first]
    # What was not asked for otherwise is not built again: the factors' training does not depend on the adapter's rank.
    assert [s.reused for s in through(folder, recipe_in(folder, train="both", rank=3))] == [True, True, False]
    record = json.loads((first[1].folder / "stage.json").read_text())
    assert record["outputs"] == first[1].outputs


def test_adapters_alone_leave_that_stage_out(folder: Path) -> None:
    stages = through(folder, recipe_in(folder))
    assert [s.name for s in stages] == ["factorize", "recover"]
    assert (
        read_adapter(*steps.adapter_folders(stages[1])).base == load_compressed(stages[0].folder / "compressed").digest
    )
