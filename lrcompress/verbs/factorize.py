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
from ..files import check_output, staged_folder
from ..model import InputSpec, OpenedModel, check_finite, open_model
from ..model.checkpoint import MAKER, MARKER, module_layers, state_of, write_compressed
from ..model.stored import described
from ..model.surgery import Layer, count_parameters, replace_layer
from ..model.ties import for_member, lift_ties, share_factors
from ..plan import Choice
from ..progress import Progress, Silent
from ..work import Job, Pool, Store, pool, run
from .sources import device_of, layers_of, no_network, statistics_of, with_inputs
from .stacked import Stacks, choose_shared, decompose_stack, same_input
from .streamed import Asked, count, factorize_stored, kept, row, svd_options
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
    svd: str = "auto",
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
    workers: int | None = None,
    cluster: str | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FactorizeResult:
    """Make a pretrained network small: exactly one of `rank`, `ratio`, `energy`, `plan` says how small.

    `method`: a form, or "auto" (the default with data; "svd" without). `svd`: "full", "randomized", or "auto" for the
    cheaper. `include`/`exclude`: patterns on layer names. `workers`, `cluster`: so many processes, or the address of a
    Dask scheduler, that the layers are spread over. A killed run continues where the same is asked again. Raises `CommandError`, `ModelError`, `DataError`, `PlanError`, `BudgetError`.
    """
    progress = progress or Silent()
    _check_options(rank, ratio, energy, plan, method, svd)
    device = device_of(compute)
    if threads:
        torch.set_num_threads(threads)
    opened = model if isinstance(model, OpenedModel) else open_model(
        model, arch=arch, arch_args=arch_args, inputs=inputs, trust_pickle=trust_pickle, trust_remote_code=trust_remote_code
    )  # fmt: skip
    if output is not None:  # hours of work must not end in a refusal
        check_output(Path(output), maker=MAKER, marker=MARKER)
    if opened.module is None:
        if calib is not None:
            raise no_network(opened)
        asked = Asked(
            rank, ratio, energy, Path(plan) if plan is not None else None, method or "svd", tuple(include), tuple(exclude), svd
        )  # fmt: skip
        with pool(workers, cluster) as where:
            return _of_tensors(opened, asked, where, seed, None if output is None else Path(output), progress)
    check_finite(opened.module.state_dict(), opened.path)
    layers, ties = lift_ties(opened.module, layers_of(opened, include, exclude, verb="factorize"))
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
    dest = None if output is None else Path(output)
    # What decides the results is in their keys; the name of the store only tells commands apart.
    command = ["factorize", opened.digest, method, *map(str, (rank, ratio, energy, plan)), list(include), list(exclude)]
    with pool(workers, cluster) as where, kept(dest, command) as store:
        made = _apply(opened, layers, choices, ties, stacks, statistics, priced, progress, where, store, svd)
        report = _report(opened, made.rows, method, seed, _total(opened), count_parameters(made.module))
        if dest is None or store is None:
            return FactorizeResult(report, made.module)
        _write(dest, opened, state_of(made.module), made.specs, report)
        store.remove()
    return FactorizeResult({**report, "bytes_after": _bytes(dest), "output": str(dest)}, made.module, dest)


def _of_tensors(
    opened: OpenedModel, asked: Asked, where: Pool, seed: int, dest: Path | None, progress: Progress
) -> FactorizeResult:
    """Factorize a bare state dict, tensor by tensor."""
    with factorize_stored(opened, asked, pool=where, output=dest, progress=progress) as made:
        report = _report(opened, made.rows, asked.method, seed, _total(opened), made.n_params)
        if dest is None or made.tensors is None:
            return FactorizeResult(report)
        _write(dest, opened, made.tensors, made.specs, report)
    return FactorizeResult({**report, "bytes_after": _bytes(dest), "output": str(dest)}, None, dest)


@dataclass(frozen=True)
class _Made:
    """What decomposing gave: the module, layer specs and report rows."""

    module: nn.Module
    specs: dict[str, Any]
    rows: list[dict[str, Any]]


