"""The verb `plan`: choose form and rank of every layer under a budget, say what was rejected and why, and write it down.

found = plan("model.safetensors", arch="nets.py:resnet20", calib="images.npz", ratio=0.5, output="plan.json")
lrcompress.factorize("model.safetensors", …, plan="plan.json", calib="images.npz")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Data
from ..errors import CommandError, ModelError
from ..factorize import form, forms
from ..model import InputSpec, OpenedModel, open_model
from ..plan import RankPlan, check_plan, write_plan
from ..progress import Progress, Silent
from .budgeting import ForDevice, Market, device_plan
from .planning import budget_of, plan_within, prepare
from .sources import device_of


@dataclass(frozen=True)
class PlanResult:
    """`plan`: the plan of the layers that are chosen for; `data`: the JSON object of the command line; `output`: the file written."""

    data: dict[str, Any]
    plan: RankPlan
    output: Path | None = None


def plan(
    model: str | Path | OpenedModel | Any,
    *,
    ratio: float | None = None,
    max_params: int | None = None,
    max_bytes: int | None = None,
    max_ms: float | None = None,
    device: str | Path | None = None,
    latency: str | Path | None = None,
    bits: Sequence[int] | None = None,
    method: str | None = None,
    multiple: int | None = None,
    calib: str | Data | None = None,
    select: Data | None = None,
    quick: bool = False,
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
) -> PlanResult:
    """Choose form and rank of every layer: exactly one of `ratio`, `max_params`, `max_bytes` says how much it may take.

    The rest is as in `factorize`. Raises `CommandError`, `ModelError`, `DataError`, `BudgetError`.
    """
    progress = progress or Silent()
    _check_options({"--ratio": ratio, "--max-params": max_params, "--max-bytes": max_bytes}, max_ms, method, multiple)
    for_device = ForDevice.of(device, latency, max_bytes, max_ms, bits, {"--ratio": ratio, "--max-params": max_params})
    if output is not None:  # hours of work must not end in a refusal
        check_plan(Path(output))
    compute = device_of(compute)
    if threads:
        torch.set_num_threads(threads)
    opened = model if isinstance(model, OpenedModel) else open_model(
        model, arch=arch, arch_args=arch_args, inputs=inputs, trust_pickle=trust_pickle, trust_remote_code=trust_remote_code
    )  # fmt: skip
    if opened.module is None:
        raise ModelError(
            opened.path, "a network to plan for", "a state dict",
            "give --arch; a bare state dict can be factorized by --ratio at once",
        )  # fmt: skip
    prepared = prepare(
        opened, include=include, exclude=exclude, calib=calib, seed=seed, compute=compute, cache=cache, progress=progress,
        verb="plan",
    )  # fmt: skip
    method = method or ("auto" if prepared.statistics else "svd")
    if for_device is not None:
        market = Market.of(
            prepared, method=method, bits=for_device.bits, prices=for_device.prices,
            multiple=multiple or for_device.multiple, measure=not quick, select=select, progress=progress,
        )  # fmt: skip
        found = device_plan(market, for_device.limits)
        after = None
    else:
        budget = budget_of(prepared, ratio=ratio, max_params=max_params, max_bytes=max_bytes)
        found = plan_within(
            prepared, budget, method=method, multiple=multiple or 1, measure=not quick, select=select, progress=progress
        )
        after = budget.fixed + sum(p.choice.n_params for p in found.layers) if budget.unit == "params" else None
    data = {**found.as_json(), "seed": seed, "params_before": prepared.total, "params_after": after, "output": None}
    if output is None:
        return PlanResult(data, found)
    dest = Path(output)
    write_plan(dest, found)
    return PlanResult({**data, "output": str(dest)}, found, dest)


def _check_options(
    sizes: Mapping[str, float | int | None], max_ms: float | None, method: str | None, multiple: int | None
) -> None:
    where = "lrcompress plan"
    given = [n for n, v in sizes.items() if v is not None]
    if max_ms is not None and not (max_ms > 0 and math.isfinite(max_ms)):
        raise CommandError(f"{where} --max-ms", "a number above 0", max_ms)
    if len(given) != 1 and not (max_ms is not None and not given):
        raise CommandError(
            where, f"exactly one of {', '.join(sizes)}", " and ".join(given) or "none", "for example --ratio 0.5"
        )
    for name in given:
        _check_size(where, name, sizes[name])
    if multiple is not None and multiple < 1:
        raise CommandError(f"{where} --rank-multiple", "a whole number of at least 1", multiple)
    _check_method(where, method)


def _check_size(where: str, name: str, value: float | int | None) -> None:
    assert value is not None
    if not value > 0 or (name == "--ratio" and value > 1):  # nor NaN
        raise CommandError(
            f"{where} {name}", "a number above 0" + (" and at most 1" if name == "--ratio" else ""), value
        )


def _check_method(where: str, method: str | None) -> None:
    if method is not None and method not in ("auto", *forms()):
        try:
            form(method)
        except KeyError as e:
            raise CommandError(
                f"{where} --method", f"auto or one of {', '.join(forms())}", method, e.args[0].partition("; ")[2]
            ) from e
    if method == "shared":
        raise CommandError(
            f"{where} --method", "a form that stands for itself", method, "use factorize --method shared"
        )


__all__ = ["PlanResult", "plan"]
