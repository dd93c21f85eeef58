"""Run a recipe: stages over a run directory, each built once and found again by digest.

    report = run("quickstart")              # ./runs/quickstart
    report = run("quickstart")              # nothing to do: every stage is there

A run that is killed at any moment continues with the stage it was in and ends with the same hashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..progress import Progress, Silent
from ..recipe import Recipe, load
from ..report import build_report
from . import fleet, measure, steps
from .baselines import baselines
from .store import MAKER, MARKER, Stage, Store, locked, versions

#: Stages whose files must be the same bytes whenever the recipe runs again on one machine.
HASHED = ("base", "factorize", "retrain", "recover", "export", "baselines", "update-")

__all__ = ["run"]


def run(
    recipe: str | Path | Recipe, run_dir: str | Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Run `recipe` in `run_dir` (default: runs/NAME) and return its report with `run_dir` and `nothing_to_do`.

    Raises `RecipeError`, `CommandError`, or what a stage raises; the stages that were finished stay.
    """
    found = load(recipe)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / found.name
    with locked(folder), _threads(found.threads):
        return _run(found, folder.resolve(), progress or Silent())


def _run(recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    part = recipe.recover
    total = 5 + len(recipe.updates) + (recipe.model.train is not None) + part.rebases + part.corrects
    store = Store(folder, progress, total)
    context = steps.Context(recipe, store, progress)
    _record(recipe, store, complete=False)
    if recipe.model.train is not None:
        context.base = steps.base(context)
    compressed = steps.retrain(context, steps.factorize(context))
    recovered = steps.recover(context, compressed)
    exported = steps.export(context, compressed, recovered)
    compared = baselines(context, compressed, recovered, exported)
    measure.validate(context, compressed, exported, compared)
    updates = [steps.update(context, i, compressed) for i in range(len(recipe.updates))]
    fleet.fleet(context, recovered, exported, compared, updates)
    nothing = all(s.reused for s in store.done)
    _record(recipe, store, complete=True)
    report = folder / "report.json"
    if not (nothing and report.is_file() and (folder / "report.html").is_file()):
        with progress.task("report", total=1) as advance:
            build_report(folder)
            advance(1)
    return {**json.loads(report.read_text()), "run_dir": str(folder), "nothing_to_do": nothing}


def _record(recipe: Recipe, store: Store, *, complete: bool) -> None:
    """Write `run.json`, unless it says the same already; an unfinished run keeps the list of a finished one."""
    path = store.folder / MARKER
    known = json.loads(path.read_text()) if path.is_file() else {}
    value = {
        "schema": 1,
        "made_by": MAKER,
        "name": recipe.name,
        "recipe": recipe.as_dict(),
        "recipe_file": str(recipe.path),
        "seed": recipe.seed,
        "threads": recipe.threads,
        "versions": versions(),
        "complete": complete,
        "stages": [_entry(s, store.folder) for s in store.done],
    }
    if not complete and all(known.get(k) == value[k] for k in ("recipe", "versions", "made_by")):
        return
    if known != value:
        write_json(path, value)


def _entry(stage: Stage, folder: Path) -> dict[str, Any]:
    hashed = stage.name.startswith(HASHED)
    return {
        "name": stage.name,
        "key": stage.key,
        "folder": stage.folder.relative_to(folder).as_posix(),
        "digest": stage.digest if hashed else None,
        "seconds": stage.seconds,
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with the recipe's thread count: another one may give other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