def _report(
    opened: OpenedModel, rows: list[dict[str, Any]], method: str, seed: int, before: int, after: int
) -> dict[str, Any]:
    if all(row["form"] == "dense" for row in rows):
        note = "no layer was factorized: every one would not shrink or was left out"
        warnings.warn(note, LrcompressWarning, stacklevel=3)
    return {
        "method": method,
        "seed": seed,
        "layers": rows,
        "params_before": before,
        "params_after": after,
        "bytes_before": _bytes(opened.path),
        "bytes_after": None,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "output": None,
    }


def _write(
    dest: Path, opened: OpenedModel, tensors: Mapping[str, Tensor], specs: Mapping[str, Any], report: dict[str, Any]
) -> None:
    """Write the compressed checkpoint: complete, or not at all."""
    packages = {p: importlib.metadata.version(p) for p in ("torch", "tensorly", "numpy")}
    about = {
        "report": {k: report[k] for k in ("method", "seed", "layers", "params_before", "params_after")},
        "threads": torch.get_num_threads(),
        "versions": {"lrcompress": __version__, **packages},
    }
    with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
        write_compressed(stage, dest, opened, tensors=tensors, layers=specs, report=about)


def _check_options(
    rank: int | None, ratio: float | None, energy: float | None, plan: object, method: str | None, svd: str
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
    if svd not in ("auto", "full", "randomized"):
        raise CommandError(f"{where} --svd", "auto, full or randomized", svd)
    if method is not None and method != "auto":
        try:
            form(method)
        except KeyError as e:
            raise CommandError(
                f"{where} --method", f"auto or one of {', '.join(forms())}", method, e.args[0].partition("; ")[2]
            ) from e


def _apply(
    opened: OpenedModel, layers: Sequence[Layer], choices: Sequence[Choice], ties: Ties, stacks: Stacks,
    statistics: Mapping[str, Statistics], priced: Mapping[str, Statistics], progress: Progress, where: Pool,
    store: Store | None, svd: str,
) -> _Made:  # fmt: skip
    """Decompose every chosen layer and put it in its place."""
    assert opened.module is not None
    module = _copied(opened.module)
    leaders = {f: leader for leader, followers in ties.items() for f in followers}
    by_name = {layer.name: layer for layer in layers}
    made: dict[str, Factorization] = {}
    parts: dict[str, Factorization] = {}
    rows: list[dict[str, Any]] = []
    stacked = {n for first, others in stacks.items() for n in (first, *others)}
    alone = {
        n.name: Job(n.weight, c.form, priced.get(n.name), rank=c.rank, options=svd_options(c.form, svd))
        for n, c in zip(layers, choices, strict=True)
        if c.form != "dense" and n.name not in leaders and n.name not in stacked
    }
    done = zip(alone, run(list(alone.values()), store=store, pool=where, threads=torch.get_num_threads()), strict=True)
    results: dict[str, Factorization] = {}

    def result(name: str) -> Factorization:
        while name not in results:
            following, (_, found) = next(done)
            results[following] = found
        return results.pop(name)

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
                replace_layer(module, layer.name, found)
            rows.append(row(layer, choice, found, tied=layer.name in leaders))
            advance(1, layer.name)
    for leader in made:
        share_factors(module, leader, ties[leader])
    for first, others in stacks.items():
        if first in parts:
            share_factors(module, first, others, ["V"])
    return _Made(module, module_layers(module), rows)


def _decomposed(choice: Choice, layer: Layer, statistics: Statistics | None) -> Factorization:
    try:
        return form(choice.form).decompose(layer.weight, choice.rank, statistics)  # type: ignore[no-any-return]
    except Refused as e:
        raise PlanError(f"{layer.name}: {choice.form}", e.expected, e.got, e.remedy) from e


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module; a weight that a hook computes is copied as the number it is now."""
    computed = [t for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in computed})


def _total(opened: OpenedModel) -> int:
    if opened.module is not None:
        return count_parameters(opened.module)
    return count(described(opened.tensors or {}))


def _bytes(path: Path | None) -> int | None:
    if path is None:
        return None
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


__all__ = ["FactorizeResult", "factorize"]
