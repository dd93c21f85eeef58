"""The verb `adapt`: a new task or another domain, the base frozen; kinds of adapters at equal bytes, the best is kept.

Every kind gets the same bytes, those of its numbers in a payload, spread over the layers by the gradient of the loss at
the start, and the same training. What they are worth, rounded as they will travel, is compared on `select`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapt import BaseAdapter, Target, adapter_class, kinds
from ..adapt._files import MARKER, read_adapter
from ..data import Data
from ..encodings import stored_bytes
from ..errors import BudgetError, CommandError, HostError, LrcompressError
from ..files import check_output, sha256_json, staged_folder, write_json
from ..model import OpenedModel
from ..model.adapting import fresh, layer_target, takes
from ..model.checkpoint import Compressed, load_compressed
from ..model.surgery import adaptable_layers, attach, wrap_dense
from ..progress import Progress, Silent
from ..recover import World
from ..recover.logs import NoLog
from ..recover.share import RANKS, Prices, prices, ranks_within
from .holding import split
from .recover import MAKER, original_of, recover
from .recovering import Asked, Job, TrainingOptions, prepare, ready, settings_of
from .sources import device_of, for_model

#: How numbers are rounded and counted: two bytes each, or codes with their scales. Where nothing is asked for, two: what a
#: payload of codes saves of them is about what its names, scales and golden outputs take (ResNet-20: 8,000 numbers, 15.7 kB).
ENCODINGS = ("f16", "int8", "int4")
#: Batches that the gradient is looked at with.
_BATCHES = 8
#: What the gradient is looked at through, and along how many directions, for kinds outside of a layer's core and in it.
_PROBES, _DIRECTIONS = {False: "lora", True: "core"}, {False: 32, True: 1 << 20}

#: A network with probes attached, and the spectra of what they saw.
Look = tuple[nn.Module, dict[str, Tensor]]


@dataclass(frozen=True)
class AdaptResult:
    """`model`: the network with the best adapter attached and active; `data`: the report."""

    data: dict[str, Any]
    model: nn.Module
    output: Path | None = None


def adapt(
    compressed: str | Path | Compressed = "compressed",
    *,
    data: str | Data,
    adapter_kinds: Sequence[str] = (),
    max_bytes: int = 16384,
    encoding: str = "f16",
    name: str = "adapt",
    output: str | Path | None = None,
    select: str | Data | None = None,
    metric: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    compute: str = "auto",
    original: str | Path | OpenedModel | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **training: Unpack[TrainingOptions],
) -> AdaptResult:
    """Train an adapter of each kind within `max_bytes` and keep the one that is best on `select`.

    `adapter_kinds`: none for all that the layers take. `encoding`: f16, int8 or int4, of the numbers alone. The loss is that of the labels, where the data have any. With
    `output` a killed run continues with what was not done. `training`: as in `recover`, for each kind. Raises
    `BudgetError` where no layer's smallest adapter fits, `CommandError`, `ModelError`, `DataError`.
    """
    progress = progress or Silent()
    if threads:
        torch.set_num_threads(threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError("lrcompress adapt", "one process", os.environ["WORLD_SIZE"], "start it without torchrun")
    if encoding not in ENCODINGS:
        raise CommandError("lrcompress adapt --encoding", ", ".join(ENCODINGS), encoding)
    dest = None if output is None else Path(output)
    if dest is not None:
        check_output(dest, maker=MAKER, marker=MARKER)
    base = compressed if isinstance(compressed, Compressed) else load_compressed(Path(compressed))
    samples = for_model(data, base.opened), None if select is None else for_model(select, base.opened)
    if training.get("loss", "auto") == "auto" and samples[0].labels is not None:
        training["loss"] = "labels"
    settings = settings_of(training, seed)
    trust = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
    teacher = original_of(base, original, trust, needed=set(settings.loss) != {"labels"})
    fit, held = split(*samples)

    def look(probe: Asked) -> Look:
        job = prepare(
            base, teacher, probe, settings, (fit, held), metric=None, world=World(device=device_of(compute)),
            shard_teacher=False,
        )  # fmt: skip
        return job.module, _spectra(job)

    chosen = _kinds(adapter_kinds, base.need_module("adapt"))
    # What a core reaches is told by the gradient by a whole one, all others by that by the weight.
    in_core = {adapter_class(k).in_core for k in chosen}
    looks = {c: look(Asked(kind=_PROBES[c], rank=_DIRECTIONS[c], name=name)) for c in sorted(in_core)}
    plans, left_out = _plans(chosen, looks, max_bytes, encoding, asked=bool(adapter_kinds))

    def trained(kind: str, ranks: Mapping[str, int], folder: Path) -> dict[str, Any]:
        return recover(
            base, data=fit, select=held, adapter_kind=kind, rank=max(ranks.values()), rank_pattern=ranks,
            include=tuple(ranks), name=name, metric=metric, seed=seed, compute=compute, original=teacher, closed="off",
            encoding=encoding, progress=progress, output=folder, trust_pickle=trust_pickle, trust_remote_code=trust_remote_code, **training,
        ).data  # fmt: skip

    key = [base.digest, fit.digest(), held.digest(), settings.deciding(), metric, name, encoding]
    with _workplace(dest) as place:
        rows = _compared(plans, place, key, trained)
        best = _best(rows, maximize=rows[0]["direction"] == "max")
        model = _with_adapter(base, place / best["kind"], name)
        if dest is not None:
            with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
                shutil.copytree(place / best["kind"], stage, dirs_exist_ok=True)
    report = {
        "metric": best["metric"], "before": best["before"], "after": best["after"], "best": best["kind"], "n": len(held),
        "max_bytes": max_bytes, "encoding": encoding, "kinds": rows, "hints": [*left_out, *_hints(rows, best, len(held))],
        "output": None if dest is None else str(dest),
    }  # fmt: skip
    return AdaptResult(report, model, dest)


@dataclass(frozen=True)
class _Plan:
    """The rank of every layer that gets an adapter of a kind, and what all of them take."""

    ranks: dict[str, int]
    n_bytes: int


def _compared(
    plans: Mapping[str, _Plan], place: Path, key: Sequence[Any],
    trained: Callable[[str, Mapping[str, int], Path], dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Train what an earlier run of the same command has not, each in a folder of its own; return a row for each kind."""
    rows = []
    for kind, plan in plans.items():
        about = place / f"{kind}.json"
        own = sha256_json([*key, sorted(plan.ranks.items())])
        report = _done(about, own)
        if report is None:
            report = trained(kind, plan.ranks, place / kind)
            write_json(about, {"key": own, "report": report})
        rows.append(_row(kind, plan, report))
    return rows


