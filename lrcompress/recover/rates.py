"""Find a learning rate: short runs from the start on the same batches, judged on held-out samples, uphill and downhill.

A rate is compared with its neighbours, a factor √10 apart, until both are worse. A short run prefers rates that are
too low for a long one, which has the time to settle: a `settling` run of many trials' length takes the rate half a
decade above the best, where its trial stayed finite. Where there is no time for trials of 40 steps it takes the centre
itself: ten steps only tell how much the first ones of an optimizer shake a network. (ResNet-20 at a quarter of its
numbers, whitened: trials of 12 steps chose 1e-4, with which a run of 139 won nothing; trials of 60 steps have their
best at 3e-3, and so has a run of 300.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import ModelError
from .objective import Held
from .schedule import Schedule
from .training import Training

#: Part of a run that the search may take, and how many rates it tries at most.
_SHARE, _TRIED = 0.2, 6
#: Steps of one trial: at least, at most.
_FEWEST, _MOST = 5, 40
#: From so many trials' length on a run counts as long.
_LONG = 20
#: Held-out samples that trials are judged on.
_PROBED = 256


def find_rate(training: Training, centre: float, *, settling: bool) -> None:
    """Fill in the rate of the training's state: the one that was asked for, or that of a search around `centre`."""
    state, asked = training.state, training.settings.learning_rate
    if asked is not None:
        state.rate = asked
        return
    steps = _length(training)
    if settling and steps < _MOST:
        training.restart()
        state.rate = centre
        return
    probe = _probe(training)
    scores: dict[int, float] = {}
    with training.progress.task("learning rate", total=_TRIED) as advance:
        while (k := _next(scores)) is not None and len(scores) < _TRIED and not _late(training):
            scores[k] = _try(training, rate_at(centre, k), steps, probe)
            advance(1, f"{rate_at(centre, k):.2g}: loss {scores[k]:.4f}")
    training.restart()
    chosen = min(scores, key=lambda k: (scores[k], k)) if scores else 0
    total = training.settings.most_steps
    long = settling and (total is None or total >= _LONG * steps)
    if long and math.isfinite(scores.get(chosen + 1, math.inf)):
        chosen += 1
    state.rate = rate_at(centre, chosen)
    state.rates = [(rate_at(centre, k), v) for k, v in sorted(scores.items())]


def rate_at(centre: float, k: int) -> float:
    """Return the rate k half decades above the centre, to two digits."""
    return float(f"{centre * 10 ** (k / 2):.1e}")


def _next(scores: dict[int, float]) -> int | None:
    """Return the next neighbour to try: beside the best so far, lower first; None where both are known."""
    if not scores:
        return 0
    best = min(scores, key=lambda k: (scores[k], k))
    return next((k for k in (best - 1, best + 1) if k not in scores), None)


def _probe(training: Training) -> Held:
    data = training.select_data
    width = 2 if data.pairs else 1
    rows = np.unique(
        np.linspace(0, len(data) // width - 1, min(_PROBED // width, len(data) // width)).round().astype(int)
    )
    chosen = data.take((rows[:, None] * width + np.arange(width)).reshape(-1))
    net = training.networks
    # With energies of its own: those of the run must stay as they were measured.
    objective = replace(training.objective, energies=dict(training.objective.energies))
    return Held(objective, net.student, net.teacher, chosen, _PROBED, training.world)


def _length(training: Training) -> int:
    """Return the steps of a trial: a part of all, or what the clock allows, measured on a few."""
    s, total = training.settings, training.settings.most_steps
    most = _MOST if total is None else min(_MOST, max(_FEWEST, round(_SHARE * total / 4)))
    if s.max_seconds is None:
        return most
    before = time.perf_counter()
    _steps(training, 0.0, 2)
    seconds = (time.perf_counter() - before) / 2
    found = max(_FEWEST, int(_SHARE * s.max_seconds / (_TRIED - 1) / max(seconds, 1e-6)))
    return int(training.world.from_first(min(most, found)))


def _late(training: Training) -> bool:
    limit = training.settings.max_seconds
    return limit is not None and bool(training.world.from_first(training.clock.seconds > 1.5 * _SHARE * limit))


def _try(training: Training, rate: float, steps: int, probe: Held) -> float:
    """Return the loss after a short run; infinite where it does not stay finite."""
    training.restart()
    try:
        _steps(training, rate, steps)
    except ModelError:
        return math.inf
    value = training.world.from_first(probe.mean())
    return float(value) if math.isfinite(value) else math.inf


def _steps(training: Training, rate: float, steps: int) -> None:
    batches: Sequence[np.ndarray] = training.order.epoch(0)
    schedule = Schedule(steps, None, training.settings.warmup)
    for i in range(steps):
        training.step(batches[i % len(batches)], 0, rate, schedule.rate(i / steps), name="learning rate, step")


__all__ = ["find_rate", "rate_at"]
