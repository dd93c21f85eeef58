"""The verb `factorize`: open, calibrate, choose, decompose, put in place, write.

result = factorize("model.pt", rank=16)                     # ./compressed is not written unless output is given
result = factorize(model, ratio=0.5, calib=data, output="compressed")
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
import resource
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..calibrate import collect
from ..data import Data
from ..errors import CommandError, LrcompressWarning, ModelError
from ..factorize import Factorization, Statistics, form, forms
from ..files import staged_folder
from ..model import InputSpec, OpenedModel, check_finite, open_model
from ..model.checkpoint import MAKER, MARKER, layer_spec, module_layers, state_of, write_compressed
from ..model.surgery import Layer, count_parameters, find_layers, replace_layer, tensors_as_layers
from ..plan import Choice, read_plan, select
from ..progress import Progress, Silent
from .sources import for_model, inputs_told_by


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
    device = _device(compute)
    if threads:
        torch.set_num_threads(threads)
    opened = model if isinstance(model, OpenedModel) else open_model(
        model, arch=arch, arch_args=arch_args, inputs=inputs, trust_pickle=trust_pickle, trust_remote_code=trust_remote_code
    )  # fmt: skip
    check_finite(opened.module.state_dict() if opened.module is not None else opened.tensors or {}, opened.path)
    layers = _selected(opened, include, exclude)
    statistics: dict[str, Statistics] = {}
    if calib is not None:
        network = opened.module
        if network is None:
            raise ModelError(
                opened.path, "a network to run the calibration data through", "a state dict", "give --arch"
            )
        data = for_model(calib, opened)
        if not opened.inputs and len(data):
            # What the data told is kept: export needs it. Read again, so that arrays take the names of the inputs.
            opened = replace(opened, inputs=inputs_told_by(data, opened))
            data = for_model(calib, opened)
        wanted = [layer for layer in layers if layer.reason is None]
        statistics = collect(opened, network, data, wanted, seed=seed, compute=device, progress=progress)
        _warn_few_samples(layers, statistics)
    method = method or ("auto" if statistics else "svd")
    if plan is not None:
        choices = read_plan(Path(plan), layers)
    else:
        fixed = _total(opened) - sum(layer.weight.numel() for layer in layers)
        choices = select(
            layers, method=method, statistics=statistics, rank=rank, ratio=ratio, energy=energy, fixed_params=fixed
        )
    module, tensors, specs, rows = _apply(opened, layers, choices, statistics, progress)
    before = _total(opened)
    after = count_parameters(module) if module is not None else sum(t.numel() for t in tensors.values())
    data_out: dict[str, Any] = {
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
    if all(row["form"] == "dense" for row in rows):
        warnings.warn(
            "no layer was factorized: every one would not shrink or was left out", LrcompressWarning, stacklevel=2
        )
    if output is None:
        return FactorizeResult(data_out, module)
    dest = Path(output)
    with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
        report = {
            "report": {k: data_out[k] for k in ("method", "seed", "layers", "params_before", "params_after")},
            "threads": torch.get_num_threads(),
            "versions": {
                "lrcompress": __version__,
                **{p: importlib.metadata.version(p) for p in ("torch", "tensorly", "numpy")},
            },
        }
        stored = tensors if module is None else state_of(module)
        write_compressed(stage, dest, opened, tensors=stored, layers=specs, report=report)
    data_out["bytes_after"] = _bytes(dest)
    data_out["output"] = str(dest)
    return FactorizeResult(data_out, module, dest)


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


def _selected(opened: OpenedModel, include: Sequence[str], exclude: Sequence[str]) -> list[Layer]:
    """Return the layers of the model; those that the patterns leave out carry that as their reason."""
    layers = find_layers(opened.module) if opened.module is not None else tensors_as_layers(opened.tensors or {})
    if not layers:
        raise ModelError(opened.path or "the model", "at least one linear, convolution or embedding layer", "none")
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                near = ", ".join(layer.name for layer in layers[:4])
                raise CommandError(
                    f"lrcompress factorize {option}", "a pattern that matches a layer", pattern, f"layers are {near}, …"
                )
    out = []
    for layer in layers:
        reason = layer.reason
        if include and not any(fnmatchcase(layer.name, p) for p in include):
            reason = "not in --include"
        elif any(fnmatchcase(layer.name, p) for p in exclude):
            reason = "in --exclude"
        out.append(replace(layer, reason=reason))
    return out


def _apply(
    opened: OpenedModel,
    layers: Sequence[Layer],
    choices: Sequence[Choice],
    statistics: Mapping[str, Statistics],
    progress: Progress,
) -> tuple[nn.Module | None, dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Decompose every chosen layer; return the module, the tensors (state dict only), the specs and the report rows."""
    module = copy.deepcopy(opened.module)
    tensors = dict(opened.tensors or {})
    specs: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with progress.task("factorize", total=len(layers)) as advance:
        for layer, choice in zip(layers, choices, strict=True):
            found = None
            if choice.form != "dense":
                found = form(choice.form).decompose(layer.weight, choice.rank, statistics.get(layer.name))
                if module is not None:
                    replace_layer(module, layer.name, found)
                else:
                    specs[layer.name] = _replace_tensor(tensors, layer, found)
            rows.append(_row(layer, choice, found))
            advance(1, layer.name)
    if module is not None:
        specs = module_layers(module)
    return module, tensors, specs, rows


