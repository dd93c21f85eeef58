"""The verb `recover`: win accuracy back by training, adapters on frozen factors or the factors themselves.

recover("compressed", data="train.npz", name="first", output="adapters/first")
recover("compressed", data="train.npz", train="factors", max_seconds=60, output="recovered")
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from ..adapt._files import write_adapter
from ..data import Data
from ..files import check_output, sha256_json, staged_folder
from ..model import OpenedModel
from ..model.checkpoint import MARKER, RETRAINER, Compressed, load_compressed, module_layers, state_of, write_retrained
from ..progress import Progress, Silent
from ..recover import Outcome, Saved, World
from ..recover.logs import Log, log_to
from ..recover.trained import factors_of
from ..work import Store
from .closed import ClosedForm, check_mode, refitted
from .holding import split
from .recovering import Asked, Job, TrainingOptions, answer_name, judge, prepare, settings_of, untrained
from .recovering import train as run_job
from .sources import device_of, for_model

MAKER = "lrcompress recover"


@dataclass(frozen=True)
class RecoverResult:
    """`model`: the compressed network with what was trained in place; `data`: the report."""

    data: dict[str, Any]
    model: nn.Module
    output: Path | None = None


def recover(
    compressed: str | Path | Compressed = "compressed",
    *,
    data: str | Data,
    train: str = "adapters",
    adapter_kind: str = "lora",
    rank: int = 8,
    alpha: float | None = None,
    include: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dora: bool = False,
    name: str = "recover",
    output: str | Path | None = None,
    select: str | Data | None = None,
    metric: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    compute: str = "auto",
    original: str | Path | OpenedModel | None = None,
    closed: str = "auto",
    processes: int | None = None,
    shard_teacher: bool = False,
    log: str | Path | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    encoding: str | None = None,
    progress: Progress | None = None,
    **training: Unpack[TrainingOptions],
) -> RecoverResult:
    """Train the compressed model against its original; keep the best state on `select`, the start being one.

    `train`: "adapters" of `adapter_kind` and `rank` on frozen factors, or "factors", which makes another compressed
    folder. `include`: only layers whose path one of these fnmatch patterns fits. `rank_pattern`, `alpha_pattern`: other ranks and alphas by fnmatch pattern on the layer's path, the first
    that fits. `rslora`: LoRA scaled by alpha/√rank; `dora`: LoRA with a trained norm per output, which only slots of
    kind dora and merging ship. `metric`: what decides, see `recover.keeping`. Without `select` a tenth of `data` is held out.
    `closed`: auto starts adapters from closed forms where these help, only trains nothing, off starts from zero; refit
    changes the base by least squares instead and writes a compressed folder.
    `encoding`: trained adapters are rounded to what a payload of it holds before they are judged.
    `processes`: how many torchrun must have started. `training`: see `TrainingOptions`. With `output`, a killed run
    continues where the same is asked again. Raises `CommandError`, `ModelError`, `DataError`, `HostError`.
    """
    asked = Asked(
        train, adapter_kind, rank, alpha, rank_pattern or {}, alpha_pattern or {}, name, tuple(include), rslora, dora
    )
    settings = settings_of(training, seed)
    if threads:
        torch.set_num_threads(threads)
    dest = None if output is None else Path(output)
    trust = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
    check_mode(closed, asked.train)
    if closed == "refit":
        return _refitted(compressed, data, select, original, dest, trust, progress or Silent())
    world = World.join(device_of(compute), processes)
    with contextlib.ExitStack() as stack:
        stack.callback(world.leave)
        with world.together():
            if dest is not None:
                check_output(dest, maker=_maker(asked), marker=MARKER)
            base = compressed if isinstance(compressed, Compressed) else load_compressed(Path(compressed))
            samples = for_model(data, base.opened), None if select is None else for_model(select, base.opened)
            teacher = original_of(base, original, trust, needed=set(settings.loss) != {"labels"})
            job = prepare(
                base, teacher, asked, settings, samples, metric=metric, world=world, shard_teacher=shard_teacher
            )
            job.encoding = encoding
            job.closed = closed if asked.train == "adapters" and not shard_teacher else "off"
            store = stack.enter_context(_store(job, dest))
            logged = stack.enter_context(_log(job, dest, log))
        return _run(job, store, logged, dest, trust, progress if progress is not None and world.first else Silent())


def _run(
    job: Job, store: Store | None, log: Log, dest: Path | None, trust: Mapping[str, bool], progress: Progress
) -> RecoverResult:
    """Train, report, write; the states of the run go when the output is there."""
    before = job.scorer.value()
    worst = job.scorer.falling(before) if job.scorer.decides and before is not None else None
    form = ClosedForm(
        job.closed, job.base, job.teacher, set(job.settings.loss) != {"labels"}, job.world.device, trust, progress
    )
    job.adapters = form.start(
        job.module, job.asked.name, job.adapters, fit=job.train_data, held=job.select_data, decide=lambda: judge(job, worst)
    )  # fmt: skip
    if job.closed == "only" or job.asked.dora:
        job.restrict()
    if job.closed == "only":
        outcome = untrained(judge(job))
    else:
        outcome = run_job(job, saved=None if store is None else Saved(store, "state"), log=log, progress=progress)
    report = _report(job, outcome, before, dest)
    form.report_in(report)
    with job.world.together():
        if dest is not None and job.world.first:
            _write(dest, job, outcome, report)
        if store is not None:
            store.remove()
    return RecoverResult(report, job.module, dest)


def _refitted(
    compressed: str | Path | Compressed, data: str | Data, select: str | Data | None,
    original: str | Path | OpenedModel | None, dest: Path | None, trust: Mapping[str, bool], progress: Progress,
) -> RecoverResult:  # fmt: skip
    """Refit the base itself, without training, and write a compressed folder."""
    base = compressed if isinstance(compressed, Compressed) else load_compressed(Path(compressed))
    teacher = original_of(base, original, trust, needed=True)
    assert teacher is not None
    fit, held = split(for_model(data, base.opened), None if select is None else for_model(select, base.opened))
    module, report = refitted(base, teacher, fit=fit, held=held, output=dest, progress=progress)
    return RecoverResult(report, module, None if report["output"] is None else dest)


def _maker(asked: Asked) -> str:
    return MAKER if asked.train == "adapters" else RETRAINER


def original_of(
    base: Compressed, original: str | Path | OpenedModel | None, trust: Mapping[str, bool], *, needed: bool
) -> OpenedModel | None:
    if isinstance(original, OpenedModel):
        return original
    if not needed and original is None:
        return None
    return base.open_original(None if original is None else Path(original), **trust)


def _store(job: Job, dest: Path | None) -> contextlib.AbstractContextManager[Store | None]:
    """Return where the run's states are kept: beside the output, under the hash of everything that decides it."""
    if dest is None or not job.world.first:
        return contextlib.nullcontext()
    return Store.open(dest, ["recover", sha256_json(job.deciding())])


