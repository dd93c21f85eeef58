"""The verb `factorize`: open, calibrate, choose, decompose, put in place, write.

result = factorize("model.pt", rank=16)                     # ./compressed is not written unless output is given
result = factorize(model, ratio=0.5, calib=data, output="compressed")
"""

from __future__ import annotations

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
from ..errors import CommandError, LrcompressWarning
from ..factorize import form, forms
from ..files import check_output, staged_folder
from ..graphs import is_onnx
from ..model import InputSpec, OpenedModel, check_finite, open_model
from ..model.checkpoint import MAKER, MARKER, state_of, write_compressed
from ..model.stored import described
from ..model.surgery import count_parameters
from ..plan import Choice, read_bits, read_blocks
from ..progress import Progress, Silent
from ..work import Pool, pool
from .applying import Spread, apply_choices
from .asking import check_sizes
from .factorize_graph import factorize_graph
from .planning import Prepared, budget_of, plan_within, prepare, spread_over
from .sources import device_of, no_network
from .stacked import Stacks, choose_shared, same_input
from .streamed import Asked, count, factorize_stored, kept
from .tied import choose, planned


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
    multiple: int | None = None,
    calib: str | Data | None = None,
    select: Data | None = None,
    quick: bool = False,
    anchor: bool = True,
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
    cheaper. `multiple`: of which ranks are multiples. `calib`: inputs to weigh errors by; with them layers are fitted in
    the order of depth (`anchor`), and a ratio is planned by measurements on `select`, or on `calib` (not with `quick`).
    `include`/`exclude`: patterns on layer names. `workers`, `cluster`: so many processes, or the address of a Dask
    scheduler, that the layers are spread over. A killed run continues where the same is asked again.
    Raises `CommandError`, `ModelError`, `DataError`, `PlanError`, `BudgetError`.
    """
    progress = progress or Silent()
    if isinstance(model, str | Path) and is_onnx(Path(model)):
        data, output = factorize_graph(
            model, rank=rank, ratio=ratio, energy=energy, plan=plan, method=method, svd=svd,
            multiple=multiple, calib=calib, quick=quick, anchor=anchor, include=include, exclude=exclude, arch=arch, arch_args=arch_args, inputs=inputs,
            output=output, seed=seed, threads=threads, compute=compute, workers=workers, cluster=cluster, progress=progress,
        )  # fmt: skip
        return FactorizeResult(data, None, output)
    _check_options(rank, ratio, energy, plan, method, svd)
    multiple = 1 if multiple is None else multiple
    if multiple < 1:
        raise CommandError("lrcompress factorize --rank-multiple", "a whole number of at least 1", multiple)
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
    prepared = prepare(
        opened,
        include=include,
        exclude=exclude,
        calib=calib,
        seed=seed,
        compute=device,
        cache=cache,
        progress=progress,
        fold=anchor,
    )
    method = method or ("auto" if prepared.statistics else "svd")
    sizes = {"rank": rank, "ratio": ratio, "energy": energy}
    choices, stacks = _chosen(
        prepared, sizes, plan, method, multiple=multiple, quick=quick, select=select, progress=progress
    )
    dest = None if output is None else Path(output)
    # What decides a result is in its key; this only tells commands apart.
    named = [method, *map(str, (rank, ratio, energy, plan, multiple, anchor, quick)), list(include), list(exclude), svd]
    command = ["factorize", opened.digest, named, None if isinstance(calib, Data) else str(calib)]
    opened = prepared.opened
    with pool(workers, cluster) as where, kept(dest, command) as store:
        made = apply_choices(prepared, choices, stacks, progress, Spread(where, store, svd), anchor=anchor)
        report = _report(opened, made.rows, method, seed, prepared.total, count_parameters(made.module))
        if dest is None or store is None:
            return FactorizeResult(report, made.module)
        _write(dest, opened, state_of(made.module), made.specs, report, prepared.folded, plan=plan)
        store.remove()
    return FactorizeResult({**report, "bytes_after": _bytes(dest), "output": str(dest)}, made.module, dest)


def _chosen(
    prepared: Prepared, sizes: Mapping[str, Any], plan: str | Path | None, method: str, *, multiple: int, quick: bool,
    select: Data | None, progress: Progress,
) -> tuple[list[Choice], Stacks]:  # fmt: skip
    """Return one choice per layer, and the stacks of layers that share a basis."""
    layers, ties = prepared.layers, prepared.ties
    if plan is not None:
        return planned(Path(plan), layers, ties, prepared.opened.digest), {}
    if method == "shared":
        stacks = same_input(layers, prepared.statistics)
        total = prepared.total
        return choose_shared(layers, stacks, total=total, statistics=prepared.statistics, **sizes), stacks
    if sizes["ratio"] is None:
        return choose(layers, ties, total=prepared.total, statistics=prepared.priced, method=method, **sizes), {}
    budget = budget_of(prepared, ratio=sizes["ratio"])
    found = plan_within(
        prepared, budget, method=method, multiple=multiple, measure=not quick, select=select, progress=progress
    )
    return spread_over(prepared, found.choices), {}


def _of_tensors(
    opened: OpenedModel, asked: Asked, where: Pool, seed: int, dest: Path | None, progress: Progress
) -> FactorizeResult:
    """Factorize a bare state dict, tensor by tensor."""
    with factorize_stored(opened, asked, pool=where, output=dest, progress=progress) as made:
        report = _report(opened, made.rows, asked.method, seed, _total(opened), made.n_params)
        if dest is None or made.tensors is None:
            return FactorizeResult(report)
        _write(dest, opened, made.tensors, made.specs, report, plan=asked.plan)
    return FactorizeResult({**report, "bytes_after": _bytes(dest), "output": str(dest)}, None, dest)


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
    dest: Path, opened: OpenedModel, tensors: Mapping[str, Tensor], specs: Mapping[str, Any], report: dict[str, Any],
    folded: Mapping[str, str] | None = None, plan: str | Path | None = None,
) -> None:  # fmt: skip
    """Write the compressed checkpoint: complete, or not at all. `plan`: whose bits an export is to give single layers."""
    packages = {p: importlib.metadata.version(p) for p in ("torch", "tensorly", "numpy")}
    about = {
        "report": {k: report[k] for k in ("method", "seed", "layers", "params_before", "params_after")},
        "threads": torch.get_num_threads(),
        "versions": {"lrcompress": __version__, **packages},
        **_bits(plan),
    }
    with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
        write_compressed(stage, dest, opened, tensors=tensors, layers=specs, report=about, folded=folded)


def _bits(plan: str | Path | None) -> dict[str, dict[str, int]]:
    """Return the bits that a plan gives its layers, and how many inputs share a scale; nothing without a plan."""
    if plan is None:
        return {}
    found = {"bits": read_bits(Path(plan)), "blocks": read_blocks(Path(plan)) or None}
    return {k: v for k, v in found.items() if v is not None}


def _check_options(
    rank: int | None, ratio: float | None, energy: float | None, plan: object, method: str | None, svd: str
) -> None:
    check_sizes(rank, ratio, energy, plan)
    where = "lrcompress factorize"
    if svd not in ("auto", "full", "randomized"):
        raise CommandError(f"{where} --svd", "auto, full or randomized", svd)
    if method is not None and method != "auto":
        try:
            form(method)
        except KeyError as e:
            raise CommandError(
                f"{where} --method", f"auto or one of {', '.join(forms())}", method, e.args[0].partition("; ")[2]
            ) from e


def _total(opened: OpenedModel) -> int:
    if opened.module is not None:
        return count_parameters(opened.module)
    return count(described(opened.tensors or {}))


def _bytes(path: Path | None) -> int | None:
    if path is None:
        return None
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


__all__ = ["FactorizeResult", "factorize"]
