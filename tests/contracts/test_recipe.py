"""Recipes: frozen, strict, and an error that names file, line and key path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from lrcompress import recipe as recipes
from lrcompress.errors import HostError, RecipeError

TEXT = """\
schema: 1
name: small
model:
  source: ${PLACE:-../here}/net.safetensors
  arch: archs/net.py:net
  inputs: {x: {dtype: float32, shape: [batch, 3]}}
data:
  calibration: {source: a.npz, limit: 4}
  train: {source: a.npz}
  select: {source: a.npz, skip: 4}
  test: {source: b.npz}
factorize:
  ratio: 0.5
updates:
  - name: later
    data: {train: {source: a.npz, skip: 1}, select: {source: a.npz}, test: {source: a.npz}}
"""


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "small.yaml").write_text(text)
    return tmp_path / "small.yaml"


def test_defaults_paths_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipes.load(write(tmp_path, TEXT))
    assert (
        found.recover.rank == 8 and found.export.slots is None and found.seed == 0 and found.updates[0].kind == "lora"
    )
    assert recipes.resolve(found, found.model.source) == str(tmp_path.resolve().parent / "here" / "net.safetensors")
    assert recipes.resolve(found, found.model.arch) == f"{tmp_path.resolve()}/archs/net.py:net"
    assert recipes.resolve(found, "pkg.mod:call") == "pkg.mod:call"
    assert [(s.name, s.dtype, tuple(s.shape)) for s in found.inputs] == [("x", "float32", ("batch", 3))]
    monkeypatch.setenv("PLACE", "/elsewhere")
    assert recipes.load(write(tmp_path, TEXT)).model.source == "/elsewhere/net.safetensors"
    with pytest.raises(ValidationError, match="frozen"):
        found.name = "other"


@pytest.mark.parametrize(
    ("old", "new", "where", "parts"),
    [
        ("ratio: 0.5", "ratoi: 0.5", ":13: factorize.ratoi", ["did you mean 'ratio'"]),
        ("limit: 4", "limmit: 4", ":8: data.calibration.limmit", ["did you mean 'limit'"]),
        (
            "    data: {train: {source",
            "    data: {train: {sourec",
            ":16: updates[0].data.train.sourec",
            ["did you mean 'source'"],
        ),
        ("name: small", "nmae: small", ":2: nmae", ["did you mean 'name'"]),
        ("x: {dtype", "x: {dtipe", ":6: model.inputs.x.dtipe", ["did you mean 'dtype'"]),
        ("ratio: 0.5", "ratio: 1.5", ":13: factorize.ratio", ["less than or equal to 1", "1.5"]),
        ("ratio: 0.5", "ratio: half", ":13: factorize.ratio", ["number", "half"]),
        ("  ratio: 0.5", "  {ratio: 0.5, rank: 3}", ":12: factorize", ["exactly one of rank, ratio, energy, plan"]),
        ("  test: {source: b.npz}\n", "", ":7: data.test", ["this key"]),
        ("schema: 1", "schema: 2", ":1: schema", ["1"]),
        ("name: small", "name: Not/Safe", ":2: name", ["pattern"]),
        ("name: small", "name: small\nname: twice", ":3: name", ["a key once"]),
        ("${PLACE:-../here}", "${PLACE_UNSET}", ":4: model.source", ["PLACE_UNSET"]),
        ("ratio: 0.5", "ratio: !!python/object/apply:os.system [true]", ":13", []),
        ("ratio: 0.5", "ratio: [", ":", ["valid YAML"]),
        ("name: later", "name: recover", ": updates", ["not 'recover'"]),
        ("updates:", "recover: {teacher: 'logits=1,lables=2'}\nupdates:", ":14: recover", ["did you mean 'labels'"]),
        ("updates:", "recover: {hidden: ['layer*']}\nupdates:", ":14: recover", ["the loss hidden"]),
        ("updates:", "recover: {trian: both}\nupdates:", ":14: recover.trian", ["did you mean 'train'"]),
        ("updates:", "recover: {train: factor}\nupdates:", ":14: recover.train", ["'adapters', 'factors' or 'both'"]),
        ("updates:", "recover: {closed: yes}\nupdates:", ":14: recover.closed", ["'auto', 'only', 'off' or 'refit'"]),
        ("updates:", "recover: {closed: refitt}\nupdates:", ":14: recover.closed", ["'refit'", "'refitt'"]),
        ("updates:", "recover: {closed: only, train: factors}\nupdates:", ":14: recover", ["closed: refit"]),
        (
            "updates:",
            "recover: {closed: only, kinds: [lora, loha]}\nupdates:",
            ":14: recover",
            ["'loha' has no closed"],
        ),
        ("updates:", "recover: {kinds: [lroa]}\nupdates:", ":14: recover", ["did you mean 'lora'"]),
        ("name: later", "name: later\n    closed: refit", ":16: updates[0].closed", ["'auto', 'only' or 'off'"]),
        ("name: later", "name: later\n    kind: lokrr", ":15: updates[0]", ["did you mean 'lokr'"]),
        ("updates:", "recover: {learning_rate: 0}\nupdates:", ":14: recover.learning_rate", ["greater than 0"]),
        ("updates:", "recover: {acumulate: 2}\nupdates:", ":14: recover.acumulate", ["did you mean 'accumulate'"]),
        ("  source: ${PLACE:-../here}/net.safetensors\n", "", ":3: model", ["exactly one of source and train"]),
    ],
)
def test_an_error_names_file_line_and_key(tmp_path: Path, old: str, new: str, where: str, parts: list[str]) -> None:
    assert old in TEXT
    path = write(tmp_path, TEXT.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    assert caught.value.where.startswith(f"{path}{where}")
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_documents_that_are_no_recipe(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    for text in ("", "[]", "just text", "\x00", "a: *missing", bomb, "x: " + "[" * 3000):
        with pytest.raises(RecipeError):
            recipes.load(write(tmp_path, text))
    (tmp_path / "small.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="UTF-8"):
        recipes.load(tmp_path / "small.yaml")


def test_names_of_recipes_that_ship() -> None:
    assert {"quickstart", "resnet20-cifar10", "minilm-sts"} <= set(recipes.shipped())
    for name in recipes.shipped():
        assert recipes.load(name).name == name
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        recipes.find("quikstart")


def test_splits_open_with_the_recipes_preprocessing(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT.replace("data:\n", "data:\n  preprocess: {x: {scale: 2.0}}\n", 1))
    np.savez(tmp_path / "a.npz", x=np.arange(30, dtype=np.uint8).reshape(10, 3), y=np.arange(10))
    assert len(recipes.open_split(path, "calibration")) == 4
    select = recipes.open_split(path, "select")
    assert select.labels.tolist() == [4, 5, 6, 7, 8, 9]
    assert next(iter(select.batches(1))).inputs["x"].tolist() == [[24.0, 26.0, 28.0]]
    assert len(recipes.open_split(path, "later.train")) == 9
    spread = write(tmp_path, path.read_text().replace("skip: 4}", "skip: 1, every: 4, limit: 2}", 1))
    assert recipes.open_split(spread, "select").labels.tolist() == [1, 5]
    with pytest.raises(RecipeError, match="did you mean 'select'"):
        recipes.open_split(path, "selekt")


def test_a_package_that_is_not_installed_says_what_to_install(tmp_path: Path) -> None:
    found = recipes.load(write(tmp_path, TEXT))
    with pytest.raises(HostError, match="pip install no-such-thing"):
        recipes.resolve(found, "package:no_such_thing/model")
    assert Path(recipes.resolve(found, "package:numpy/random")) == Path(np.__file__).parent / "random"
    assert Path(recipes.resolve(found, "package:numpy")).is_dir()