@contextlib.contextmanager
def _workplace(dest: Path | None) -> Iterator[Path]:
    """Yield where the kinds' adapters go: a hidden folder beside the output, which goes when all are done."""
    if dest is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    place = dest.parent / f".{dest.name}.kinds"
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    except LrcompressError as e:
        # The same command would fail in the same way, unless it was this machine's fault.
        if not isinstance(e, HostError):
            shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)


def _done(about: Path, key: str) -> dict[str, Any] | None:
    """Return the report of a kind that an earlier run of the same command has trained."""
    try:
        found = json.loads(about.read_text())
    except (OSError, ValueError):
        return None
    return dict(found["report"]) if isinstance(found, dict) and found.get("key") == key else None


def _kinds(asked: Sequence[str], module: nn.Module) -> list[str]:
    """Return the kinds to try: those asked for, or all that some layer takes."""
    where = "lrcompress adapt --adapter"
    unknown = [k for k in asked if k not in kinds()]
    if unknown:
        raise CommandError(where, f"some of {', '.join(kinds())}", unknown[0])

    def able_on(kind: str) -> bool:
        layers = adaptable_layers(module, cores=adapter_class(kind).in_core)
        return any(takes(kind, layer_target(module, n)) for n in layers)

    able = [k for k in asked or kinds() if able_on(k)]
    missing = [k for k in asked if k not in able]
    if missing:
        raise CommandError(
            where, "kinds that these layers take", missing[0], "factorize them with svd, or leave it out"
        )
    return able


# bytes ----------------------------------------------------------------------------------------------------------------


def _spectra(job: Job) -> dict[str, Tensor]:
    """Return the squared singular values of the gradient that each layer's probe saw, summed over groups."""
    with ready(job, None, NoLog(), Silent()) as training:
        training.gradient(_BATCHES)
    found = {}
    for layer, adapter in job.adapters.items():
        gradients = [p.grad for p in adapter.parameters() if p.grad is not None and p.grad.dim() >= 2]
        largest = max(gradients, key=lambda g: float(g.norm())).double()
        by_group = largest if adapter.in_core and largest.dim() == 3 else largest.flatten(1)[None]
        found[layer] = torch.linalg.svdvals(by_group).square().sum(0)
    return found


