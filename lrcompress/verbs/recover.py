"""The verb `recover`: attach adapters to a compressed model, train them, write them as an adapter folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import metrics
from ..adapt import BaseAdapter, adapter_class, kinds
from ..adapt._files import MARKER, write_adapter
from ..data import Data
from ..errors import CommandError, DataError
from ..files import check_output, staged_folder
from ..model import OpenedModel
from ..model.adapting import by_pattern, fresh, layer_target, takes
from ..model.checkpoint import Compressed, load_compressed
from ..model.surgery import adaptable_layers, attach, wrap_dense
from ..progress import Progress, Silent
from ..recover import Outcome, Settings, train
from ..recover.losses import LOSSES, auto
from .closed import ClosedForm, refitted
from .predict import predictor
from .sources import device_of, for_model

MAKER = "lrcompress recover"


@dataclass(frozen=True)
class RecoverResult:
    """`model`: the compressed network with the trained adapter attached and active; `data`: the report."""

    data: dict[str, Any]
    model: nn.Module
    output: Path | None = None


def recover(
    compressed: str | Path | Compressed = "compressed",
    *,
    data: str | Data,
    adapter_kind: str = "lora",
    rank: int = 8,
    alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    name: str = "recover",
    output: str | Path | None = None,
    select: str | Data | None = None,
    loss: str = "auto",
    metric: str | None = None,
    steps: int = 400,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    max_seconds: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    compute: str = "auto",
    original: str | Path | OpenedModel | None = None,
    closed: str = "auto",
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> RecoverResult:
    """Train an adapter of `adapter_kind` and `rank` on the compressed model; keep its best state on `select`.

    `rank_pattern`, `alpha_pattern`: other ranks and alphas by fnmatch pattern on the layer's path, the first that fits.
    `loss`: logits or embedding (distilled from the original), labels, or auto. Without `select` a tenth of `data` is
    held out for it. `closed`: auto starts training from the closed forms, only trains nothing, off starts from zero;
    refit changes the base by least squares instead and writes a compressed folder.
    `name` must be a plain name. Raises `CommandError`, `ModelError`, `DataError`.
    """
    progress = progress or Silent()
    _check(adapter_kind, rank, name, loss, steps)
    if threads:
        torch.set_num_threads(threads)
    trust = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
    if closed == "refit":
        return _refitted(compressed, data, select, original, output, trust, progress)
    dest = None if output is None else Path(output)
    if dest is not None:
        check_output(dest, maker=MAKER, marker=MARKER)
    base = compressed if isinstance(compressed, Compressed) else load_compressed(Path(compressed))
    module = copy.deepcopy(base.need_module("recover"))
    train_data, select_data = _split(
        for_model(data, base.opened), None if select is None else for_model(select, base.opened)
    )
    teacher_model = None
    if isinstance(original, OpenedModel):
        teacher_model = original
    elif loss != "labels" or original is not None:
        teacher_model = base.open_original(None if original is None else Path(original), **trust)
    device = device_of(compute)
    adapters = _attached(module, name, adapter_kind, rank, alpha, seed, rank_pattern or {}, alpha_pattern or {})
    module.to(device)
    student = _answering(base.opened, module)
    teacher = student if teacher_model is None else _answering(teacher_model, _on(teacher_model, device))
    if loss == "auto":
        loss = _auto_loss(base.opened, module, train_data, device)
    settings = Settings(
        loss=loss, steps=steps, batch_size=batch_size, learning_rate=learning_rate, max_seconds=max_seconds, seed=seed
    )
    scorer = _scorer(metric, base.opened, module, teacher_model, select_data, device)
    before = scorer.of(module)

    def loss_of_start() -> float:
        return train(
            adapters, student, teacher, train_data=train_data, select_data=select_data, module=module, device=device,
            settings=replace(settings, steps=0), score=scorer.decide if scorer.name and metric else None, progress=Silent(),
        ).start_loss  # fmt: skip

    closed_form = ClosedForm(closed, base, teacher_model, loss != "labels", device, trust, progress)
    adapters = closed_form.start(module, name, adapters, fit=train_data, held=select_data, decide=loss_of_start)
    if closed == "only":
        settings = replace(settings, steps=0)
    outcome = train(
        adapters, student, teacher, train_data=train_data, select_data=select_data, settings=settings, module=module,
        score=scorer.decide if scorer.name and metric else None, progress=progress, device=device,
    )  # fmt: skip
    after = scorer.of(module)
    module.cpu()
    trainable = sum(p.numel() for a in adapters.values() for p in a.parameters())
    report = {
        "metric": scorer.name or f"loss_{loss}",
        "original": scorer.original,
        "before": before if scorer.name else outcome.start_loss,
        "after": after if scorer.name else outcome.best_loss,
        **_trained(outcome, loss),
        "adapter": adapter_kind,
        "rank": rank,
        "trainable_params": trainable,
        "payload_bytes": 4 * trainable,
        "output": None if dest is None else str(dest),
    }
    closed_form.report_in(report)
    if dest is not None:
        info = {"name": name, "seed": seed, "steps": outcome.steps, "best_step": outcome.best_step, "loss": loss}
        with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
            write_adapter(stage, adapters, maker=MAKER, base=base.digest, info=info)
    return RecoverResult(report, module, dest)


def _refitted(
    compressed: str | Path | Compressed, data: str | Data, select: str | Data | None,
    original: str | Path | OpenedModel | None, output: str | Path | None, trust: Mapping[str, bool], progress: Progress,
) -> RecoverResult:  # fmt: skip
    """Refit the base itself, without training, and write a compressed folder."""
    dest = None if output is None else Path(output)
    base = compressed if isinstance(compressed, Compressed) else load_compressed(Path(compressed))
    if not isinstance(original, OpenedModel):
        original = base.open_original(None if original is None else Path(original), **trust)
    fit, held = _split(for_model(data, base.opened), None if select is None else for_model(select, base.opened))
    module, report = refitted(base, original, fit=fit, held=held, output=dest, progress=progress)
    return RecoverResult(report, module, None if report["output"] is None else dest)


def _attached(
    module: nn.Module, name: str, kind: str, rank: int, alpha: float | None, seed: int, ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> dict[str, BaseAdapter]:  # fmt: skip
    """Attach a fresh adapter to every layer that can carry one; no layer gets a rank above its own."""
    generator = torch.Generator().manual_seed(seed)

    def make(layer: str, _: tuple[int, ...]) -> BaseAdapter:
        r, a = by_pattern(layer, ranks, rank), by_pattern(layer, alphas, alpha)
        return fresh(kind, wrap_dense(module, layer).target, r, a, generator=generator)

    layers = [n for n in adaptable_layers(module) if takes(kind, layer_target(module, n))]
    if not layers:
        raise CommandError(
            "lrcompress recover --adapter", "a kind that these layers take", kind, "factorize them with svd"
        )
    for pattern in (*ranks, *alphas):
        if not any(fnmatchcase(n, pattern) for n in layers):
            where, near = "lrcompress recover --rank-pattern, --alpha-pattern", ", ".join(layers[:4])
            raise CommandError(where, "a pattern that matches a layer", pattern, f"layers are {near}, …")
    return attach(module, name, make, layers)


def _trained(outcome: Outcome, loss: str) -> dict[str, Any]:
    history = [list(h) for h in outcome.history]
    return {
        "loss": {"kind": loss, "before": outcome.start_loss, "after": outcome.best_loss, "history": history},
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "train_seconds": outcome.seconds,
    }


def _check(kind: str, rank: int, name: str, loss: str, steps: int) -> None:
    where = "lrcompress recover"
    if kind not in kinds():
        raise CommandError(f"{where} --adapter", f"one of {', '.join(kinds())}", kind)
    if rank < 1:
        raise CommandError(f"{where} --rank", "a whole number of at least 1", rank)
    if not name.replace("-", "_").isidentifier():
        raise CommandError(f"{where} --name", "letters, digits, - and _", name)
    if loss not in {"auto", *LOSSES}:
        raise CommandError(f"{where} --loss", f"auto or one of {', '.join(LOSSES)}", loss)
    if steps < 1:
        raise CommandError(f"{where} --steps", "a whole number of at least 1", steps)
    assert adapter_class(kind)


def _split(data: Data, select: Data | None) -> tuple[Data, Data]:
    if len(data) < 2 and select is None:
        raise DataError("recovery data", "at least 2 samples, so that one can be held out", len(data))
    if select is not None:
        return data, select
    held = min(max(len(data) // 10, 1), 2000)
    # Every tenth sample, so that ordered files are represented.
    index = np.arange(len(data))
    chosen = np.unique(np.linspace(0, len(data) - 1, held).round().astype(int))
    return data.take(np.setdiff1d(index, chosen)), data.take(chosen)


def answer_name(outputs: Mapping[str, Tensor]) -> str:
    return next((n for n in metrics.TELLING if n in outputs), next(iter(outputs)))


def _answering(opened: OpenedModel, module: nn.Module) -> Any:
    def answer(inputs: Mapping[str, Tensor]) -> Tensor:
        outputs = opened.outputs(module, inputs)
        return outputs[answer_name(outputs)]

    return answer


def _on(opened: OpenedModel, device: str) -> nn.Module:
    assert opened.module is not None
    return opened.module.to(device).eval()


def _auto_loss(opened: OpenedModel, module: nn.Module, data: Data, device: str) -> str:
    batch = next(iter(data.batches(min(8, len(data)))))
    with torch.no_grad():
        outputs = opened.outputs(module, {k: torch.as_tensor(v, device=device) for k, v in batch.inputs.items()})
    name = answer_name(outputs)
    return auto(name, outputs[name].cpu())


class _Scorer:
    """A metric on `select`: its value for a module, and as a number to minimise."""

    def __init__(
        self, metric: metrics.Metric | None, opened: OpenedModel, module: nn.Module, data: Data, device: str
    ) -> None:
        self._metric, self._opened, self._module, self._data, self._device = metric, opened, module, data, device
        self.name = metric.name if metric else None
        self.original: float | None = None

    def of(self, module: nn.Module) -> float | None:
        if self._metric is None:
            return None
        return float(self._metric.evaluate(predictor(self._opened, module, self._device), self._data, 250).value)

    def decide(self) -> float:
        value = self.of(self._module)
        assert value is not None and self._metric is not None
        return -value if self._metric.direction == "max" else value


def _scorer(
    metric: str | None, opened: OpenedModel, module: nn.Module, teacher: OpenedModel | None, data: Data, device: str
) -> _Scorer:
    """Score by `metric`, or for information only by accuracy where `data` has class numbers."""
    chosen = metrics.get(metric) if metric else None
    if chosen is None and data.labels is not None and np.issubdtype(data.labels.dtype, np.integer) and not data.pairs:
        chosen = metrics.get("accuracy")
    scorer = _Scorer(chosen, opened, module, data, device)
    if teacher is not None and teacher.module is not None:
        scorer.original = scorer.of(teacher.module.to(device))
    return scorer
