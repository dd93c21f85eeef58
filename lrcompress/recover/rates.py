"""Find a learning rate: short runs from the start on the same batches, judged on held-out samples.

Uphill and downhill, for adapters: a rate is compared with its neighbours, a factor √10 apart, sample by sample. It is
left for a higher one that is better, and for a lower one where it does harm, or where that one is clearly better: a trial
is short and prefers rates that are too low for the run. (IMDB's reviews, MiniLM, LoRA of 31,000 numbers, 120 steps of
16: on 200 reviews, trials of 40 steps at 3e-4, 9.5e-4, 3e-3 differ by less than 1.5 standard errors, and after the whole
run 3e-3 is right about 0.78 of 250 others and 9.5e-4 about 0.744. Noisy CIFAR-10, ResNet-20, LoKr of 1 kB: 9.5e-3 is
better than 3e-3 by 0.9 standard errors after 20 steps.) A trial has twenty steps, more where batches are small, a third of a run at most, a twentieth of a long one. (A small
network, four kinds of adapters, distilled or on labels, turned or not, runs of 100 steps of 64: the rate that trials of
5, 10, 20 and 40 steps prefer leaves the loss 12, 4, 1 and 6 % above that of the best rate, in the mean.)

Downhill only, for factors (`descending`): the first rate from the centre down whose trial does no harm. A trial
prefers rates that are too low for a long run, which has the time to settle, so that the highest one which does no harm
is the best guess; and it must be long enough: the first steps of an optimizer shake a network that is nearly right.
(ResNet-20 at 0.35 of its numbers, loss 1.772 at the start: trials of 12 steps at 3e-4, 1e-3, 3e-3 end at 1.774, 1.800,
1.827, trials of 24 at 1.770, 1.752, 1.722, and a run of 300 is better at 3e-3 than at 1e-3. MiniLM at half of its encoder, from 0.170: 0.169,
0.187, 0.258 after 24. On labels, which it answers too surely at first, from 0.430: 0.436 after 34 at 3e-4, 0.409 after 100.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from .keeping import clearly_more
from .objective import Held
from .schedule import Schedule
from .training import Training

#: How many rates are tried at most, and the part of a run's seconds that all trials may take.
_TRIED, _SHARE = 6, 0.3
#: Steps of one trial: at least; usually; at most, where a run is long; of one that must tell harm from noise.
_FEWEST, _USUAL, _MOST, _TELLING = 5, 20, 40, 24
#: Samples that a trial sees at least, where it may have the steps for them.
_SEEN = 1280
#: Part of a run that a trial may take, of adapters and of factors, and of a long run that it does take.
_EACH, _EACH_TELLING, _OF_LONG = 1 / 3, 0.2, 0.05
#: What a trial may lose before that is harm.
_HARM = 1.05
#: Losses (samples,) by half decades above the centre.
Trials = dict[int, Tensor]
#: Held-out samples that trials are judged on.
_PROBED = 256


def find_rate(training: Training, centre: float, *, descending: bool) -> None:
    """Fill in the rate of the training's state: the one that was asked for, or that of a search around `centre`."""
    state, asked = training.state, training.settings.learning_rate
    if asked is not None:
        state.rate = asked
        return
    steps = _telling(training) if descending else _length(training)
    trials: Trials = {}
    chosen = 0
    if steps:
        probe = _probe(training)
        start = training.world.from_first(probe.mean())
        with training.progress.task("learning rate", total=_TRIED) as advance:
            while True:
                chosen, following = training.world.from_first(_next(trials, start, descending=descending))
                if following is None or len(trials) == _TRIED or (trials and _late(training)):
                    break
                trials[following] = _try(training, rate_at(centre, following), steps, probe)
                advance(1, f"{rate_at(centre, following):.2g}: loss {float(trials[following].mean()):.4f}")
    training.restart()
    if descending and trials and _harms(trials[chosen], start):  # the time was up before a rate did no harm
        chosen -= 1
    state.rate = rate_at(centre, chosen)
    state.rates = [(rate_at(centre, k), float(v.mean())) for k, v in sorted(trials.items())]


def rate_at(centre: float, k: int) -> float:
    """Return the rate k half decades above the centre, to two digits."""
    return float(f"{centre * 10 ** (k / 2):.1e}")


def _next(trials: Trials, start: float, *, descending: bool = False) -> tuple[int, int | None]:
    """Return the best rate so far, and the next one to try, if any; `start`: the loss before any training."""
    best = 0
    if not trials:
        return best, best
    while True:
        sides = (best - 1,) if descending else (best - 1, best + 1)
        if descending and not _harms(trials[best], start):
            return best, None
        better = [k for k in sides if k in trials and _better(trials, k, best, start)]
        if not better:
            return best, next((k for k in sides if k not in trials), None)
        best = better[0]


def _better(trials: Trials, k: int, than: int, start: float) -> bool:
    """Tell whether to leave a rate for its neighbour `k`.

    Where nothing is gained, a lower rate loses less, because less is done.
    """
    losses, others = trials[k], trials[than]
    if k > than:
        return float(losses.mean()) < min(start, float(others.mean()))
    return _harms(others, start) or (float(losses.mean()) < start and clearly_more(others, losses))


def _harms(losses: Tensor, start: float) -> bool:
    return not float(losses.mean()) <= _HARM * start


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


def _telling(training: Training) -> int:
    """Return the steps of a trial that tells whether a rate does harm; 0 where a run has no time for one."""
    s, total = training.settings, training.settings.most_steps
    if total is not None and _EACH_TELLING * total < _TELLING:
        return 0
    if s.max_seconds is not None and _TELLING * _seconds(training) > _EACH_TELLING * s.max_seconds:
        return 0
    return _TELLING


def _length(training: Training) -> int:
    """Return the steps of a trial: a part of all, or what the clock allows, measured on a few."""
    s, total = training.settings, training.settings.most_steps
    most = _MOST
    if total is not None:
        usual = max(_USUAL, -(-_SEEN // s.batch_size))
        most = min(_MOST, max(_FEWEST, min(usual, round(_EACH * total)), round(_OF_LONG * total)))
    if s.max_seconds is None:
        return most
    return min(most, max(_FEWEST, int(_SHARE * s.max_seconds / (_TRIED - 1) / _seconds(training))))


def _seconds(training: Training) -> float:
    """Return the seconds of a step."""
    before = time.perf_counter()
    _steps(training, 0.0, 2)
    return float(training.world.from_first(max((time.perf_counter() - before) / 2, 1e-6)))


def _late(training: Training) -> bool:
    limit = training.settings.max_seconds
    return limit is not None and bool(training.world.from_first(training.clock.seconds > 1.5 * _SHARE * limit))


def _try(training: Training, rate: float, steps: int, probe: Held) -> Tensor:
    """Return the losses (samples,) after a short run; infinite where they do not stay finite."""
    training.restart()
    try:
        _steps(training, rate, steps)
    except ModelError:
        return torch.tensor([math.inf])
    return probe.losses().nan_to_num(nan=math.inf, posinf=math.inf)


def _steps(training: Training, rate: float, steps: int) -> None:
    batches: Sequence[np.ndarray] = training.order.epoch(0)
    schedule = Schedule(steps, None, training.settings.warmup)
    for i in range(steps):
        training.step(batches[i % len(batches)], 0, rate, schedule.rate(i / steps), name="learning rate, step")


__all__ = ["find_rate", "rate_at"]
