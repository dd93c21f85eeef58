"""The verb `factorize`: open, calibrate, choose, decompose, put in place, write.

result = factorize("model.pt", rank=16)                     # ./compressed is not written unless output is given
result = factorize(model, ratio=0.5, calib=data, output="compressed")
"""

from __future__ import annotations

import copy
import importlib.metadata
import resource
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..data import Data
from ..errors import CommandError, LrcompressWarning, PlanError
from ..factorize import Factorization, Refused, Statistics, form, forms
from ..files import staged_folder
from ..model import InputSpec, OpenedModel, check_finite, open_model
from ..model.checkpoint import MAKER, MARKER, layer_spec, module_layers, state_of, write_compressed
from ..model.surgery import Layer, count_parameters, replace_layer
from ..model.ties import for_member, lift_ties, place, share_factors, tied_tensors
from ..plan import Choice
from ..progress import Progress, Silent
from .sources import device_of, layers_of, statistics_of, with_inputs
from .stacked import Stacks, choose_shared, decompose_stack, same_input
from .tied import Ties, choose, planned, weighed


@dataclass(frozen=True)
class FactorizeResult:
    """`model`: the factorized network, None for a bare state dict; `data`: the report; `output`: the folder written."""

    data: dict[str, Any]
    model: nn.Module | None = None
    output: Path | None = None


def factorize(
    model: str | Path | nn.Module | OpenedModel,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    plan: str | Path | None = None,
    method: str | None = None,
    calib: str | Data | None = None,
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
) -> FactorizeResult:
    """Make a pretrained network small: exactly one of `rank`, `ratio`, `energy`, `plan` says how small.

    `method`: a form, or "auto" (the default with data; "svd" without). `include`/`exclude`: patterns on layer names.
    Raises `CommandError`, `ModelError`, `DataError`, `PlanError`, `BudgetError`.
    """
    progress = progress or Silent()
    _check_options(rank, ratio, energy, plan, method)
    device = device_of(compute)
    if threads:
        torch.set_num_threads(threads)
    opened = model if isinstance(model, OpenedModel) else open_model(
        model, arch=arch, arch_args=arch_args, inputs=inputs, trust_pickle=trust_pickle, trust_remote_code=trust_remote_code
    )  # fmt: skip
    check_finite(opened.module.state_dict() if opened.module is not None else opened.tensors or {}, opened.path)
    layers = layers_of(opened, include, exclude, verb="factorize")
    ties = tied_tensors(layers)
    if opened.module is not None:
        layers, ties = lift_ties(opened.module, layers)
    statistics: dict[str, Statistics] = {}
    if calib is not None:
        opened = with_inputs(opened, calib)
        statistics = statistics_of(opened, layers, calib, seed=seed, compute=device, progress=progress, cache=cache)
    method = method or ("auto" if statistics else "svd")
    priced = weighed(layers, ties, statistics)
    stacks: Stacks = {}
    if plan is not None:
        choices = planned(Path(plan), layers, ties)
    elif method == "shared":
        stacks = same_input(layers, statistics)
        how = {"rank": rank, "ratio": ratio, "energy": energy}
        choices = choose_shared(layers, stacks, total=_total(opened), statistics=statistics, **how)
    else:
        choices = choose(
            layers, ties, total=_total(opened), statistics=priced, method=method, rank=rank, ratio=ratio, energy=energy
        )
    made = _apply(opened, layers, choices, ties, stacks, statistics, priced, progress)
    report = _report(opened, made, method, seed)
    if all(row["form"] == "dense" for row in made.rows):
        note = "no layer was factorized: every one would not shrink or was left out"
        warnings.warn(note, LrcompressWarning, stacklevel=2)
    if output is None:
        return FactorizeResult(report, made.module)
    dest = Path(output)
    _write(dest, opened, made, report)
    return FactorizeResult({**report, "bytes_after": _bytes(dest), "output": str(dest)}, made.module, dest)


@dataclass(frozen=True)
class _Made:
    """What decomposing gave: the module, or the tensors of a bare state dict; layer specs and report rows."""

    module: nn.Module | None
    tensors: dict[str, Tensor]
    specs: dict[str, Any]
    rows: list[dict[str, Any]]


def _report(opened: OpenedModel, made: _Made, method: str, seed: int) -> dict[str, Any]:
    return {
        "method": method,
        "seed": seed,
        "layers": made.rows,
        "params_before": _total(opened),
        "params_after": count_parameters(made.module) if made.module is not None else _count(made.tensors),
        "bytes_before": _bytes(opened.path),
        "bytes_after": None,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "output": None,
    }


def _write(dest: Path, opened: OpenedModel, made: _Made, report: dict[str, Any]) -> None:
    """Write the compressed checkpoint: complete, or not at all."""
    packages = {p: importlib.metadata.version(p) for p in ("torch", "tensorly", "numpy")}
    about = {
        "report": {k: report[k] for k in ("method", "seed", "layers", "params_before", "params_after")},
        "threads": torch.get_num_threads(),
        "versions": {"lrcompress": __version__, **packages},
    }
    with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
        whole = {k: t.contiguous().clone() for k, t in made.tensors.items()}
        stored = whole if made.module is None else state_of(made.module)
        write_compressed(stage, dest, opened, tensors=stored, layers=made.specs, report=about)


