"""The training loop of recovery: frozen base, adapters only, the best state on held-out data is what remains.

The start (ΔW = 0) is a candidate like any other, so recovery never ends below where it began. Everything random
comes from the seed; the same seed, data and thread count give the same bytes unless `max_seconds` cuts the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapt import BaseAdapter
from ..data import Data
from ..errors import DataError, ModelError
from ..model import tensors_of
from ..progress import Progress
from .losses import LOSSES

Forward = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Settings:
    """How to train. `max_seconds` stops early and makes the result depend on the machine."""

    loss: str = "logits"
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    evaluations: int = 12
    max_seconds: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What training found: losses on `select` at the start and at the kept state, and the step it was found at."""

    start_loss: float
    best_loss: float
    best_step: int
    steps: int
    seconds: float
    history: tuple[tuple[int, float], ...]
    cut: bool


def train(
    adapters: Mapping[str, BaseAdapter],
    student: Forward,
    teacher: Forward,
    *,
    train_data: Data,
    select_data: Data,
    settings: Settings,
    module: nn.Module,
    score: Callable[[], float] | None = None,
    progress: Progress,
    device: str = "cpu",
) -> Outcome:
    """Train `adapters` in place and leave them in their best state on `select_data`.

    `score` returns what decides, lower is better (default: the loss on `select_data`). Everything else in `module`
    stays frozen and in evaluation mode. Raises `DataError` for labels that are missing or outside the classes.
    """
    if len(train_data) == 0 or len(select_data) == 0:
        raise DataError(
            "recovery data", "samples to train on and to select on", f"{len(train_data)} and {len(select_data)}"
        )
    frozen = _freeze_all_but(module, adapters)
    try:
        return _train(adapters, student, teacher, train_data, select_data, settings, score, progress, device)
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _train(
    adapters: Mapping[str, BaseAdapter],
    student: Forward,
    teacher: Forward,
    train_data: Data,
    select_data: Data,
    settings: Settings,
    score: Callable[[], float] | None,
    progress: Progress,
    device: str,
) -> Outcome:
    loss_of = _Objective(student, teacher, settings.loss, device)
    decide = score or (lambda: loss_of.mean(select_data, settings.batch_size))
    parameters = [p for a in adapters.values() for p in a.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    started = time.perf_counter()
    best = start = decide()
    best_step, kept = 0, [p.detach().clone() for p in parameters]
    history = [(0, start)]
    every = max(1, settings.steps // settings.evaluations)
    step, epoch, cut = 0, 0, False
    with progress.task("recover", total=settings.steps) as advance:
        while step < settings.steps and not cut:
            for batch in train_data.batches(
                min(settings.batch_size, len(train_data)), seed=settings.seed * 100_003 + epoch
            ):
                loss = loss_of(batch.inputs, batch.labels)
                if not torch.isfinite(loss):
                    raise ModelError(
                        "recovery", "a finite loss", f"{float(loss.detach())} at step {step}", "lower the learning rate"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                step += 1
                advance(1, f"loss {float(loss.detach()):.4f}")
                cut = settings.max_seconds is not None and time.perf_counter() - started > settings.max_seconds
                if step % every == 0 or step == settings.steps or cut:
                    value = decide()
                    history.append((step, value))
                    if math.isfinite(value) and value < best:
                        best, best_step, kept = value, step, [p.detach().clone() for p in parameters]
                if step == settings.steps or cut:
                    break
            epoch += 1
    with torch.no_grad():
        for p, value_kept in zip(parameters, kept, strict=True):
            p.copy_(value_kept)
    return Outcome(start, best, best_step, step, time.perf_counter() - started, tuple(history), cut)


def _rate(step: int, settings: Settings) -> float:
    warm = max(1, int(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def _freeze_all_but(module: nn.Module, adapters: Mapping[str, BaseAdapter]) -> list[nn.Parameter]:
    own = {id(p) for a in adapters.values() for p in a.parameters()}
    frozen = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    for p in frozen:
        p.requires_grad_(False)
    return frozen


class _Objective:
    """The loss of a batch; the teacher's answers are computed once per sample set where they are asked again."""

    def __init__(self, student: Forward, teacher: Forward, loss: str, device: str) -> None:
        self._student, self._teacher, self._name, self._device = student, teacher, loss, device
        self._loss = LOSSES[loss]
        self._held: dict[int, list[Tensor]] = {}

    def __call__(self, inputs: Mapping[str, object], targets: object) -> Tensor:
        tensors = tensors_of(inputs, self._device)
        return self._of(tensors, targets, None)

    def _of(self, tensors: Mapping[str, Tensor], targets: object, known: Tensor | None) -> Tensor:
        answer = self._student(tensors)
        if self._name == "labels":
            return self._loss(answer, _checked_labels(targets, answer))
        if known is None:
            known = self.teach(tensors)
        if "attention_mask" in tensors and answer.dim() == 3 and tensors["attention_mask"].shape == answer.shape[:2]:
            real = tensors["attention_mask"].bool()
            answer, known = answer[real], known[real]
        return self._loss(answer, known)

    def teach(self, tensors: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self._teacher(tensors)

    def mean(self, data: Data, batch_size: int) -> float:
        """Return the mean loss over `data`; the teacher answers each batch of it once only."""
        first = id(data) not in self._held
        answers = self._held.setdefault(id(data), [])
        total = count = 0.0
        with torch.no_grad():
            for i, batch in enumerate(data.batches(batch_size)):
                tensors = tensors_of(batch.inputs, self._device)
                if self._name != "labels" and first:
                    answers.append(self.teach(tensors))
                size = len(next(iter(tensors.values())))
                total += size * float(self._of(tensors, batch.labels, answers[i] if answers else None))
                count += size
        return total / count


def _checked_labels(targets: object, answer: Tensor) -> Tensor:
    if targets is None:
        raise DataError(
            "recovery data", "labels for the loss 'labels'", "none", "add an array y, or distil with --loss logits"
        )
    labels = torch.as_tensor(targets, device=answer.device)
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= answer.shape[-1]):
        raise DataError(
            "recovery data: labels", f"classes 0…{answer.shape[-1] - 1}", f"{int(labels.min())}…{int(labels.max())}"
        )
    return labels