def _log(job: Job, dest: Path | None, log: str | Path | None) -> Any:
    """Return the TensorBoard log: where it was asked for, or beside the output, whose bytes hold no times of day."""
    if not job.world.first:
        return log_to(None, asked=False)
    folder = Path(log) if log is not None else None if dest is None else dest.parent / f"{dest.name}.tensorboard"
    return log_to(folder, asked=log is not None)


def _report(job: Job, outcome: Outcome, before: float | None, dest: Path | None) -> dict[str, Any]:
    if job.asked.train == "factors" and outcome.best_step == 0:
        job.module = copy.deepcopy(job.base.need_module("recover"))  # bit for bit what it was
    after = job.scorer.value(job.module.to(job.world.device))
    job.module.cpu()
    named = job.scorer.name is not None
    adapters = job.asked.train == "adapters"
    # A layer that stays in its plain gauge takes more numbers than it began with.
    numbers = job.numbers if adapters else factors_of(job.module).numbers
    mix = job.settings.loss
    kind = (
        next(iter(mix))
        if set(mix.values()) == {1.0} and len(mix) == 1
        else ",".join(f"{n}={w:g}" for n, w in mix.items())
    )
    decided = job.scorer.decides
    return {
        "train": job.asked.train,
        "metric": job.scorer.name or f"loss_{kind}",
        "direction": job.scorer.metric.direction if job.scorer.metric else "min",
        "original": job.scorer.original,
        "before": before if named else outcome.start_loss,
        "after": after if named else outcome.best_loss,
        "loss": {
            "kind": kind, "weights": dict(mix), "before": outcome.start_loss, "after": outcome.best_loss,
            "history": [list(h) for h in outcome.history], "decides": "metric" if decided else "loss",
        },
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "stopped": outcome.stopped,
        "resumed_at": outcome.resumed_at,
        "train_seconds": outcome.seconds,
        "learning_rate": outcome.learning_rate,
        "rates": [list(r) for r in outcome.rates],
        "adapter": job.asked.kind if adapters else None,
        "dora": job.asked.dora,
        "rank": job.asked.rank if adapters else None,
        "trainable_params": numbers,
        "payload_bytes": 4 * numbers,
        "processes": job.world.size,
        "same_anywhere": job.settings.max_seconds is None,
        "output": None if dest is None else str(dest),
    }  # fmt: skip


def _write(dest: Path, job: Job, outcome: Outcome, report: Mapping[str, Any]) -> None:
    """Write the adapter folder, or the compressed folder: complete, or not at all."""
    about = {
        "name": job.asked.name, "seed": job.settings.seed, "steps": outcome.steps, "best_step": outcome.best_step,
        "loss": report["loss"]["kind"], "learning_rate": outcome.learning_rate,
    }  # fmt: skip
    with staged_folder(dest, maker=_maker(job.asked), marker=MARKER) as stage:
        if job.asked.train == "adapters":
            write_adapter(stage, job.adapters, maker=MAKER, base=job.base.digest, info=about)
        else:
            about["base"] = job.base.digest
            module = job.module
            write_retrained(
                stage,
                dest,
                job.base,
                tensors=state_of(module),
                layers=module_layers(module),
                report={"recovered": about},
            )


__all__ = ["MAKER", "RecoverResult", "answer_name", "original_of", "recover"]