def _plans(
    chosen: Sequence[str], looks: Mapping[bool, Look], max_bytes: int, encoding: str, *, asked: bool
) -> tuple[dict[str, _Plan], list[str]]:
    """Return the plan of each kind, and what is to be said of kinds that nobody asked for and that do not fit."""
    plans: dict[str, _Plan] = {}
    refused: list[tuple[int, str]] = []
    for kind in chosen:
        try:
            plans[kind] = _plan(kind, *looks[adapter_class(kind).in_core], max_bytes, encoding)
        except _Misfit as e:
            if asked:
                raise
            refused.append((e.least_bytes, kind))
    if not plans:
        raise _Misfit(max_bytes, *min(refused))
    return plans, [f"left out: {kind}, the smallest takes {least:,} bytes" for least, kind in refused]


class _Misfit(BudgetError):
    """Not even the smallest adapter of a kind fits."""

    def __init__(self, max_bytes: int, least_bytes: int, kind: str) -> None:
        self.least_bytes = least_bytes
        got = f"{max_bytes} bytes; the smallest {kind} takes {least_bytes}"
        super().__init__("lrcompress adapt --max-bytes", "room for one layer", got, f"allow {least_bytes}")


def _plan(kind: str, module: nn.Module, spectra: Mapping[str, Tensor], max_bytes: int, encoding: str) -> _Plan:
    """Spread the bytes over the layers that take this kind; `BudgetError` where none fits."""
    offers: dict[str, Prices] = {}
    for layer in spectra:
        target = wrap_dense(module, layer).target
        if takes(kind, target):
            own = adapter_class(kind)
            offers[layer] = prices({(r := own.rank_for(target, k)): _bytes(kind, target, r, encoding) for k in RANKS})
    found = ranks_within(offers, spectra, max_bytes)
    if not found:
        raise _Misfit(max_bytes, min(offer[0][1] for offer in offers.values()), kind)
    return _Plan(found, sum(dict(offers[layer])[rank] for layer, rank in found.items()))


def _bytes(kind: str, target: Target, rank: int, encoding: str) -> int:
    """Return what the numbers of a fresh adapter take in a payload."""
    with torch.device("meta"):
        shapes = [p.shape for p in fresh(kind, target, rank).parameters()]
    return sum(stored_bytes(shape, encoding) for shape in shapes)


# results --------------------------------------------------------------------------------------------------------------


def _row(kind: str, plan: _Plan, report: Mapping[str, Any]) -> dict[str, Any]:
    direction = "min" if str(report["metric"]).startswith("loss_") else report["direction"]
    return {
        "kind": kind, "metric": report["metric"], "direction": direction, "before": report["before"], "after": report["after"],
        "loss": report["loss"]["after"], "numbers": report["trainable_params"], "bytes": plan.n_bytes,
        "ranks": plan.ranks, "steps": report["steps"], "seconds": report["train_seconds"],
        "learning_rate": report["learning_rate"],
    }  # fmt: skip


def _best(rows: Sequence[Mapping[str, Any]], *, maximize: bool) -> Mapping[str, Any]:
    """Return the row of the best score; of equals that with the lower loss."""
    sign = -1 if maximize else 1
    return min(rows, key=lambda r: (sign * r["after"], r["loss"], r["bytes"]))


def _hints(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any], n: int) -> list[str]:
    """Return what the comparison says to someone who has to choose."""
    hints = []
    if best["metric"] == "accuracy":
        share = (best["after"] * n + 1) / (n + 2)  # all right of a few is not all right for sure
        error = math.sqrt(share * (1 - share) / n)
        near = [r for r in rows if r["after"] >= best["after"] - error]
        least = min(near, key=lambda r: r["bytes"])
        others = [r["kind"] for r in near if r is not best]
        if others:
            hints.append(f"within one standard error ({error:.3f}, n = {n}) of {best['kind']}: {', '.join(others)}")
        if least is not best and least["bytes"] < 0.8 * best["bytes"]:
            hints.append(f"{least['kind']} does as well for {least['bytes']:,} bytes: --adapter {least['kind']}")
    if all(r["after"] == r["before"] for r in rows):
        hints.append("no kind learnt anything: give more data, more steps (--steps) or more bytes (--max-bytes)")
    return hints


def _with_adapter(base: Compressed, folder: Path, name: str) -> nn.Module:
    module = copy.deepcopy(base.need_module("adapt"))
    found: dict[str, BaseAdapter] = dict(read_adapter(folder).adapters)
    attach(module, name, lambda layer, _: found[layer], list(found))
    return module