def _replace_tensor(tensors: dict[str, Tensor], layer: Layer, found: Factorization) -> dict[str, Any]:
    key = f"{layer.name}.weight" if f"{layer.name}.weight" in tensors else layer.name
    prefix = key.removesuffix("weight")
    del tensors[key]
    for name, factor in found.named_factors():
        tensors[f"{prefix}{name}"] = factor
    shapes = {k: tuple(v.shape) for k, v in found.factors.items()}
    return layer_spec(layer.kind, found.form, found.shape, found.rank, shapes, bias=f"{prefix}bias" in tensors)


def _row(layer: Layer, choice: Choice, found: Factorization | None) -> dict[str, Any]:
    rank: Any = 0 if found is None else found.rank
    return {
        "name": layer.name,
        "form": choice.form,
        "shape": list(layer.shape),
        "rank": list(rank) if isinstance(rank, tuple) else rank,
        "params_before": layer.weight.numel(),
        "params_after": choice.n_params,
        "rel_error": 0.0 if found is None else found.rel_error,
        "norm": "frobenius" if found is None else found.norm,
        "rel_error_frobenius": 0.0 if found is None else found.rel_error_frobenius,
        "reason": choice.reason,
    }


def _warn_few_samples(layers: Sequence[Layer], statistics: Mapping[str, Statistics]) -> None:
    few = [
        n.name
        for n in layers
        if n.name in statistics and 0 < statistics[n.name].count < n.weight[0].numel() and n.kind != "embedding"
    ]
    if few:
        warnings.warn(
            f"calibration has fewer positions than {few[0]} has inputs ({len(few)} layers): directions it never saw cost nothing; give more data",
            LrcompressWarning, stacklevel=3,
        )  # fmt: skip


def _device(compute: str) -> str:
    if compute == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    asked = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", compute)
    if asked is None:
        raise CommandError("--compute", "auto, cpu, cuda or cuda:N", compute)
    if compute != "cpu" and int(asked[1] or 0) >= torch.cuda.device_count():
        raise CommandError(
            "--compute", "a device that is here", compute, "no such CUDA device was found; use --compute cpu"
        )
    return compute


def _total(opened: OpenedModel) -> int:
    if opened.module is not None:
        return count_parameters(opened.module)
    return sum(t.numel() for t in {id(t): t for t in (opened.tensors or {}).values()}.values())


def _bytes(path: Path | None) -> int | None:
    if path is None:
        return None
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


__all__ = ["FactorizeResult", "factorize"]