def _check_options(
    rank: int | None, ratio: float | None, energy: float | None, plan: object, method: str | None
) -> None:
    where = "lrcompress factorize"
    given = [
        n for n, v in (("--rank", rank), ("--ratio", ratio), ("--energy", energy), ("--plan", plan)) if v is not None
    ]
    if len(given) != 1:
        raise CommandError(
            where,
            "exactly one of --rank, --ratio, --energy, --plan",
            " and ".join(given) or "none",
            "for example --rank 16",
        )
    if rank is not None and rank < 1:
        raise CommandError(f"{where} --rank", "a whole number of at least 1", rank, "for example --rank 16")
    for name, share in (("--ratio", ratio), ("--energy", energy)):
        if share is not None and not 0 < share <= 1:
            raise CommandError(f"{where} {name}", "a number above 0 and at most 1", share)
    if method is not None and method != "auto":
        try:
            form(method)
        except KeyError as e:
            raise CommandError(
                f"{where} --method", f"auto or one of {', '.join(forms())}", method, e.args[0].partition("; ")[2]
            ) from e


def _apply(
    opened: OpenedModel, layers: Sequence[Layer], choices: Sequence[Choice], ties: Ties, stacks: Stacks,
    statistics: Mapping[str, Statistics], priced: Mapping[str, Statistics], progress: Progress,
) -> _Made:  # fmt: skip
    """Decompose every chosen layer and put it in its place."""
    module = None if opened.module is None else _copied(opened.module)
    tensors = dict(opened.tensors or {})
    leaders = {f: leader for leader, followers in ties.items() for f in followers}
    by_name = {layer.name: layer for layer in layers}
    made: dict[str, Factorization] = {}
    parts: dict[str, Factorization] = {}
    specs: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with progress.task("factorize", total=len(layers)) as advance:
        for layer, choice in zip(layers, choices, strict=True):
            found = None
            if choice.form != "dense":
                first = leaders.get(layer.name, layer.name)
                found = made.get(first) or parts.get(layer.name)
                if layer.name in stacks and isinstance(choice.rank, int):
                    parts |= decompose_stack(layer.name, stacks, by_name, choice.rank, statistics)
                    found = parts[layer.name]
                if found is None:
                    found = _decomposed(choice, by_name[first], priced.get(first))
                if first in ties:
                    made[first] = found
                    found = for_member(found, layer, statistics.get(layer.name))
                if module is not None:
                    replace_layer(module, layer.name, found)
                else:
                    specs[layer.name] = _replace_tensor(tensors, layer, found, leaders.get(layer.name))
            rows.append(_row(layer, choice, found, tied=layer.name in leaders))
            advance(1, layer.name)
    if module is not None:
        for leader in made:
            share_factors(module, leader, ties[leader])
        for first, others in stacks.items():
            if first in parts:
                share_factors(module, first, others, ["V"])
        specs = module_layers(module)
    return _Made(module, tensors, specs, rows)


def _decomposed(choice: Choice, layer: Layer, statistics: Statistics | None) -> Factorization:
    try:
        return form(choice.form).decompose(layer.weight, choice.rank, statistics)  # type: ignore[no-any-return]
    except Refused as e:
        raise PlanError(f"{layer.name}: {choice.form}", e.expected, e.got, e.remedy) from e


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module; a weight that a hook computes is copied as the number it is now."""
    computed = [t for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in computed})


def _replace_tensor(
    tensors: dict[str, Tensor], layer: Layer, found: Factorization, leader: str | None
) -> dict[str, Any]:
    """Put factors in the place of a tensor; a tied one goes, and its spec says whose factors are its own."""
    key = f"{layer.name}.weight" if f"{layer.name}.weight" in tensors else layer.name
    prefix = key.removesuffix("weight")
    del tensors[key]
    if leader is None:
        for name, factor in found.named_factors():
            tensors[f"{prefix}{name}"] = factor
    shapes = {k: tuple(v.shape) for k, v in found.factors.items()}
    spec = layer_spec(layer.kind, found.form, found.shape, found.rank, shapes, bias=f"{prefix}bias" in tensors)
    return spec if leader is None else {**spec, "tied": leader}


def _row(layer: Layer, choice: Choice, found: Factorization | None, *, tied: bool) -> dict[str, Any]:
    """Return the report of one layer; the numbers of a tied weight stand with its first layer."""
    rank: Any = 0 if found is None else found.rank
    return {
        "name": layer.name,
        "form": choice.form,
        "shape": list(layer.plain_shape),
        "rank": list(rank) if isinstance(rank, tuple) else rank,
        "params_before": 0 if tied else layer.weight.numel(),
        "params_after": choice.n_params,
        "rel_error": 0.0 if found is None else found.rel_error,
        "norm": "frobenius" if found is None else found.norm,
        "rel_error_frobenius": 0.0 if found is None else found.rel_error_frobenius,
        "reason": choice.reason,
    }


def _total(opened: OpenedModel) -> int:
    if opened.module is not None:
        return count_parameters(opened.module)
    return _count(opened.tensors or {})


def _count(tensors: Mapping[str, Tensor]) -> int:
    """Return how many numbers named tensors hold, tied ones once."""
    return sum(t.numel() for t in {place(t): t for t in tensors.values()}.values())


def _bytes(path: Path | None) -> int | None:
    if path is None:
        return None
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


__all__ = ["FactorizeResult", "factorize"]
