"""The verb `inspect`: what a network's spectra say before anything is factorized, and what the forms can represent.

found = inspect("model.safetensors", arch="nets.py:resnet20", calib="images.npz", output="inspected")
inspect(theory="hadamard").data["holds"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Data
from ..errors import CommandError
from ..factorize import Statistics
from ..files import check_output, staged_folder, write_json
from ..inspect import ENERGIES, Found, Terms, look
from ..inspect import theory as theories
from ..inspect.plots import draw
from ..model import InputSpec, OpenedModel, open_model
from ..model.surgery import Layer
from ..model.ties import lift_ties, tied_tensors
from ..progress import Progress, Silent
from .asking import left_out
from .sources import device_of, layers_of, statistics_of
from .tied import weighed

MAKER = "lrcompress inspect"
MARKER = "inspect.json"

#: The words of the report, as definitions with their sources.
DEFINITIONS = {
    "stable_rank": "sum of the squared singular values over the largest one (Rudelson & Vershynin 2007)",
    "effective_rank": "exp of the entropy of the squared singular values over their sum (entropy: Alter, Brown & Botstein 2000; "
    "the exponential of the unsquared ones: Roy & Vetterli 2007)",
    "energies": "the least rank whose squared singular values make up that share, and the numbers that an SVD of it stores",
    "rel_error": "root of the share of the energy that is lost, in the layer's norm",
    "norm": "frobenius: the weight itself; activation: outputs on the data; two_sided: outputs by how much the answer feels them",
    "loss_over_svd": "squared error of the best form over that of the SVD with the same numbers",
    "macs_ratio": "multiply-adds over those of the dense layer (none for an embedding: it looks rows up)",
}  # fmt: skip


@dataclass(frozen=True)
class InspectResult:
    """`data`: the report; `output`: the folder written."""

    data: dict[str, Any]
    output: Path | None = None


def inspect(
    model: str | Path | nn.Module | OpenedModel | None = None,
    *,
    theory: str | None = None,
    calib: str | Data | None = None,
    share: float = 0.5,
    max_loss: float = 0.25,
    all_forms: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    inputs: Sequence[InputSpec] = (),
    output: str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    compute: str = "auto",
    cache: bool = True,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> InspectResult:
    """Measure every layer of `model`, or check the statements on what a form (or "all") can represent.

    Forms are compared at `share` of each layer's numbers; a layer that loses more than `max_loss` of its energy there
    is called not worth it. `output`: a folder for the plots. Raises `CommandError`, `ModelError`, `DataError`.
    """
    progress = progress or Silent()
    if threads:
        torch.set_num_threads(threads)
    _check_options(model, theory, calib, output, share=share, max_loss=max_loss)
    if theory is not None:
        return InspectResult(_theory(theory, seed, progress))
    assert model is not None
    device = device_of(compute)
    if output is not None:  # before minutes of work
        check_output(Path(output), maker=MAKER, marker=MARKER)
    opened = model if isinstance(model, OpenedModel) else open_model(
        model, arch=arch, arch_args=arch_args, inputs=inputs, trust_pickle=trust_pickle, trust_remote_code=trust_remote_code
    )  # fmt: skip
    every = layers_of(opened, include, exclude, verb="inspect")
    ties = tied_tensors(every)
    if opened.module is not None:
        every, ties = lift_ties(opened.module, every)
    layers = [layer for layer in every if left_out(layer.name, include, exclude) is None]
    statistics: dict[str, Statistics] = {}
    if calib is not None:
        statistics = statistics_of(opened, layers, calib, seed=seed, compute=device, progress=progress, cache=cache)
        statistics = weighed(layers, ties, statistics)
    leaders = {follower: leader for leader, followers in ties.items() for follower in followers}
    found = _look_at(layers, leaders, statistics, Terms(share, max_loss, all_forms), progress)
    data = {
        "model": str(opened.path) if opened.path is not None else None, "share": share, "max_loss": max_loss, "seed": seed,
        "layers": [f.facts() for f in found], "summary": _summary(found, shared=set(leaders), left_out=len(every) - len(layers)),
        "definitions": DEFINITIONS, "output": None if output is None else str(output),
    }  # fmt: skip
    if output is not None:
        _write(Path(output), data, found)
    return InspectResult(data, None if output is None else Path(output))


def _look_at(
    layers: Sequence[Layer],
    leaders: Mapping[str, str],
    statistics: Mapping[str, Statistics],
    terms: Terms,
    progress: Progress,
) -> list[Found]:
    """Look at every layer; one that is tied to another is looked at there."""
    found = []
    with progress.task("inspect", total=len(layers)) as advance:
        for layer in layers:
            leader = leaders.get(layer.name)
            own = layer if leader is None else replace(layer, reason=f"shares the factors of {leader}")
            found.append(look(own, statistics.get(layer.name), terms))
            advance(1, layer.name)
    return found


def _check_options(model: object, theory: object, calib: object, output: object, **shares: float) -> None:
    where = "lrcompress inspect"
    if (model is None) == (theory is None):
        got = "neither" if model is None else "both"
        raise CommandError(where, "a model, or --theory FORM", got, f"for example: {where} model.safetensors")
    if theory is not None and (calib is not None or output is not None):
        raise CommandError(f"{where} --theory", "no other option", "--calib" if calib is not None else "-o")
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise CommandError(f"{where} --{name.replace('_', '-')}", "a number above 0 and at most 1", value)


def _summary(found: Sequence[Found], *, shared: set[str], left_out: int) -> dict[str, Any]:
    """Count what is worth it, tied numbers once; `params_after`: every such layer in its best form at the common share."""
    worth = [f for f in found if f.why is None and f.best is not None]
    wins: dict[str, int] = {}
    for f in worth:
        assert f.best is not None
        wins[f.best.form] = wins.get(f.best.form, 0) + 1
    before = sum(f.layer.weight.numel() for f in found if f.layer.name not in shared)
    saved = sum(f.layer.weight.numel() - f.best.n_params for f in worth if f.best is not None)
    return {
        "layers": len(found),
        "left_out_by_patterns": left_out,
        "worth": len(worth),
        "wins": dict(sorted(wins.items(), key=lambda item: (-item[1], item[0]))),
        "params_before": before,
        "params_after": before - saved,
        "not_compared": sorted({n.form for f in found for n in f.left_out}),
    }


def _write(dest: Path, data: Mapping[str, Any], found: Sequence[Found]) -> None:
    """Write the facts, all singular values and the plots; the folder is complete or absent."""
    with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
        for name, content in draw(found, share=data["share"]).items():
            (stage / name).write_bytes(content)
        spectra = {
            f.layer.name: {k: s.relative for k, s in (("plain", f.plain), ("weighted", f.weighted)) if s is not None}
            for f in found
        }
        write_json(
            stage / MARKER,
            {"made_by": MAKER, "schema": 1, **data, "energies": list(ENERGIES), "relative_singular_values": spectra},
        )


def _theory(name: str, seed: int, progress: Progress) -> dict[str, Any]:
    try:
        pages = theories.pages(name)
    except KeyError as e:
        raise CommandError(
            "lrcompress inspect --theory",
            f"all or one of {', '.join(theories.names())}",
            name,
            e.args[0].partition("; ")[2],
        ) from e
    forms = []
    with progress.task("check", total=sum(len(p.statements) for p in pages)) as advance:
        for page in pages:
            checked = []
            for statement in page.statements:
                checked.append(statement.check(seed).facts())
                advance(1, page.name)
            forms.append(
                {
                    "form": page.name,
                    "formula": page.formula,
                    "statements": checked,
                    "holds": all(s["holds"] for s in checked),
                }
            )
    return {"theory": name, "seed": seed, "forms": forms, "holds": all(f["holds"] for f in forms)}


__all__ = ["InspectResult", "inspect"]
