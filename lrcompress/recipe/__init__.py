"""Recipes: one YAML file says which model, which data, how small, how corrected, where it goes.

    recipe = load("quickstart")                  # a file, or the name of a recipe that ships with the package
    data = open_split(recipe, "calibration")     # the one home of preprocessing

A recipe is frozen once read. Paths are relative to its file, `${NAME:-default}` comes from the environment, an unknown
key is an error that names file, line and key path and the nearest known key.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from ..data import Data, InputLike, open_data
from ..errors import HostError, RecipeError
from ..yamlfile import parse
from .schema import Recipe, SplitPart, TrainingPart

__all__ = ["Recipe", "SplitPart", "TrainingPart", "find", "load", "open_split", "resolve", "shipped", "split_part"]

SPLITS = ("calibration", "train", "select", "test")


def folders() -> list[Path]:
    """Return where recipes that ship with the package lie: inside it, or at the top of a checkout."""
    package = Path(__file__).parent.parent
    found = [package / "_recipes", package.parent / "recipes"]
    return [f for f in found if f.is_dir()]


def shipped() -> dict[str, Path]:
    """Return the recipes that ship with the package, by name."""
    return {p.stem: p for folder in reversed(folders()) for p in sorted(folder.glob("*.yaml"))}


def find(recipe: str | Path) -> Path:
    """Return the file that `recipe` names: a path, or the name of one that ships; raises `RecipeError`."""
    path = Path(recipe)
    if path.is_file():
        return path
    known = shipped()
    if str(recipe) in known:
        return known[str(recipe)]
    near = get_close_matches(str(recipe), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"recipes that ship: {', '.join(known)}"
    raise RecipeError(recipe, "a recipe file, or the name of a recipe that ships", "neither", hint)


def load(recipe: str | Path | Recipe) -> Recipe:
    """Read and check a recipe; raises `RecipeError` with file, line and key path."""
    if isinstance(recipe, Recipe):
        return recipe
    path = find(recipe)
    found = parse(path, Recipe, error=RecipeError)
    found._path = path.resolve()
    names = [u.name for u in found.updates]
    twice = next((n for n in names if names.count(n) > 1 or n == "recover"), None)
    if twice:
        raise RecipeError(f"{path}: updates", "a name of its own for every update, not 'recover'", twice)
    return found


def resolve(recipe: Recipe, text: str) -> str:
    """Return a path or `file.py:name` as an absolute one; `package:NAME/FOLDER` lies inside an installed package."""
    if text.startswith("package:"):
        return str(_in_package(text.removeprefix("package:")))
    head, colon, name = text.rpartition(":")
    if colon and name.isidentifier():
        if not head.endswith(".py"):
            return text
        return f"{os.path.normpath(recipe.path.parent / head)}:{name}"
    return os.path.normpath(recipe.path.parent / Path(text).expanduser())


def _in_package(text: str) -> Path:
    name, _, inside = text.partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        remedy = f"pip install {name.replace('_', '-')}"
        raise HostError(f"package:{text}", f"the installed package {name}", "none", remedy)
    return Path(next(iter(spec.submodule_search_locations))) / inside


def open_split(
    recipe: Recipe | str | Path, split: str, *, inputs: Sequence[InputLike] | None = None, tokenizer: Path | None = None
) -> Data:
    """Open one split of a recipe, preprocessed: calibration, train, select, test, or `UPDATE.train` of an update.

    `inputs` and `tokenizer` default to what the recipe says of its model.
    """
    found = load(recipe)
    part = split_part(found, split)
    data = found.data
    if tokenizer is None:
        tokenizer = _tokenizer(found)
    columns = {k: v for k, v in (data.columns.model_dump() if data.columns else {}).items() if v is not None}
    opened = open_data(
        resolve(found, part.source),
        inputs=inputs or found.inputs,
        skip=part.skip,
        limit=None if part.every > 1 else part.limit,
        args=part.args,
        preprocess={k: v.model_dump() for k, v in data.preprocess.items()},
        columns=columns or None,
        tokenizer=tokenizer,
        max_length=data.max_length,
    )
    if part.every == 1:
        return opened
    width = 2 if opened.pairs else 1
    rows = np.arange(0, len(opened) // width, part.every)[: part.limit]
    return opened.take((rows[:, None] * width + np.arange(width)).reshape(-1))


def split_part(recipe: Recipe, split: str) -> SplitPart:
    """Return what the recipe says of a split; raises `RecipeError` with the nearest name."""
    known: dict[str, SplitPart] = {name: getattr(recipe.data, name) for name in SPLITS}
    for update in recipe.updates:
        known |= {f"{update.name}.{n}": getattr(update.data, n) for n in ("train", "select", "test")}
    if split not in known:
        near = get_close_matches(split, known, 1)
        raise RecipeError(
            f"{recipe.path}:{split}",
            f"a split among {', '.join(known)}",
            split,
            f"did you mean {near[0]!r}?" if near else "",
        )
    return known[split]


def _tokenizer(recipe: Recipe) -> Path | None:
    if recipe.data.tokenizer is not None:
        return Path(resolve(recipe, recipe.data.tokenizer))
    if recipe.model.source is None:
        return None
    folder = Path(resolve(recipe, recipe.model.source))
    return folder if folder.is_dir() else None
